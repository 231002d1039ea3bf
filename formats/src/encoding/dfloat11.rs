//! `dfloat11`: the published format, one Huffman code for all exponents of a unit.
//!
//! ```text
//! <unit>.luts               U8  [R + 1, 256]   decoding tables, then the code length of each exponent
//! <unit>.encoded_exponent   U8  [B]            the bit stream
//! <unit>.sign_mantissa      U8  [N]            one byte a weight
//! <unit>.output_positions   U8  [4 (nb + 1)]   u32 number of the first symbol of each 4096-byte block, then N
//! <unit>.gaps               U8  [320 nb]       5 bits per 8-byte window: where its first code starts
//! <unit>.split_positions    I64 [k - 1]        where each tensor but the last ends in the unit
//! ```

use std::sync::OnceLock;

use llmpress_entropy::dfloat8;
use llmpress_entropy::dfloat11::{BLOCK_BYTES, BLOCK_GAP_BYTES, Code, Layout, Span, decode_span};

use super::{ComponentSet, ComponentSpec, Part, require_bf16};
use crate::{Component, Dtype, Error, Result};

/// The decoding tables.
pub const LUTS: &str = "luts";
/// The bit stream.
pub const ENCODED_EXPONENT: &str = "encoded_exponent";
/// Sign and mantissa bytes.
pub const SIGN_MANTISSA: &str = "sign_mantissa";
/// First symbol of each block.
pub const OUTPUT_POSITIONS: &str = "output_positions";
/// First code of each window.
pub const GAPS: &str = "gaps";
/// Ends of the unit's tensors.
pub const SPLIT_POSITIONS: &str = "split_positions";

/// All of them.
pub const COMPONENTS: [&str; 6] =
    [LUTS, ENCODED_EXPONENT, SIGN_MANTISSA, OUTPUT_POSITIONS, GAPS, SPLIT_POSITIONS];

/// Most lookup rows the format can address, and the row of lengths.
const MAX_LUT_BYTES: u64 = 18 * 256;

/// Blocks decoded at a time: bounds the scratch memory to a few MiB.
const BATCH_BLOCKS: usize = 64;

/// The components of a unit with `tensors` tensors.
pub fn components(layout: &Layout, luts_bytes: u64, tensors: u64) -> Vec<ComponentSpec> {
    let u8s = |name, shape| ComponentSpec { name, dtype: Dtype::U8, shape };
    vec![
        u8s(LUTS, vec![luts_bytes / 256, 256]),
        u8s(ENCODED_EXPONENT, vec![layout.encoded_exponent_bytes]),
        u8s(SIGN_MANTISSA, vec![layout.elements]),
        u8s(OUTPUT_POSITIONS, vec![layout.output_positions_bytes()]),
        u8s(GAPS, vec![layout.gaps_bytes()]),
        ComponentSpec { name: SPLIT_POSITIONS, dtype: Dtype::I64, shape: vec![tensors.saturating_sub(1)] },
    ]
}

/// `split_positions` of tensors with these element counts.
pub fn split_positions(elements: impl IntoIterator<Item = u64>) -> Vec<i64> {
    let mut ends: Vec<i64> = elements
        .into_iter()
        .scan(0i64, |sum, n| {
            *sum = sum.saturating_add_unsigned(n);
            Some(*sum)
        })
        .collect();
    ends.pop();
    ends
}

/// Reads `split_positions`, refusing what does not ascend from 0 to `elements`.
pub(crate) fn read_split_positions(component: &Component, elements: u64) -> Result<Vec<u64>> {
    component.require(Dtype::I64, component.bytes / 8 * 8)?;
    let ends: Vec<i64> = bytemuck::allocation::pod_collect_to_vec(&component.read_all(1 << 24)?);
    let mut last = 0;
    for &end in &ends {
        if end < last || end as u64 > elements {
            return Err(component.corrupt(format!("{ends:?} does not ascend from 0 to {elements}")));
        }
        last = end;
    }
    Ok(ends.into_iter().map(|end| end as u64).collect())
}

#[derive(Debug)]
pub(super) struct Reader {
    elements: u64,
    /// Whether signs and mantissas take half a byte each ([`super::dfloat8`]).
    halves: bool,
    luts: Component,
    encoded: Component,
    sign_mantissa: Component,
    output_positions: Component,
    gaps: Component,
    tables: OnceLock<Tables>,
}

/// What decoding needs at hand; built at the first read.
#[derive(Debug)]
struct Tables {
    code: Code,
    positions: Vec<u32>,
}

impl Reader {
    pub(super) fn open(set: ComponentSet<'_>, parts: &[Part]) -> Result<Self> {
        require_bf16(&set, parts)?;
        let reader = Self::of(&set, parts.iter().map(|p| p.bytes / 2).sum::<u64>(), false)?;
        let splits = read_split_positions(&set.get(SPLIT_POSITIONS)?, reader.elements)?;
        let expected = split_positions(parts.iter().map(|p| p.bytes / 2));
        if !splits.iter().copied().eq(expected.iter().map(|&e| e as u64)) {
            return Err(set
                .get(SPLIT_POSITIONS)?
                .corrupt(format!("is {splits:?} where the shapes of the unit's tensors give {expected:?}")));
        }
        Ok(reader)
    }

