//! The files of a source, and reading a unit's tensors from it.
//!
//! ```text
//! unit: | tensor 0 | tensor 1 | ... |      one run of bytes, read in pieces
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use llmpress_formats::{
    Checkpoint, Digest, Error as FormatError, FileEntry, INDEX_FILE, MANIFEST_FILE, Source, read_small_file,
};

use crate::{Error, Result};

/// Weights in other formats: not read and not copied.
const FOREIGN_WEIGHTS: [&str; 12] =
    ["bin", "ckpt", "gguf", "ggml", "h5", "msgpack", "npz", "onnx", "ot", "pt", "pth", "safetensors"];

/// Files that are copied are small: tokenizers, templates, licences.
pub(crate) const MAX_COPIED_BYTES: u64 = 64 << 20;
/// The largest manifest or index of a source.
const MAX_READ_BYTES: u64 = 1 << 30;

/// The files that a conversion reads, by name: shards, index, and everything that is copied.
pub(crate) fn files(checkpoint: &Checkpoint) -> Result<BTreeMap<String, PathBuf>> {
    let mut files: BTreeMap<String, PathBuf> = copied(checkpoint.root())?.0;
    let shards = checkpoint.directory().shards().iter().map(|s| s.path().to_owned());
    for path in shards.chain([checkpoint.root().join(INDEX_FILE), checkpoint.root().join(MANIFEST_FILE)]) {
        if let Some(name) = path.file_name().and_then(|n| n.to_str())
            && path.exists()
        {
            files.insert(name.to_owned(), path.clone());
        }
    }
    Ok(files)
}

/// The files that are carried over (`config.json` among them), and the names of what is left behind.
pub(crate) fn copied(root: &Path) -> Result<(BTreeMap<String, PathBuf>, Vec<String>)> {
    let io = |e| FormatError::io(root, "read", e);
    let (mut files, mut left) = (BTreeMap::new(), Vec::new());
    for entry in std::fs::read_dir(root).map_err(io)? {
        let path = entry.map_err(io)?.path();
        let Some(name) = path.file_name().and_then(|n| n.to_str()).map(str::to_owned) else {
            left.push(path.display().to_string());
            continue;
        };
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
        let weights = FOREIGN_WEIGHTS.contains(&extension);
        if name == MANIFEST_FILE || name.ends_with(".index.json") || extension == "safetensors" {
            continue;
        }
        let meta = std::fs::metadata(&path).map_err(|e| FormatError::io(&path, "read", e))?;
        if name.starts_with('.') || weights || !meta.is_file() || meta.len() > MAX_COPIED_BYTES {
            left.push(name);
        } else {
            files.insert(name, path);
        }
    }
    left.sort();
    Ok((files, left))
}

/// What the manifest says of the source: its shards, and the digests of the other files.
pub(crate) fn describe(checkpoint: &Checkpoint) -> Result<Source> {
    let mut shards = BTreeMap::new();
    for shard in checkpoint.directory().shards() {
        let name = shard.path().file_name().and_then(|n| n.to_str()).unwrap_or_default();
        shards.insert(name.to_owned(), shard.entry()?);
    }
    let mut files = BTreeMap::new();
    for (name, path) in self::files(checkpoint)? {
        if !shards.contains_key(&name) {
            let bytes = read_small_file(&path, MAX_READ_BYTES)?;
            files.insert(name, FileEntry { bytes: bytes.len() as u64, blake3: Digest::of(&bytes) });
        }
    }
    let root = checkpoint.root().canonicalize().ok();
    Ok(Source {
        name: root.as_deref().and_then(|r| r.file_name()?.to_str()).unwrap_or("checkpoint").to_owned(),
        kind: checkpoint.kind().name().to_owned(),
        shards,
        files,
    })
}

/// The tensors of a unit as one run of bytes.
#[derive(Debug)]
pub(crate) struct UnitSource<'a> {
    checkpoint: &'a Checkpoint,
    tensors: Vec<Span>,
}

#[derive(Debug)]
pub(crate) struct Span {
    pub(crate) name: String,
    pub(crate) start: u64,
    pub(crate) bytes: u64,
}

impl<'a> UnitSource<'a> {
    pub(crate) fn new(checkpoint: &'a Checkpoint, names: &[String]) -> Result<Self> {
        let mut start = 0;
        let mut tensors = Vec::with_capacity(names.len());
        for name in names {
            let bytes = checkpoint.tensor(name)?.bytes;
            tensors.push(Span { name: name.clone(), start, bytes });
            start += bytes;
        }
        Ok(Self { checkpoint, tensors })
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.tensors.last().map_or(0, |t| t.start + t.bytes)
    }

    pub(crate) fn tensors(&self) -> &[Span] {
        &self.tensors
    }

    /// Fills `out` from `offset` bytes into the unit.
    pub(crate) fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let end = offset + out.len() as u64;
        if end > self.bytes() {
            return Err(Error::Invalid(format!("bytes {offset} to {end} of {} asked for", self.bytes())));
        }
        let first = self.tensors.partition_point(|t| t.start + t.bytes <= offset);
        let mut rest = out;
        let mut at = offset;
        for tensor in &self.tensors[first..] {
            if rest.is_empty() {
                break;
            }
            let skip = at - tensor.start;
            let take = (tensor.bytes - skip).min(rest.len() as u64);
            let (now, later) = rest.split_at_mut(take as usize);
            rest = later;
            self.checkpoint.read(&tensor.name, skip, now)?;
            at += take;
        }
        Ok(())
    }
}
