//! Writing the tensors of a GGUF file, and proving that they are read back as the numbers that they were.
//!
//! ```text
//! rows of a tensor --read, decode--> widen, add one, interleave heads, or pack codes --> their place in the file
//! file --its reader--> the same bytes as the checkpoint's
//! ```
//!
//! Pieces are whole rows, or whole heads where their rows are interleaved: memory is bounded by them.

use std::ops::Range;
use std::os::unix::fs::FileExt;

use llmpress_formats::encoding::abq::Floats;
use llmpress_formats::encoding::ggml::pack_rows;
use llmpress_formats::{Checkpoint, Dtype, Error as FormatError, GgufLayout};
use rayon::prelude::*;

use super::begun::Begun;
use super::storage::Stored;
use crate::work::{Work, pieces};
use crate::{Error, Result};

/// More than what pads a tensor to its alignment.
const PADDING: u64 = 32;
/// Bytes that are compared at a time.
const STEP: usize = 1 << 20;

/// Some rows of a part of a tensor.
struct Piece<'a> {
    stored: &'a Stored,
    part: &'a str,
    rows: Range<u64>,
    /// Where they lie in the file.
    bytes: Range<u64>,
}

impl Piece<'_> {
    /// Bytes of the rows in the checkpoint.
    fn source_bytes(&self) -> u64 {
        let (_, cols) = self.stored.sides();
        (self.rows.end - self.rows.start) * cols * (u64::from(self.stored.dtype.bits()) / 8)
    }
}

/// Rows that cannot be cut: a head's, where heads are interleaved.
fn whole_rows(stored: &Stored) -> u64 {
    let (rows, _) = stored.sides();
    stored.placed.heads.map_or(1, |heads| rows.checked_div(heads).unwrap_or(1)).max(1)
}

/// Bytes of what cannot be cut, in the checkpoint.
pub(super) fn indivisible(stored: &Stored) -> u64 {
    let (_, cols) = stored.sides();
    let width = u64::from(stored.dtype.bits()) / 8;
    whole_rows(stored).saturating_mul(cols).saturating_mul(width)
}

/// Writes every tensor to its place, but what an earlier run has written.
pub(super) fn tensors(
    checkpoint: &Checkpoint,
    all: &[Stored],
    layout: &GgufLayout,
    skipped: usize,
    begun: &mut Begun,
    work: Work<'_>,
) -> Result<()> {
    let mut jobs = Vec::new();
    for (number, stored) in all.iter().enumerate() {
        let (rows, cols) = stored.sides();
        let part_bytes = stored.blocks.bytes(&[rows, cols]).unwrap_or(0);
        let start = layout.offset(skipped + number).unwrap_or(0);
        let of_row = part_bytes.checked_div(rows).unwrap_or(0);
        let unit = whole_rows(stored);
        let step = (work.piece_bytes as u64 / indivisible(stored).max(1)).max(1) * unit;
        for (at, part) in (0u64..).zip(&stored.placed.parts) {
            for first in (0..rows).step_by(usize::try_from(step).unwrap_or(usize::MAX)) {
                let rows = first..(first + step).min(rows);
                let offset = start + at * part_bytes + first * of_row;
                let bytes = offset..offset + (rows.end - rows.start) * of_row;
                jobs.push(Piece { stored, part, rows, bytes });
            }
        }
    }
    let (held, left): (Vec<_>, Vec<_>) = jobs.into_iter().partition(|piece| begun.holds(&piece.bytes));
    held.iter().for_each(|piece| work.progress.advance(piece.source_bytes()));
    let mut left = left.into_iter().peekable();
    while let Some(first) = left.next() {
        // Pieces that follow each other, so that their bytes are one range.
        let mut bytes = first.bytes.clone();
        let mut group = vec![first];
        while bytes.end - bytes.start < begun.group_bytes()
            && let Some(next) = left.next_if(|next| next.bytes.start < bytes.end + PADDING)
        {
            bytes.end = next.bytes.end;
            group.push(next);
        }
        let (file, path) = (&begun.file, &begun.path);
        work.threads.map(
            group,
            || (),
            |(), piece| {
                let bytes = encoded(checkpoint, &piece)?;
                let written = file.write_all_at(&bytes, piece.bytes.start);
                written.map_err(|e| FormatError::io(path, "write", e))?;
                work.progress.advance(piece.source_bytes());
                Ok(())
            },
        )?;
        begun.mark(bytes)?;
    }
    Ok(())
}

