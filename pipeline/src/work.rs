//! How a unit's bytes are cut into pieces, and who works on them.
//!
//! ```text
//! unit: | piece | piece | piece | ...     all threads, or one while others do other units
//! ```

use rayon::prelude::*;

use crate::source::UnitSource;
use crate::{Progress, Result};

/// How pieces are cut and reported.
#[derive(Clone, Copy)]
pub(crate) struct Work<'a> {
    pub(crate) piece_bytes: usize,
    /// Pieces in flight.
    pub(crate) batch: usize,
    pub(crate) threads: Threads,
    pub(crate) progress: &'a dyn Progress,
}

/// Who works on the pieces of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Threads {
    /// All threads of the pool: for large units, one unit at a time.
    Pool,
    /// The calling thread alone, while others do other units. It must not wait for the pool: a waiting
    /// thread would begin another unit, and memory would no longer be bounded.
    Own,
}

impl Threads {
    pub(crate) fn hash(self, hasher: &mut blake3::Hasher, bytes: &[u8]) {
        match self {
            Self::Pool => hasher.update_rayon(bytes),
            Self::Own => hasher.update(bytes),
        };
    }

    pub(crate) fn join<A: Send, B: Send>(
        self,
        a: impl FnOnce() -> A + Send,
        b: impl FnOnce() -> B + Send,
    ) -> (A, B) {
        match self {
            Self::Pool => rayon::join(a, b),
            Self::Own => (a(), b()),
        }
    }

    /// Does `job` for every item; results come in order.
    pub(crate) fn map<T: Send, S, R: Send>(
        self,
        items: Vec<T>,
        state: impl Fn() -> S + Sync + Send,
        job: impl Fn(&mut S, T) -> Result<R> + Sync + Send,
    ) -> Result<Vec<R>> {
        match self {
            Self::Pool => items.into_par_iter().with_max_len(1).map_init(state, job).collect(),
            Self::Own => {
                let mut state = state();
                items.into_iter().map(|item| job(&mut state, item)).collect()
            }
        }
    }
}

/// Cuts a run of bytes into pieces.
pub(crate) fn pieces(bytes: u64, piece: usize) -> impl Iterator<Item = (u64, usize)> {
    let piece = piece.max(1) as u64;
    (0..bytes.div_ceil(piece)).map(move |i| (i * piece, (bytes - i * piece).min(piece) as usize))
}

/// One histogram a piece.
pub(crate) fn histograms<H: Send>(
    source: &UnitSource<'_>,
    work: Work<'_>,
    count: impl Fn(&[u16]) -> H + Sync + Send,
) -> Result<Vec<H>> {
    let all: Vec<(u64, usize)> = pieces(source.bytes(), work.piece_bytes & !1).collect();
    work.threads.map(all, Vec::<u16>::new, |words, (offset, len)| {
        words.resize(len / 2, 0);
        source.read(offset, bytemuck::cast_slice_mut(words))?;
        let histogram = count(words);
        work.progress.advance(len as u64);
        Ok(histogram)
    })
}

/// Runs `encode`, which reads a piece's words and encodes them, over batches of pieces, and `join` over each batch's results in
/// order. Results are reused as buffers.
pub(crate) fn batches_of<T: Sync, P: Default + Send>(
    all: &[T],
    work: Work<'_>,
    encode: impl Fn(usize, &T, &mut Vec<u16>, &mut P) -> Result<()> + Sync,
    mut join: impl FnMut(&[(Vec<u16>, P)]) -> Result<()>,
) -> Result<()> {
    let mut buffers: Vec<(Vec<u16>, P)> = Vec::new();
    buffers.resize_with(work.batch.min(all.len()), Default::default);
    for (number, batch) in all.chunks(work.batch).enumerate() {
        let first = number * work.batch;
        buffers.truncate(batch.len());
        let jobs = buffers.iter_mut().zip(batch).enumerate().collect();
        work.threads.map(
            jobs,
            || (),
            |(), (i, ((words, out), piece))| encode(first + i, piece, words, out),
        )?;
        join(&buffers)?;
        work.progress.advance(buffers.iter().map(|(words, _)| words.len() as u64 * 2).sum());
    }
    Ok(())
}

/// Pieces up to which a unit is left to one thread.
const SMALL_UNIT_PIECES: u64 = 64;

/// Does `job` for every item, given with its bytes of source. Large ones first, one by one, their pieces
/// in parallel; then small ones side by side, each by one thread. Either way the pieces in flight stay
/// within the budget. Results come in the order of the items.
pub(crate) fn each<T: Send, R: Send>(
    items: Vec<(u64, T)>,
    work: Work<'_>,
    job: impl Fn(T, Work<'_>) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let mut results: Vec<Option<R>> = items.iter().map(|_| None).collect();
    let limit = SMALL_UNIT_PIECES * work.piece_bytes as u64;
    let (mut small, large): (Vec<_>, Vec<_>) =
        items.into_iter().enumerate().partition(|(_, (bytes, _))| *bytes <= limit);
    for (i, (_, item)) in large {
        results[i] = Some(job(item, work)?);
    }
    // The longest first, so that threads end together.
    small.sort_by_key(|(_, (bytes, _))| std::cmp::Reverse(*bytes));
    let own = Work { batch: 2, threads: Threads::Own, ..work };
    let done: Vec<(usize, R)> = small
        .into_par_iter()
        .with_max_len(1)
        .map(|(i, (_, item))| Ok((i, job(item, own)?)))
        .collect::<Result<_>>()?;
    for (i, result) in done {
        results[i] = Some(result);
    }
    Ok(results.into_iter().flatten().collect())
}
