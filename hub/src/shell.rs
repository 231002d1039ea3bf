//! A directory that opens like the checkpoint: small files, and the beginnings of files of weights.
//!
//! ```text
//! model.safetensors:  8 bytes, the length of the header | header | (nothing is written: a hole)   as long as the real file
//! ```
//!
//! Of torch's files, whose directory stands at their end, all but the storages is written ([`torch`]).
//!
//! What reads headers alone, a plan or a listing, works on it; weights read as zeros, so nothing else may.

mod torch;

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::cache::{Cache, time_of_blobs};
use crate::client::{Client, Failed, begins_at, soon};
use crate::listing::{Remote, is_torch_file};
use crate::{Error, Id, Result};

/// What is asked for of a file of weights at first: most headers, and more than whatever compares beginnings of files reads.
const BEGINNING: u64 = 256 << 10;
/// The longest header that safetensors allows.
const LONGEST_HEADER: u64 = 100_000_000;

/// The directory; it is gone when this is dropped.
#[derive(Debug)]
pub struct Shell {
    _dir: TempDir,
    path: PathBuf,
}

impl Shell {
    /// Where it lies: a path that ends in the checkpoint's name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn new(id: &Id) -> Result<Self> {
        let dir = TempDir::with_prefix("llmpress-headers-")
            .map_err(Error::io(&std::env::temp_dir(), "write to"))?;
        let path = dir.path().join(id.repository());
        std::fs::create_dir_all(&path).map_err(Error::io(&path, "create"))?;
        Ok(Self { _dir: dir, path })
    }

    /// Takes a small file of the cache.
    pub(crate) fn copy(&self, cache: &Cache, file: &Remote) -> Result<()> {
        let (from, to) = (cache.blob(&file.digest), self.path.join(&file.name));
        std::fs::copy(&from, &to).map_err(Error::io(&to, "write"))?;
        date(&from, &File::options().write(true).open(&to).map_err(Error::io(&to, "open"))?, &to)
    }

    /// Takes what tells the tensors of a file of weights.
    pub(crate) fn begin(&self, client: &Client, cache: &Cache, file: &Remote) -> Result<()> {
        let path = self.path.join(&file.name);
        let mut out = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(Error::io(&path, "create"))?;
        if is_torch_file(&file.name) {
            torch::fill(client, file, &out, &path)?;
            return date(&cache.blob(&file.digest), &out, &path);
        }
        let mut bytes = part(client, file, 0, BEGINNING.min(file.bytes))?;
        if let Some(length) = bytes.first_chunk::<8>().map(|length| u64::from_le_bytes(*length)) {
            let end = length.saturating_add(8);
            let have = bytes.len() as u64;
            // What is no header is left to whoever opens it.
            if length <= LONGEST_HEADER && end <= file.bytes && end > have {
                bytes.extend(part(client, file, have, end)?);
            }
        }
        out.write_all(&bytes).map_err(Error::io(&path, "write"))?;
        out.set_len(file.bytes).map_err(Error::io(&path, "lengthen"))?;
        date(&cache.blob(&file.digest), &out, &path)
    }
}

/// Gives a file the time of the blob that it stands for, or that this would have.
fn date(blob: &Path, file: &File, path: &Path) -> Result<()> {
    let time = std::fs::metadata(blob).and_then(|meta| meta.modified()).unwrap_or_else(|_| time_of_blobs());
    file.set_modified(time).map_err(Error::io(path, "date"))
}

/// Some bytes of a file.
fn part(client: &Client, file: &Remote, from: u64, to: u64) -> Result<Vec<u8>> {
    if from == to {
        return Ok(Vec::new());
    }
    client.persist(&file.url, || {
        let answer = client.ask(&file.url, from, Some(to)).map_err(|e| (e, false))?;
        let Some(start) = begins_at(&answer).filter(|start| *start <= from) else {
            let why = "the hub gives other bytes than asked for".to_owned();
            return Err((Failed::Soon { why, wait: None }, false));
        };
        let mut reader = answer.into_body().into_reader();
        // A server that knows no ranges sends what is before, too.
        let skipped = std::io::copy(&mut (&mut reader).take(from - start), &mut std::io::sink());
        skipped.map_err(|e| (soon(&e), false))?;
        let mut bytes = Vec::new();
        (&mut reader).take(to - from).read_to_end(&mut bytes).map_err(|e| (soon(&e), false))?;
        match bytes.len() as u64 == to - from {
            true => Ok(bytes),
            false => {
                Err((Failed::Soon { why: "the connection ended too early".to_owned(), wait: None }, false))
            }
        }
    })
}
