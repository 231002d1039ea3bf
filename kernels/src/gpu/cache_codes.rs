//! Keys and values that a cache holds as codes of 8 or 4 bits: their layout on a GPU, and how they get there.
//!
//! ```text
//! keys, values of a sequence    codes | scales F32 [kv_heads, P, groups] | zero points U8 [kv_heads, P, groups]
//! codes of keys                 [kv_heads, P, bytes]              P: the capacity rounded up to a multiple of 8
//! codes of values               [kv_heads, P / 8, bytes, 8]       the last index that of the position
//! ```
//!
//! A group is 128 features ([`HeadCodes`]), and the codes are those of the processor. What they stand for is rounded to BF16 when it is read.

use super::attention::{Cache, Heads, Sequences};
use super::{Argument, Error, Gpu, Launch, Result, View, size32};
use crate::cpu::HeadCodes;

/// Warps of a block, each with a head.
const WARPS: u32 = 4;

/// What a cache's codes are.
#[derive(Clone, Copy, Debug)]
pub struct Codes<'a> {
    /// Bits of a code: 4 or 8.
    pub bits: u8,
    /// `U32 [1]`, where a label goes if it is zero there and a key or value is NaN or infinite, or too wide a group of them; and the label.
    pub fault: Option<(View<'a>, u32)>,
}

impl Codes<'_> {
    pub(super) fn check(&self) -> Result<()> {
        if !matches!(self.bits, 4 | 8) {
            return Err(Error::Unsupported(format!("a cache of {} bits: 4 or 8 there are", self.bits)));
        }
        self.fault.map_or(Ok(()), |(fault, _)| fault.require("the fault", 4))
    }
}

/// How a head's codes lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    bits: u8,
    /// Bytes of a head's codes at a position: a multiple of 8.
    pub bytes: usize,
    /// Groups of a head.
    pub groups: usize,
}

impl Layout {
    /// Of heads of so many features, in codes of so many bits.
    #[must_use]
    pub fn new(head_dim: usize, bits: u8) -> Self {
        let bytes = if bits == 8 { head_dim } else { head_dim.div_ceil(2) };
        Self { bits, bytes: bytes.next_multiple_of(8), groups: head_dim.div_ceil(HeadCodes::GROUP) }
    }

    /// Bytes of a head at a position, scales and zero points included.
    #[must_use]
    pub fn all_bytes(self) -> usize {
        self.bytes + 5 * self.groups
    }

    /// A feature's byte among those of its head, and the lowest bit of its code in it.
    #[must_use]
    pub fn place(self, feature: usize) -> (usize, u32) {
        match feature.checked_sub(self.bytes) {
            Some(byte) if self.bits == 4 => (byte, 4),
            _ => (feature, 0),
        }
    }
}

/// Quantises keys, which are normed and turned, and values of `qkv` into the cache. Positions beyond it are left out.
pub(super) fn keep(
    gpu: &Gpu,
    heads: Heads,
    qkv: View<'_>,
    sequences: Sequences<'_>,
    cache: Cache<'_>,
    codes: Codes<'_>,
) -> Result<()> {
    let Heads { heads: query, kv_heads, head_dim } = heads;
    let (fault, label) =
        codes.fault.map_or((Argument::Pointer(0), 0), |(fault, label)| (fault.pointer(), label));
    gpu.launch(&Launch {
        file: "cache_codes",
        kernel: "keep_codes",
        grid: [size32("heads", 2 * kv_heads)?.div_ceil(WARPS), size32("tokens", sequences.tokens())?, 1],
        block: 32 * WARPS,
        shared: 0,
        arguments: &[
            qkv.pointer(),
            Argument::U32(size32("stride", (query + 2 * kv_heads) * head_dim)?),
            Argument::U32(query as u32),
            Argument::U32(kv_heads as u32),
            Argument::U32(head_dim as u32),
            Argument::U32(u32::from(codes.bits)),
            sequences.positions.pointer(),
            sequences.places.pointer(),
            Argument::U32(size32("tokens", sequences.each)?),
            cache.keys.pointer(),
            cache.values.pointer(),
            Argument::U64(cache.capacity as u64),
            fault,
            Argument::U32(label),
        ],
        overlaps: true,
    })
}
