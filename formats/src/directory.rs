//! A directory of safetensors files: which tensor is where.
//!
//! ```text
//! shards (see `discovery`) --> headers --> name -> shard, tensor
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::discovery::{Discovered, Shards, discover, discover_named, discover_official, listed};
use crate::header::TensorInfo;
use crate::index::Index;
use crate::shard::ShardFile;
use crate::{Error, Result};

/// The tensors of a directory, by name.
#[derive(Debug)]
pub struct Directory {
    root: PathBuf,
    shards: Vec<ShardFile>,
    /// Number of the shard, and of the tensor in it; sorted by the tensors' names.
    tensors: Vec<(u32, u32)>,
    index_file: Option<PathBuf>,
    left_out: Vec<String>,
}

impl Directory {
    /// Opens the shards of a checkpoint, as transformers chooses them, and checks that an index agrees with them.
    pub fn open(root: &Path) -> Result<Self> {
        check_directory(root)?;
        Self::open_discovered(root, discover(root)?)
    }

    /// Opens the file, or the index and what it lists, that a configuration names as the weights.
    pub fn open_named(root: &Path, name: &str) -> Result<Self> {
        Self::open_discovered(root, discover_named(root, name)?)
    }

    /// Opens every safetensors file whatever an index says: official DFloat11 directories keep units in
    /// files that their index does not list.
    pub fn open_unindexed(root: &Path) -> Result<Self> {
        Self::open_discovered(root, discover_official(root)?)
    }

