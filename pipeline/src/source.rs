//! The files of a source, and reading a unit's tensors from it.
//!
//! ```text
//! unit: | tensor 0 | tensor 1 | ... |      one run of bytes, read in pieces
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use llmpress_formats::{
    Checkpoint, Digest, FileEntry, INDEX_FILE, Kind, MANIFEST_FILE, Source, read_small_file,
};

use crate::carried::Carried;
use crate::{Error, Result};

/// The largest manifest or index of a source.
const MAX_READ_BYTES: u64 = 1 << 30;

/// The files that a conversion reads, by name: shards, index, and everything that is copied.
pub(crate) fn files(checkpoint: &Checkpoint, carried: &Carried) -> BTreeMap<String, PathBuf> {
    let mut files = carried.files.clone();
    let directory = checkpoint.directory();
    let mut read: Vec<PathBuf> = directory.shards().iter().map(|s| s.path().to_owned()).collect();
    read.extend(directory.index_file().map(Path::to_owned));
    if checkpoint.kind() != Kind::HuggingFace {
        read.extend([INDEX_FILE, MANIFEST_FILE].map(|name| checkpoint.root().join(name)));
    }
    for path in read {
        if let Some(name) = path.file_name().and_then(|n| n.to_str())
            && path.exists()
        {
            files.insert(name.to_owned(), path.clone());
        }
    }
    files
}

/// What the manifest says of the source: its shards, and the digests of the other files.
pub(crate) fn describe(checkpoint: &Checkpoint, carried: &Carried) -> Result<Source> {
    let mut shards = BTreeMap::new();
    for shard in checkpoint.directory().shards() {
        let name = shard.path().file_name().and_then(|n| n.to_str()).unwrap_or_default();
        shards.insert(name.to_owned(), shard.entry()?);
    }
    let mut files = BTreeMap::new();
    for (name, path) in self::files(checkpoint, carried) {
        if !shards.contains_key(&name) {
            let bytes = read_small_file(&path, MAX_READ_BYTES)?;
            files.insert(name, FileEntry { bytes: bytes.len() as u64, blake3: Digest::of(&bytes) });
        }
    }
    Ok(Source { name: checkpoint.own_name(), kind: checkpoint.kind().name().to_owned(), shards, files })
}

/// The name of a model: that of what it was converted from, where that is known.
pub(crate) fn name_of(checkpoint: &Checkpoint) -> String {
    checkpoint.manifest().map_or_else(|| checkpoint.own_name(), |manifest| manifest.source.name.clone())
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

    pub(crate) fn checkpoint(&self) -> &'a Checkpoint {
        self.checkpoint
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.tensors.last().map_or(0, |t| t.start + t.bytes)
    }

    pub(crate) fn tensors(&self) -> &[Span] {
        &self.tensors
    }

    /// The name of its first tensor: the only one, where its encoding holds one.
    pub(crate) fn first_name(&self) -> &str {
        self.tensors.first().map(|tensor| tensor.name.as_str()).unwrap_or_default()
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