    /// Of the components that hold so many weights.
    pub(super) fn of(set: &ComponentSet<'_>, elements: u64, halves: bool) -> Result<Self> {
        let reader = Self {
            elements,
            halves,
            luts: set.get(LUTS)?,
            encoded: set.get(ENCODED_EXPONENT)?,
            sign_mantissa: set.get(SIGN_MANTISSA)?,
            output_positions: set.get(OUTPUT_POSITIONS)?,
            gaps: set.get(GAPS)?,
            tables: OnceLock::new(),
        };
        reader.sign_mantissa.require(Dtype::U8, if halves { elements.div_ceil(2) } else { elements })?;
        reader.encoded.require(Dtype::U8, reader.encoded.bytes)?;
        // A last code that ends on the edge of a block: official files lack the entry of the block
        // that holds only tail bits.
        let blocks = reader.gaps.bytes / BLOCK_GAP_BYTES as u64;
        let needed = reader.encoded.bytes.div_ceil(BLOCK_BYTES as u64);
        if blocks != needed && blocks + 1 != needed {
            return Err(reader.gaps.corrupt(format!(
                "describes {blocks} blocks where the bit stream of {} bytes has {needed}",
                reader.encoded.bytes
            )));
        }
        reader.gaps.require(Dtype::U8, blocks * BLOCK_GAP_BYTES as u64)?;
        // Official files lack an entry where the last code crosses the edge of a block and ends on a byte.
        if reader.output_positions.bytes != 4 * blocks {
            reader.output_positions.require(Dtype::U8, 4 * (blocks + 1))?;
        }
        Ok(reader)
    }

    fn tables(&self) -> Result<&Tables> {
        if let Some(tables) = self.tables.get() {
            return Ok(tables);
        }
        let code = Code::from_luts(&self.luts.read_all(MAX_LUT_BYTES)?)
            .map_err(|e| self.luts.corrupt(e.to_string()))?;
        if self.halves && !dfloat8::fits(&code) {
            return Err(self.luts.corrupt("has codes of exponents that FP8 does not have".to_owned()));
        }
        let mut positions: Vec<u32> =
            bytemuck::allocation::pod_collect_to_vec(&self.output_positions.read_all(u64::from(u32::MAX))?);
        if positions.len() as u64 == self.gaps.bytes / BLOCK_GAP_BYTES as u64 {
            positions.push(self.elements as u32);
        }
        let ascends = positions.is_sorted();
        let ends = (positions.first().copied(), positions.last().map(|&p| u64::from(p)));
        if !ascends || ends != (Some(0), Some(self.elements)) {
            return Err(self.output_positions.corrupt(format!(
                "must ascend from 0 to {}; it runs from {:?} to {:?}{}",
                self.elements,
                ends.0,
                ends.1,
                if ascends { "" } else { " and descends in between" }
            )));
        }
        Ok(self.tables.get_or_init(|| Tables { code, positions }))
    }

    pub(super) fn read(&self, first: u64, out: &mut [u16]) -> Result<()> {
        let end =
            first.checked_add(out.len() as u64).filter(|&end| end <= self.elements).ok_or_else(|| {
                Error::Invalid(format!("unit of {}: range past the end", self.sign_mantissa.name()))
            })?;
        let Tables { code, positions } = self.tables()?;
        let blocks = positions.len() - 1;
        let mut block = positions.partition_point(|&p| u64::from(p) <= first).saturating_sub(1).min(blocks);
        let (mut encoded, mut gaps) = (Vec::new(), Vec::new());
        let (mut sign_mantissa, mut halves) = (Vec::new(), Vec::new());
        let mut at = first;
        let mut rest = out;
        while at < end {
            let mut to = block;
            while to < blocks && to - block < BATCH_BLOCKS && u64::from(positions[to]) < end {
                to += 1;
            }
            let (from_symbol, to_symbol) = (u64::from(positions[block]), u64::from(positions[to]));
            let bits_from = (block * BLOCK_BYTES) as u64;
            // The last code may run up to 31 bits past the last block; the final block runs to the end.
            let bits_to = if to == blocks {
                self.encoded.bytes
            } else {
                self.encoded.bytes.min((to * BLOCK_BYTES) as u64 + 8)
            };
            // A block of 4096 bytes starts at most 32,768 symbols.
            let most = ((to - block) * BLOCK_BYTES * 8) as u64;
            if to == block || to_symbol - from_symbol > most || bits_to < bits_from {
                return Err(self.output_positions.corrupt(format!(
                    "blocks {block} to {to} claim symbols {from_symbol} to {to_symbol}; a block starts at most 32768"
                )));
            }
            encoded.resize((bits_to - bits_from) as usize, 0);
            self.encoded.read_at(bits_from, &mut encoded)?;
            gaps.resize((to - block) * BLOCK_GAP_BYTES, 0);
            self.gaps.read_at((block * BLOCK_GAP_BYTES) as u64, &mut gaps)?;
            let symbols = (to_symbol - from_symbol) as usize;
            if self.halves {
                let bytes = from_symbol / 2..to_symbol.div_ceil(2);
                halves.resize((bytes.end - bytes.start) as usize, 0);
                self.sign_mantissa.read_at(bytes.start, &mut halves)?;
                dfloat8::unpack(&halves, (from_symbol % 2) as usize, symbols, &mut sign_mantissa);
            } else {
                sign_mantissa.resize(symbols, 0);
                self.sign_mantissa.read_at(from_symbol, &mut sign_mantissa)?;
            }
            let span = Span {
                encoded_exponent: &encoded,
                gaps: &gaps,
                output_positions: bytemuck::cast_slice(&positions[block..=to]),
                sign_mantissa: &sign_mantissa,
            };
            let take = (to_symbol.min(end) - at) as usize;
            let (now, later) = rest.split_at_mut(take);
            rest = later;
            decode_span(code, &span, (at - from_symbol) as usize, now)
                .map_err(|e| self.encoded.corrupt(format!("blocks {block} to {to}: {e}")))?;
            at += take as u64;
            block = to;
        }
        Ok(())
    }
}