    /// Opens these files and no others.
    pub fn open_files<'a>(root: &Path, names: impl Iterator<Item = &'a String>) -> Result<Self> {
        Self::open_discovered(root, listed(root, names)?)
    }

    fn open_discovered(root: &Path, found: Discovered) -> Result<Self> {
        let mut directory = match found.shards {
            Shards::Indexed(path, index) => Self::open_indexed(root, path, &index)?,
            Shards::Files(names) => {
                let shards = names.iter().map(|name| ShardFile::open(&root.join(name)));
                Self::of_shards(root, shards.collect::<Result<_>>()?)?
            }
        };
        directory.left_out = found.left_out;
        Ok(directory)
    }

    fn open_indexed(root: &Path, index_path: PathBuf, index: &Index) -> Result<Self> {
        let mut shards = Vec::new();
        for file in index.files() {
            let path = root.join(file);
            if !path.exists() {
                let names: Vec<&str> =
                    index.tensors().filter(|(_, f)| *f == file).map(|(name, _)| name).collect();
                return Err(Error::corrupt(
                    &path,
                    None,
                    format!(
                        "is missing: by the index it holds {} tensors, such as {}; download it",
                        names.len(),
                        names.first().unwrap_or(&"none")
                    ),
                ));
            }
            shards.push(ShardFile::open(&path)?);
        }
        // Of a tensor that is in two files, the index says which one counts.
        let mut places = Vec::with_capacity(index.len());
        let mut unlisted = None;
        for (number, shard) in shards.iter().enumerate() {
            let mut cursor = index.cursor();
            for &tensor in shard.header().by_name() {
                let Some(info) = shard.header().tensors().get(tensor as usize) else { continue };
                match cursor.file_of(&info.name) {
                    Some(file) if file == file_name(shard) => places.push((number as u32, tensor)),
                    Some(_) => {}
                    None => {
                        unlisted.get_or_insert((number, tensor as usize));
                    }
                }
            }
        }
        let mut directory = Self::of_places(root, shards, places)?;
        if directory.tensors.len() < index.len() {
            return Err(directory.missing(&index_path, index));
        }
        if let Some((shard, tensor)) = unlisted {
            let shard = &directory.shards[shard];
            return Err(Error::corrupt(
                shard.path(),
                shard.header().tensors().get(tensor).map(|t| t.name.as_str()),
                "is not listed by the index: add it there or remove it",
            ));
        }
        directory.index_file = Some(index_path);
        Ok(directory)
    }

    /// The error for a tensor of the index that is not where it says.
    fn missing(&self, index_path: &Path, index: &Index) -> Error {
        let mut names = self.names().peekable();
        let missing = index.tensors().find(|(name, _)| names.next_if_eq(name).is_none());
        let (name, file) = missing.unwrap_or_default();
        let elsewhere = self.shards.iter().find(|s| s.header().get(name).is_some());
        let what = match elsewhere {
            Some(shard) => {
                format!("is in {}, not in {file} as the index says: correct the index", file_name(shard))
            }
            None => {
                let hint = self.nearest(name).map(|n| format!("; the nearest name is {n}"));
                format!("is in no file, though the index says {file}{}", hint.unwrap_or_default())
            }
        };
        Error::corrupt(index_path, Some(name), what)
    }

    /// All tensors of these shards.
    pub(crate) fn of_shards(root: &Path, shards: Vec<ShardFile>) -> Result<Self> {
        let places = shards.iter().enumerate().flat_map(|(number, shard)| {
            shard.header().by_name().iter().map(move |&tensor| (number as u32, tensor))
        });
        let places = places.collect();
        Self::of_places(root, shards, places)
    }

    /// These tensors of these shards, each given by the numbers of its shard and of itself in it.
    fn of_places(root: &Path, shards: Vec<ShardFile>, mut tensors: Vec<(u32, u32)>) -> Result<Self> {
        let mut directory = Self {
            root: root.to_owned(),
            shards,
            tensors: Vec::new(),
            index_file: None,
            left_out: Vec::new(),
        };
        tensors.sort_by(|&a, &b| directory.name_at(a).cmp(directory.name_at(b)));
        let twice = tensors.windows(2).find(|w| directory.name_at(w[0]) == directory.name_at(w[1]));
        if let Some(&[(a, _), (b, tensor)]) = twice {
            let other = file_name(&directory.shards[a as usize]);
            let shard = &directory.shards[b as usize];
            return Err(Error::corrupt(
                shard.path(),
                Some(directory.name_at((b, tensor))),
                format!("is also in {other}: remove one of the files"),
            ));
        }
        directory.tensors = tensors;
        Ok(directory)
    }

    fn at(&self, (shard, tensor): (u32, u32)) -> Option<(&ShardFile, &Arc<TensorInfo>)> {
        let shard = self.shards.get(shard as usize)?;
        Some((shard, shard.header().tensors().get(tensor as usize)?))
    }

    fn name_at(&self, place: (u32, u32)) -> &str {
        self.at(place).map_or("", |(_, info)| info.name.as_str())
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Its shards.
    pub fn shards(&self) -> &[ShardFile] {
        &self.shards
    }

    /// The index, if there is one.
    pub fn index_file(&self) -> Option<&Path> {
        self.index_file.as_deref()
    }

    /// Files of weights, and their indexes, that are no part of the checkpoint: a second copy of it, an adapter, a
    /// draft model, what the index does not list.
    pub fn left_out(&self) -> &[String] {
        &self.left_out
    }

    /// The `__metadata__` of all shards together; where they disagree, that of the first counts.
    pub fn metadata(&self) -> BTreeMap<String, String> {
        let mut all = BTreeMap::new();
        for (key, value) in self.shards.iter().flat_map(|s| s.header().metadata()) {
            all.entry(key.clone()).or_insert_with(|| value.clone());
        }
        all
    }

    /// Refuses a directory of which a shard changed since it was opened.
    pub fn check_unchanged(&self) -> Result<()> {
        self.shards.iter().try_for_each(ShardFile::check_unchanged)
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.iter().map(|&place| self.name_at(place))
    }

    /// All tensors and their shards, sorted by name.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = (&ShardFile, &Arc<TensorInfo>)> {
        self.tensors.iter().filter_map(|&place| self.at(place))
    }

    /// Where a tensor is.
    pub fn find(&self, name: &str) -> Option<(&ShardFile, &Arc<TensorInfo>)> {
        let at = self.tensors.binary_search_by(|&place| self.name_at(place).cmp(name)).ok()?;
        self.at(self.tensors[at])
    }

    /// The existing name that is closest to `name`, for error texts.
    pub fn nearest(&self, name: &str) -> Option<&str> {
        nearest(self.names(), name)
    }
}

/// Refuses what is not a directory.
pub(crate) fn check_directory(root: &Path) -> Result<()> {
    let meta = std::fs::metadata(root).map_err(|e| Error::io(root, "open", e))?;
    if meta.is_dir() {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "{}: is a file, and no GGUF file by its name; give the directory that holds the checkpoint",
        root.display()
    )))
}

fn file_name(shard: &ShardFile) -> &str {
    shard.path().file_name().and_then(|n| n.to_str()).unwrap_or_default()
}

/// Names that are compared at most, and their longest: bounds the work on hostile input.
const MAX_COMPARED: usize = 20_000;
const MAX_COMPARED_LEN: usize = 200;

/// The closest of `names` to `name` by edit distance.
pub(crate) fn nearest<'a>(names: impl Iterator<Item = &'a str>, name: &str) -> Option<&'a str> {
    let short = |n: &&str| n.len() <= MAX_COMPARED_LEN;
    if !short(&name) {
        return None;
    }
    names.filter(short).take(MAX_COMPARED).min_by_key(|candidate| edit_distance(candidate, name))
}

/// Levenshtein distance of bytes.
fn edit_distance(a: &str, b: &str) -> usize {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
