//! Chunks of 2^18 elements, one after the other in a component, and their lengths in another.

use llmpress_entropy::archive::CHUNK_ELEMENTS;

use super::ComponentSet;
use crate::{Component, Dtype, Error, Result};

/// The chunks.
pub const CHUNKS: &str = "chunks";
/// Their lengths.
pub const LENGTHS: &str = "lengths";

/// Where each chunk of a tensor's elements is.
#[derive(Debug)]
pub(super) struct Chunked {
    chunks: Component,
    elements: u64,
    /// Start of each chunk, and their end.
    starts: Vec<u64>,
}

impl Chunked {
    /// Reads the lengths.
    pub(super) fn open(set: &ComponentSet<'_>, elements: u64) -> Result<Self> {
        let chunks = set.get(CHUNKS)?;
        let table = set.get(LENGTHS)?;
        table.require(Dtype::U8, elements.div_ceil(CHUNK_ELEMENTS as u64) * 4)?;
        let lengths: Vec<u32> =
            bytemuck::allocation::pod_collect_to_vec(&table.read_all(u64::from(u32::MAX))?);
        let mut starts = Vec::with_capacity(lengths.len() + 1);
        let mut at = 0u64;
        starts.push(at);
        for length in lengths {
            at += u64::from(length);
            starts.push(at);
        }
        chunks.require(Dtype::U8, at)?;
        Ok(Self { chunks, elements, starts })
    }

    /// Decodes elements `first..`. `decode` is given the number of a chunk's first element, its stored bytes, and room for all of its elements.
    pub(super) fn words(
        &self,
        first: u64,
        out: &mut [u16],
        mut decode: impl FnMut(u64, &[u8], &mut [u16]) -> Result<(), Fault>,
    ) -> Result<()> {
        let end = first.checked_add(out.len() as u64).filter(|&end| end <= self.elements);
        let end =
            end.ok_or_else(|| Error::Invalid(format!("tensor {}: range past the end", self.chunks.name())))?;
        let (mut stored, mut whole) = (Vec::new(), Vec::new());
        let (mut rest, mut at) = (out, first);
        while at < end {
            let chunk = (at / CHUNK_ELEMENTS as u64) as usize;
            let start = chunk as u64 * CHUNK_ELEMENTS as u64;
            let elements = (self.elements - start).min(CHUNK_ELEMENTS as u64) as usize;
            let skip = (at - start) as usize;
            let take = (elements - skip).min(rest.len());
            let (now, later) = rest.split_at_mut(take);
            rest = later;
            let &[from, to] = self.starts.get(chunk..chunk + 2).unwrap_or_default() else {
                return Err(self.chunks.corrupt(format!("chunk {chunk} is missing")));
            };
            // No chunk is larger than its elements at four bytes each, and what every chunk has.
            if to - from > elements as u64 * 4 + 1024 {
                return Err(self.chunks.corrupt(format!("chunk {chunk}: {} bytes", to - from)));
            }
            stored.resize((to - from) as usize, 0);
            self.chunks.read_at(from, &mut stored)?;
            let fault = |fault| match fault {
                Fault::Chunk(e) => self.chunks.corrupt(format!("chunk {chunk}: {e}")),
                Fault::Other(e) => e,
            };
            if take == elements {
                decode(start, &stored, now).map_err(fault)?;
            } else {
                whole.resize(elements, 0);
                decode(start, &stored, &mut whole).map_err(fault)?;
                now.copy_from_slice(whole.get(skip..skip + take).unwrap_or_default());
            }
            at += take as u64;
        }
        Ok(())
    }
}

/// Why a chunk was not decoded.
pub(super) enum Fault {
    /// It breaks its format.
    Chunk(llmpress_entropy::Error),
    /// What else it takes cannot be read.
    Other(Error),
}

impl From<llmpress_entropy::Error> for Fault {
    fn from(error: llmpress_entropy::Error) -> Self {
        Self::Chunk(error)
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}