/// A piece as it lies in the file.
fn encoded(checkpoint: &Checkpoint, piece: &Piece<'_>) -> Result<Vec<u8>> {
    let stored = piece.stored;
    let (_, cols) = stored.sides();
    let count = piece.rows.end - piece.rows.start;
    let bytes = if stored.blocks.is_quantised() {
        pack_rows(&checkpoint.packed_rows(piece.part, piece.rows.clone())?, stored.blocks)?
    } else {
        let width = u64::from(stored.dtype.bits()) / 8;
        let mut bytes = vec![0; (count * cols * width) as usize];
        checkpoint.read(piece.part, piece.rows.start * cols * width, &mut bytes)?;
        let one = if stored.placed.offset_by_one { Some(1.0) } else { None };
        if stored.blocks.decoded() != stored.dtype || one.is_some() {
            let values = Floats::new(stored.dtype, bytes)?;
            values.iter().flat_map(|value| one.map_or(value, |one| value + one).to_le_bytes()).collect()
        } else {
            bytes
        }
    };
    Ok(match stored.placed.heads {
        None => bytes,
        Some(_) => interleaved(&bytes, count as usize, whole_rows(stored) as usize),
    })
}

/// The two halves of each head's rows in turn.
fn interleaved(bytes: &[u8], rows: usize, of_head: usize) -> Vec<u8> {
    let width = bytes.len() / rows.max(1);
    let from = |place: usize| place / of_head * of_head + place % of_head / 2 + place % 2 * (of_head / 2);
    (0..rows)
        .flat_map(|place| bytes.get(from(place) * width..(from(place) + 1) * width).unwrap_or_default())
        .copied()
        .collect()
}

/// Compares every tensor that was written with what a file's reader makes of it. Of norms to which one was added, the sum counts.
///
/// # Errors
/// [`Error::Mismatch`] for the first that is not what it was.
pub(super) fn compare(
    checkpoint: &Checkpoint,
    all: &[Stored],
    written: &Checkpoint,
    work: Work<'_>,
) -> Result<()> {
    let parts: Vec<(&Stored, &String)> =
        all.iter().flat_map(|stored| stored.placed.parts.iter().map(move |part| (stored, part))).collect();
    if written.tensors().len() != parts.len() {
        return Err(Error::Invalid(format!(
            "{} tensors were written and {} are read again: this is a fault of llmpress, please report it",
            parts.len(),
            written.tensors().len()
        )));
    }
    let mut jobs = Vec::new();
    for (stored, part) in parts {
        let (tensor, found) = (checkpoint.tensor(part)?, written.tensor(part)?);
        if (tensor.dtype, &tensor.shape) != (found.dtype, &found.shape) {
            return Err(Error::Mismatch { unit: part.clone(), offset: 0 });
        }
        jobs.extend(pieces(tensor.bytes, STEP).map(|piece| (stored, part, piece)));
    }
    jobs.into_par_iter().with_max_len(1).try_for_each_init(
        || (vec![0u64; STEP / 8], vec![0u64; STEP / 8]),
        |(source, found), (stored, part, (offset, len))| {
            let source = &mut bytemuck::cast_slice_mut::<u64, u8>(source)[..len];
            let found = &mut bytemuck::cast_slice_mut::<u64, u8>(found)[..len];
            checkpoint.read(part, offset, source)?;
            written.read(part, offset, found)?;
            let same =
                source == found || stored.placed.offset_by_one && same_sums(stored.dtype, source, found)?;
            if !same {
                let at = source.iter().zip(found.iter()).take_while(|(a, b)| a == b).count();
                return Err(Error::Mismatch { unit: part.clone(), offset: offset + at as u64 });
            }
            work.progress.advance(len as u64);
            Ok(())
        },
    )
}

/// Whether two runs of values are the same with one added in single precision.
fn same_sums(dtype: Dtype, a: &[u8], b: &[u8]) -> Result<bool> {
    let (a, b) = (Floats::new(dtype, a)?, Floats::new(dtype, b)?);
    Ok(a.len() == b.len() && a.iter().zip(b.iter()).all(|(a, b)| (a + 1.0).to_bits() == (b + 1.0).to_bits()))
}
