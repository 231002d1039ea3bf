//! `planes`: byte planes of any dtype through zstd, in chunks of 2^18 elements.
//!
//! ```text
//! <tensor>.planes    U8 [B]              chunk after chunk, plane after plane within a chunk
//! <tensor>.lengths   U8 [chunks, w, 4]   u32 stored length of each plane; raw length = stored as is
//! ```

use llmpress_entropy::planes::{CHUNK_ELEMENTS, Decoder};

use super::{ComponentSet, ComponentSpec, Part, single};
use crate::{Component, Dtype, Error, Result};

/// The frames.
pub const PLANES: &str = "planes";
/// Their lengths.
pub const LENGTHS: &str = "lengths";

/// How the bytes of a dtype are cut into planes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Split {
    /// Bytes an element, which is the number of planes.
    pub width: usize,
    /// Whether elements are rotated left by one bit first, so that the sign leaves the exponent's
    /// byte.
    pub rotate: bool,
}

/// The split for a dtype. Types narrower than a byte, and complex numbers, are cut as bytes.
pub fn split(dtype: Dtype) -> Split {
    let rotate = matches!(dtype, Dtype::F16 | Dtype::BF16 | Dtype::F32 | Dtype::F64);
    let width = match dtype.bits() {
        16 => 2,
        32 => 4,
        64 if dtype != Dtype::C64 => 8,
        64 => 4,
        _ => 1,
    };
    Split { width, rotate }
}

/// Number of chunks of a tensor of `bytes` bytes.
pub fn chunks(bytes: u64, width: usize) -> u64 {
    bytes.div_ceil((CHUNK_ELEMENTS * width) as u64)
}

/// The components of a tensor whose frames take `stored` bytes.
pub fn components(bytes: u64, width: usize, stored: u64) -> Vec<ComponentSpec> {
    vec![
        ComponentSpec { name: PLANES, dtype: Dtype::U8, shape: vec![stored] },
        ComponentSpec { name: LENGTHS, dtype: Dtype::U8, shape: vec![chunks(bytes, width), width as u64, 4] },
    ]
}

/// Reads any bytes of what was coded so.
#[derive(Debug)]
pub(super) struct Reader {
    data: Component,
    split: Split,
    bytes: u64,
    lengths: Vec<u32>,
    /// Start of each chunk in the frames, and their end.
    starts: Vec<u64>,
}

impl Reader {
    pub(super) fn open(set: ComponentSet<'_>, parts: &[Part], rotate: bool) -> Result<Self> {
        let part = single(&set, parts)?;
        let split = Split { rotate, ..split(part.dtype) };
        if part.bytes % split.width as u64 != 0 {
            return Err(Error::Invalid(format!("tensor {}: not a whole number of elements", part.name)));
        }
        Self::new(set.get(PLANES)?, &set.get(LENGTHS)?, part.bytes, split)
    }

    /// Of `bytes` bytes whose frames are `data`, of these lengths.
    pub(super) fn new(data: Component, table: &Component, bytes: u64, split: Split) -> Result<Self> {
        let chunks = chunks(bytes, split.width);
        table.require(Dtype::U8, chunks.saturating_mul(4 * split.width as u64))?;
        let lengths: Vec<u32> =
            bytemuck::allocation::pod_collect_to_vec(&table.read_all(u64::from(u32::MAX))?);
        let mut starts = Vec::with_capacity(lengths.len() / split.width + 1);
        let mut at = 0u64;
        starts.push(at);
        for chunk in lengths.chunks_exact(split.width) {
            at += chunk.iter().map(|&l| u64::from(l)).sum::<u64>();
            starts.push(at);
        }
        data.require(Dtype::U8, at)?;
        Ok(Self { data, split, bytes, lengths, starts })
    }

    /// The frames.
    pub(super) fn data(&self) -> &Component {
        &self.data
    }

    pub(super) fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let chunk_bytes = CHUNK_ELEMENTS * self.split.width;
        let end = offset
            .checked_add(out.len() as u64)
            .filter(|&end| end <= self.bytes)
            .ok_or_else(|| Error::Invalid(format!("tensor {}: range past the end", self.data.name())))?;
        let mut decoder = Decoder::new();
        let (mut stored, mut scratch) = (Vec::new(), Vec::new());
        let mut rest = out;
        let mut at = offset;
        while at < end {
            let chunk = (at / chunk_bytes as u64) as usize;
            let chunk_start = chunk as u64 * chunk_bytes as u64;
            let chunk_len = (self.bytes - chunk_start).min(chunk_bytes as u64) as usize;
            let skip = (at - chunk_start) as usize;
            let take = (chunk_len - skip).min(rest.len());
            let (now, later) = rest.split_at_mut(take);
            rest = later;
            let lengths = &self.lengths[chunk * self.split.width..(chunk + 1) * self.split.width];
            let raw_plane = (chunk_len / self.split.width) as u32;
            if lengths.iter().any(|&l| l > raw_plane) {
                return Err(self.data.corrupt(format!("chunk {chunk}: a plane is longer than its elements")));
            }
            stored.resize((self.starts[chunk + 1] - self.starts[chunk]) as usize, 0);
            self.data.read_at(self.starts[chunk], &mut stored)?;
            let corrupt = |e: llmpress_entropy::Error| self.data.corrupt(format!("chunk {chunk}: {e}"));
            let Split { width, rotate } = self.split;
            if take == chunk_len {
                decoder.decode_chunk(width, rotate, lengths, &stored, now).map_err(corrupt)?;
            } else {
                scratch.resize(chunk_len, 0);
                decoder.decode_chunk(width, rotate, lengths, &stored, &mut scratch).map_err(corrupt)?;
                now.copy_from_slice(&scratch[skip..skip + take]);
            }
            at += take as u64;
        }
        Ok(())
    }
}
