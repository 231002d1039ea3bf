//! A run between two steps, as bytes: what goes on from it ends with the same ones as a run that was never cut off.
//!
//! ```text
//! "AST1" | step u32 | key 32 | matrices: masks, W, m, v, S, m, v | norms: w, m, v | BLAKE3 of all that, 32
//! ```
//!
//! Numbers are little-endian. `key` says of what run it is: settings, text, start.

use std::io::{Read, Write};
use std::path::Path;

use llmpress_formats::{Error, Result};

use super::trainer::Trainer;

const MAGIC: &[u8; 4] = b"AST1";
/// Values that are turned into bytes at a time.
const PIECE: usize = 1 << 14;

/// Writes what goes through it, and hashes it.
struct Hashing<T> {
    inner: T,
    hasher: blake3::Hasher,
}

impl Write for Hashing<&mut dyn Write> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

impl Read for Hashing<&mut dyn Read> {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(bytes)?;
        self.hasher.update(&bytes[..count]);
        Ok(count)
    }
}

impl Trainer<'_> {
    /// Writes it. `path` is for errors.
    pub(super) fn save(&self, key: &[u8; 32], to: &mut dyn Write, path: &Path) -> Result<()> {
        let mut to = Hashing { inner: to, hasher: blake3::Hasher::new() };
        let write = |to: &mut Hashing<&mut dyn Write>| -> std::io::Result<()> {
            to.write_all(MAGIC)?;
            to.write_all(&self.step.to_le_bytes())?;
            to.write_all(key)?;
            for matrix in self.student.matrices() {
                to.write_all(&matrix.masks)?;
                let all = [&matrix.dense, &matrix.first, &matrix.second];
                let sums = [&matrix.sums, &matrix.sums_first, &matrix.sums_second];
                all.into_iter().chain(sums).try_for_each(|values| write_values(values, to))?;
            }
            for norm in self.student.vectors() {
                [&norm.values, &norm.first, &norm.second]
                    .into_iter()
                    .try_for_each(|values| write_values(values, to))?;
            }
            let digest = to.hasher.finalize();
            to.inner.write_all(digest.as_bytes())
        };
        write(&mut to).map_err(|e| Error::io(path, "write", e))
    }

    /// Takes it up; false where it is of another run.
    ///
    /// # Errors
    /// A file that cannot be read, is too short, or is not what was written.
    pub(super) fn load(&mut self, key: &[u8; 32], from: &mut dyn Read, path: &Path) -> Result<bool> {
        let mut from = Hashing { inner: from, hasher: blake3::Hasher::new() };
        let bad = |what: &str| Error::corrupt(path, None, what.to_owned());
        let failed = |e| Error::io(path, "read", e);
        let mut head = [0u8; 40];
        from.read_exact(&mut head).map_err(failed)?;
        let (magic, rest) = head.split_at(4);
        let (step, found) = rest.split_at(4);
        if magic != MAGIC {
            return Err(bad("is no state of training"));
        }
        if found != key {
            return Ok(false);
        }
        let mut number = [0u8; 4];
        number.copy_from_slice(step);
        let mut read = || -> std::io::Result<()> {
            for matrix in self.student.matrices_mut() {
                from.read_exact(&mut matrix.masks)?;
                let all = [&mut matrix.dense, &mut matrix.first, &mut matrix.second];
                let sums = [&mut matrix.sums, &mut matrix.sums_first, &mut matrix.sums_second];
                all.into_iter().chain(sums).try_for_each(|values| read_values(values, &mut from))?;
            }
            for norm in self.student.vectors_mut() {
                [&mut norm.values, &mut norm.first, &mut norm.second]
                    .into_iter()
                    .try_for_each(|values| read_values(values, &mut from))?;
            }
            Ok(())
        };
        read().map_err(failed)?;
        let digest = from.hasher.finalize();
        let mut stored = [0u8; 32];
        from.inner.read_exact(&mut stored).map_err(failed)?;
        let masks = self.student.matrices().flat_map(|matrix| &matrix.masks);
        if digest.as_bytes() != &stored || masks.into_iter().any(|mask| mask.count_ones() != 2 || *mask > 15)
        {
            return Err(bad("is not what was written: delete it to train from the start"));
        }
        self.step = u32::from_le_bytes(number);
        self.see();
        Ok(true)
    }
}

fn write_values(values: &[f32], to: &mut dyn Write) -> std::io::Result<()> {
    for piece in values.chunks(PIECE) {
        let bytes: Vec<u8> = piece.iter().flat_map(|x| x.to_le_bytes()).collect();
        to.write_all(&bytes)?;
    }
    Ok(())
}

fn read_values(values: &mut [f32], from: &mut dyn Read) -> std::io::Result<()> {
    let mut bytes = vec![0u8; 4 * PIECE.min(values.len())];
    for piece in values.chunks_mut(PIECE) {
        let bytes = &mut bytes[..4 * piece.len()];
        from.read_exact(bytes)?;
        for (value, bytes) in piece.iter_mut().zip(bytes.chunks_exact(4)) {
            let mut four = [0u8; 4];
            four.copy_from_slice(bytes);
            *value = f32::from_le_bytes(four);
        }
    }
    Ok(())
}
