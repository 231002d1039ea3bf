//! Which files of a source go along with its tensors, and which stay behind.
//!
//! ```text
//! shards, index, manifest        read, and made anew
//! small ordinary files           copied
//! everything else                left behind, and named: hidden files, folders, other weights, links out of the tree
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use llmpress_formats::{
    Checkpoint, Digest, Error as FormatError, INDEX_FILE, Kind, MANIFEST_FILE, QUANTISATION_FILE,
    is_known_file, is_weights_file, read_small_file,
};

use crate::Result;
use crate::journal::RESTORED_FILE;

/// Files that are copied are small: tokenizers, templates, licences.
pub(crate) const MAX_COPIED_BYTES: u64 = 64 << 20;
/// The largest index of a source with a manifest.
const MAX_INDEX_BYTES: u64 = 1 << 30;

/// The files of a source that are not its shards.
#[derive(Debug)]
pub(crate) struct Carried {
    /// Copied, `config.json` among them: name and place.
    pub(crate) files: BTreeMap<String, PathBuf>,
    /// Made of the source's metadata: name and content.
    pub(crate) made: BTreeMap<&'static str, Vec<u8>>,
    /// Neither read nor copied.
    pub(crate) left_behind: Vec<String>,
}

/// Sorts the files of a source's directory.
pub(crate) fn carried(checkpoint: &Checkpoint) -> Result<Carried> {
    let root = checkpoint.root();
    if checkpoint.kind() == Kind::Gguf {
        // It lies among files that are not its.
        return Ok(Carried {
            files: BTreeMap::new(),
            made: checkpoint.made_files()?,
            left_behind: Vec::new(),
        });
    }
    let io = |e| FormatError::io(root, "read", e);
    let tree = Tree::of(&root.canonicalize().map_err(io)?);
    let mut carried = Carried { files: BTreeMap::new(), made: BTreeMap::new(), left_behind: Vec::new() };
    for entry in std::fs::read_dir(root).map_err(io)? {
        let path = entry.map_err(io)?.path();
        let Some(name) = path.file_name().and_then(|n| n.to_str()).map(str::to_owned) else {
            carried.left_behind.push(path.file_name().unwrap_or_default().to_string_lossy().into_owned());
            continue;
        };
        if is_read(checkpoint, &name, &path) {
            continue;
        }
        let other = name.starts_with('.')
            || is_weights_file(&name)
            // What another tool would look for is no longer there.
            || checkpoint.is_dequantised() && name == QUANTISATION_FILE
            || name.ends_with(".index.json")
            || !is_small_file(&path)?
            || !(is_known_file(&name) || tree.holds(&path));
        if other {
            carried.left_behind.push(name);
        } else {
            carried.files.insert(name, path);
        }
    }
    carried.left_behind.sort();
    Ok(carried)
}

/// Whether a file is read as a part of the checkpoint, or is what an earlier job said of it.
fn is_read(checkpoint: &Checkpoint, name: &str, path: &Path) -> bool {
    let directory = checkpoint.directory();
    let index = match checkpoint.kind() {
        Kind::HuggingFace => directory.index_file().is_some_and(|index| index == path),
        Kind::Llmpress | Kind::Dfloat11 | Kind::Gguf => name == INDEX_FILE,
    };
    name == MANIFEST_FILE
        || name == RESTORED_FILE
        || index
        || directory.shards().iter().any(|shard| shard.path() == path)
}

/// Whether it is a file, and one that is copied. A link to nothing is an error where a checkpoint needs the file.
fn is_small_file(path: &Path) -> Result<bool> {
    let known = path.file_name().and_then(|n| n.to_str()).is_some_and(is_known_file);
    match std::fs::metadata(path) {
        Ok(meta) => Ok(meta.is_file() && meta.len() <= MAX_COPIED_BYTES),
        Err(e) if known => Err(FormatError::io(path, "open", e).into()),
        Err(_) => Ok(false),
    }
}

/// The places that a source's own files lie in.
#[derive(Debug)]
struct Tree {
    root: PathBuf,
    /// Where a hub's cache keeps what the links of a snapshot point to.
    blobs: Option<PathBuf>,
}

impl Tree {
    fn of(root: &Path) -> Self {
        let snapshots = root.parent().filter(|p| p.file_name().is_some_and(|n| n == "snapshots"));
        let blobs = snapshots.and_then(Path::parent).map(|repository| repository.join("blobs"));
        Self { root: root.to_owned(), blobs }
    }

    fn holds(&self, path: &Path) -> bool {
        path.canonicalize().is_ok_and(|real| {
            real.starts_with(&self.root) || self.blobs.as_ref().is_some_and(|blobs| real.starts_with(blobs))
        })
    }
}

impl Carried {
    /// Reads a file that is copied. A source with a manifest says what it must hold.
    pub(crate) fn read(&self, checkpoint: &Checkpoint, name: &str, path: &Path) -> Result<Vec<u8>> {
        let bytes = read_small_file(path, MAX_COPIED_BYTES)?;
        check(checkpoint, name, path, &bytes)?;
        Ok(bytes)
    }

    /// Checks every file of a source with a manifest that is read or copied, but for the tensors, which are checked as
    /// they are read.
    pub(crate) fn check(&self, checkpoint: &Checkpoint) -> Result<()> {
        let Some(manifest) = checkpoint.manifest() else { return Ok(()) };
        for (name, path) in &self.files {
            self.read(checkpoint, name, path)?;
        }
        for name in manifest.files.keys().filter(|name| !self.files.contains_key(*name)) {
            let path = checkpoint.root().join(name);
            if name == INDEX_FILE {
                check(checkpoint, name, &path, &read_small_file(&path, MAX_INDEX_BYTES)?)?;
                continue;
            }
            return Err(FormatError::corrupt(
                &path,
                None,
                format!(
                    "is listed by {MANIFEST_FILE} but is no file of the directory: get a good copy of it"
                ),
            )
            .into());
        }
        for shard in checkpoint.directory().shards() {
            let name = shard.path().file_name().and_then(|n| n.to_str()).unwrap_or_default();
            if manifest.shards.get(name).is_some_and(|entry| shard.entry().is_ok_and(|e| e != *entry)) {
                return Err(changed(shard.path()));
            }
        }
        Ok(())
    }
}

fn check(checkpoint: &Checkpoint, name: &str, path: &Path, bytes: &[u8]) -> Result<()> {
    let entry = checkpoint.manifest().and_then(|m| m.files.get(name));
    match entry {
        Some(entry) if entry.blake3 != Digest::of(bytes) => Err(changed(path)),
        _ => Ok(()),
    }
}

fn changed(path: &Path) -> crate::Error {
    let what = format!("is not what {MANIFEST_FILE} says of it: get a good copy of the directory");
    FormatError::corrupt(path, None, what).into()
}
