//! How many threads and how large pieces fit into the memory allowed.
//!
//! ```text
//! peak = BASE + names and headers + histograms + (2 jobs pieces in flight) * (copies of a piece)
//! ```

use crate::{Error, Result};

/// What the process takes before any piece: code, tables, thread stacks, allocator slack.
const BASE: u64 = 40 << 20;
/// Memory a tensor costs in headers, plan, receipts and manifest: fixed12, which has the most components, takes 4.6 kB.
const PER_TENSOR: u64 = 5 << 10;
/// What it costs more where the source has components and a manifest, too.
const PER_COMPRESSED_TENSOR: u64 = 4 << 10;
/// Source bytes of a piece where nothing limits it: it stays in a core's second-level cache.
const PIECE: u64 = 1 << 20;
/// The smallest piece worth its overhead.
const MIN_PIECE: u64 = 256 << 10;
/// Source, encoded form, joined sections, decoded copy.
const COPIES: u64 = 4;
/// Memory of a piece's histogram, kept until its unit is surveyed.
const HISTOGRAM: u64 = 4 << 10;
/// Decoder tables and scratch of one thread when the source is itself compressed.
const DECODER: u64 = 6 << 20;

/// Threads, and bytes of source in one piece of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Worker threads.
    pub jobs: usize,
    /// Source bytes of a piece.
    pub piece_bytes: usize,
    /// What the process should need at most.
    pub peak_bytes: u64,
}

/// What a plan needs of memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Needs {
    /// The largest piece that cannot be cut further.
    pub(crate) indivisible: u64,
    /// The largest piece that is cut only where memory is short.
    pub(crate) handy: u64,
    /// Bytes of the largest unit.
    pub(crate) largest_unit: u64,
    /// How many tensors there are.
    pub(crate) tensors: u64,
    /// Whether the source must be decoded.
    pub(crate) compressed_source: bool,
}

impl Budget {
    pub(crate) fn new(needs: Needs, jobs: usize, max_memory: Option<u64>) -> Result<Self> {
        let peak = |jobs: u64, piece: u64| {
            let decoder = if needs.compressed_source { DECODER * jobs } else { 0 };
            let histograms = needs.largest_unit.div_ceil(piece) * HISTOGRAM;
            let per_tensor = PER_TENSOR + if needs.compressed_source { PER_COMPRESSED_TENSOR } else { 0 };
            BASE + needs.tensors * per_tensor + histograms + decoder + 2 * jobs * COPIES * piece
        };
        let largest = PIECE.max(needs.indivisible).max(needs.handy);
        let smallest = MIN_PIECE.max(needs.indivisible);
        for jobs in (1..=jobs.max(1) as u64).rev() {
            let mut piece = largest;
            while max_memory.is_some_and(|max| peak(jobs, piece) > max) && piece > smallest {
                piece = (piece / 2).max(smallest);
            }
            if max_memory.is_none_or(|max| peak(jobs, piece) <= max) {
                return Ok(Self {
                    jobs: jobs as usize,
                    piece_bytes: piece as usize,
                    peak_bytes: peak(jobs, piece),
                });
            }
        }
        Err(Error::Limit(format!(
            "this conversion needs at least {} MiB of memory; --max-memory allows {} MiB",
            peak(1, smallest).div_ceil(1 << 20),
            max_memory.unwrap_or_default() >> 20
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEEDS: Needs =
        Needs { indivisible: 0, handy: 0, largest_unit: 1 << 30, tensors: 300, compressed_source: false };

    #[test]
    fn memory_lowers_pieces_first_then_jobs() {
        let free = Budget::new(NEEDS, 8, None).unwrap();
        assert_eq!((free.jobs, free.piece_bytes as u64), (8, PIECE));
        let tight = Budget::new(NEEDS, 8, Some(90 << 20)).unwrap();
        assert!(tight.jobs == 8 && tight.piece_bytes < free.piece_bytes, "{tight:?}");
        let tighter = Budget::new(NEEDS, 64, Some(80 << 20)).unwrap();
        assert!(tighter.jobs < 64 && tighter.peak_bytes <= 80 << 20, "{tighter:?}");
        let error = Budget::new(NEEDS, 8, Some(16 << 20)).unwrap_err().to_string();
        assert!(error.contains("at least") && error.contains("16 MiB"), "{error}");
        let strips = Needs { indivisible: 32 << 20, ..NEEDS };
        assert_eq!(Budget::new(strips, 4, Some(500 << 20)).unwrap().jobs, 1);
        let handy = Needs { handy: 8 << 20, ..NEEDS };
        assert_eq!(Budget::new(handy, 4, None).unwrap().piece_bytes, 8 << 20);
        let cut = Budget::new(handy, 4, Some(90 << 20)).unwrap();
        assert!(cut.jobs == 4 && cut.piece_bytes < 8 << 20, "{cut:?}");
    }
}
