//! A run of training between two steps, as bytes: what goes on from it ends with the same ones as a run that was never cut off.
//!
//! ```text
//! magic 4 | step u32 | key 32 | what is trained, as its pass writes it | BLAKE3 of all that, 32
//! ```
//!
//! Numbers are little-endian. `key` says of what run it is: settings, text, start.

use std::io::{Read, Write};
use std::path::Path;

use llmpress_formats::{Error, Result};

/// Values that are turned into bytes at a time.
const PIECE: usize = 1 << 14;

/// Writes or reads what goes through it, and hashes it.
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

/// What a state begins with.
#[derive(Clone, Copy, Debug)]
pub struct StateHead<'a> {
    /// What pass it is of.
    pub magic: &'a [u8; 4],
    /// What run.
    pub key: &'a [u8; 32],
}

/// Writes a state after `step` steps, whose body is what `body` writes. `path` is for errors.
///
/// # Errors
/// It cannot be written.
pub fn write_state(
    head: StateHead<'_>,
    step: u32,
    (to, path): (&mut dyn Write, &Path),
    body: &mut dyn FnMut(&mut dyn Write) -> std::io::Result<()>,
) -> Result<()> {
    let mut to = Hashing { inner: to, hasher: blake3::Hasher::new() };
    let mut write = |to: &mut Hashing<&mut dyn Write>| -> std::io::Result<()> {
        to.write_all(head.magic)?;
        to.write_all(&step.to_le_bytes())?;
        to.write_all(head.key)?;
        body(to)?;
        let digest = to.hasher.finalize();
        to.inner.write_all(digest.as_bytes())
    };
    write(&mut to).map_err(|e| Error::io(path, "write", e))
}

/// Reads a state, the body by `body`; the steps before it, or none where it is of another run, whose body is not read.
///
/// # Errors
/// A file that cannot be read, is too short, or is not what was written: what `body` has read is of no use then.
pub fn read_state(
    head: StateHead<'_>,
    (from, path): (&mut dyn Read, &Path),
    body: &mut dyn FnMut(&mut dyn Read) -> std::io::Result<()>,
) -> Result<Option<u32>> {
    let mut from = Hashing { inner: from, hasher: blake3::Hasher::new() };
    let bad = |what: &str| Error::corrupt(path, None, what.to_owned());
    let failed = |e| Error::io(path, "read", e);
    let (mut magic, mut step, mut key) = ([0u8; 4], [0u8; 4], [0u8; 32]);
    from.read_exact(&mut magic).map_err(failed)?;
    from.read_exact(&mut step).map_err(failed)?;
    from.read_exact(&mut key).map_err(failed)?;
    if magic != *head.magic {
        return Err(bad("is no state of training"));
    }
    if key != *head.key {
        return Ok(None);
    }
    body(&mut from).map_err(failed)?;
    let digest = from.hasher.finalize();
    let mut stored = [0u8; 32];
    from.inner.read_exact(&mut stored).map_err(failed)?;
    if digest.as_bytes() != &stored {
        return Err(bad("is not what was written: delete it to train from the start"));
    }
    Ok(Some(u32::from_le_bytes(step)))
}

/// Writes values.
///
/// # Errors
/// They cannot be written.
pub fn write_values(values: &[f32], to: &mut dyn Write) -> std::io::Result<()> {
    for piece in values.chunks(PIECE) {
        let bytes: Vec<u8> = piece.iter().flat_map(|x| x.to_le_bytes()).collect();
        to.write_all(&bytes)?;
    }
    Ok(())
}

/// Reads as many values as there is room for.
///
/// # Errors
/// There are fewer, or they cannot be read.
pub fn read_values(values: &mut [f32], from: &mut dyn Read) -> std::io::Result<()> {
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
