//! A directory of safetensors files: which tensor is where.
//!
//! ```text
//! model.safetensors.index.json: weight_map name -> file      decides where it exists
//! *.safetensors                                              all of them where it does not
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use crate::files::read_small_file;
use crate::header::TensorInfo;
use crate::shard::ShardFile;
use crate::{Error, Result};

/// The index's file name.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
const MAX_INDEX_BYTES: u64 = 100_000_000;

/// The tensors of a directory, by name.
#[derive(Debug)]
pub struct Directory {
    root: PathBuf,
    shards: Vec<ShardFile>,
    tensors: BTreeMap<String, (usize, usize)>,
    index_file: Option<PathBuf>,
}

/// `weight_map` in the order of the text; a JSON map would hide duplicates.
struct WeightMap(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = WeightMap;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of tensor names and file names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
                let mut entries = BTreeMap::new();
                while let Some((name, file)) = map.next_entry::<String, String>()? {
                    if entries.contains_key(&name) {
                        return Err(serde::de::Error::custom(format!("{name} is listed twice")));
                    }
                    entries.insert(name, file);
                }
                Ok(WeightMap(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: WeightMap,
}

impl Directory {
    /// Opens every shard of a directory and checks that index and shards agree.
    pub fn open(root: &Path) -> Result<Self> {
        check_directory(root)?;
        let index_path = root.join(INDEX_FILE);
        if index_path.exists() { Self::open_indexed(root, index_path) } else { Self::open_all(root) }
    }

    /// Opens every safetensors file whatever an index says: official DFloat11 directories keep units in
    /// files that their index does not list.
    pub fn open_unindexed(root: &Path) -> Result<Self> {
        Self::open_all(root)
    }

    fn open_indexed(root: &Path, index_path: PathBuf) -> Result<Self> {
        let bytes = read_small_file(&index_path, MAX_INDEX_BYTES)?;
        let index: Index = serde_json::from_slice(&bytes)
            .map_err(|e| Error::corrupt(&index_path, None, format!("is not a valid index: {e}")))?;
        let map = index.weight_map.0;
        let mut files: BTreeMap<&str, (usize, &str)> = BTreeMap::new();
        for (name, file) in &map {
            if !is_plain_name(file) {
                return Err(Error::corrupt(
                    &index_path,
                    Some(name),
                    format!("is said to be in {file:?}, which is not a file of this directory"),
                ));
            }
            files.entry(file).or_insert((0, name)).0 += 1;
        }
        let mut directory =
            Self { root: root.to_owned(), shards: Vec::new(), tensors: BTreeMap::new(), index_file: None };
        for (file, (count, first)) in files {
            let path = root.join(file);
            if !path.exists() {
                return Err(Error::corrupt(
                    &path,
                    None,
                    format!(
                        "is missing: by the index it holds {count} tensors, such as {first}; download it"
                    ),
                ));
            }
            directory.add(ShardFile::open(&path)?)?;
        }
        for (name, file) in &map {
            let Some(&(shard, _)) = directory.tensors.get(name) else {
                let hint = directory.nearest(name).map(|n| format!("; the nearest name is {n}"));
                return Err(Error::corrupt(
                    &index_path,
                    Some(name),
                    format!("is in no file, though the index says {file}{}", hint.unwrap_or_default()),
                ));
            };
            let actual =
                directory.shards[shard].path().file_name().and_then(|n| n.to_str()).unwrap_or_default();
            if actual != file {
                return Err(Error::corrupt(
                    &index_path,
                    Some(name),
                    format!("is in {actual}, not in {file} as the index says: correct the index"),
                ));
            }
        }
        if let Some((name, &(shard, _))) = directory.tensors.iter().find(|(name, _)| !map.contains_key(*name))
        {
            return Err(Error::corrupt(
                directory.shards[shard].path(),
                Some(name),
                "is not listed by the index: add it there or remove it",
            ));
        }
        directory.index_file = Some(index_path);
        Ok(directory)
    }

    fn open_all(root: &Path) -> Result<Self> {
        let mut paths = Vec::new();
        let mut others = Vec::new();
        for entry in std::fs::read_dir(root).map_err(|e| Error::io(root, "read", e))? {
            let path = entry.map_err(|e| Error::io(root, "read", e))?.path();
            match path.extension().and_then(|e| e.to_str()) {
                Some("safetensors") => paths.push(path),
                Some("bin" | "gguf" | "pt" | "pth" | "ckpt" | "h5") => {
                    others.push(path.file_name().unwrap_or_default().to_string_lossy().into_owned());
                }
                _ => {}
            }
        }
        if paths.is_empty() {
            others.sort();
            let hint = if others.is_empty() {
                "is this the directory of a checkpoint?".to_owned()
            } else {
                format!("it holds {}: convert them to safetensors first", others.join(", "))
            };
            return Err(Error::Invalid(format!("{}: holds no safetensors files; {hint}", root.display())));
        }
        paths.sort();
        let mut directory =
            Self { root: root.to_owned(), shards: Vec::new(), tensors: BTreeMap::new(), index_file: None };
        for path in paths {
            directory.add(ShardFile::open(&path)?)?;
        }
        Ok(directory)
    }

    fn add(&mut self, shard: ShardFile) -> Result<()> {
        let number = self.shards.len();
        for (i, tensor) in shard.header().tensors().iter().enumerate() {
            if let Some((other, _)) = self.tensors.insert(tensor.name.clone(), (number, i)) {
                let other = self.shards[other].path().file_name().unwrap_or_default().to_string_lossy();
                return Err(Error::corrupt(
                    shard.path(),
                    Some(&tensor.name),
                    format!("is also in {other}: remove one of the files"),
                ));
            }
        }
        self.shards.push(shard);
        Ok(())
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

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Where a tensor is.
    pub fn find(&self, name: &str) -> Option<(&ShardFile, &TensorInfo)> {
        let &(shard, tensor) = self.tensors.get(name)?;
        let shard = self.shards.get(shard)?;
        Some((shard, shard.header().tensors().get(tensor)?))
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
        "{}: is a file; give the directory that holds the checkpoint",
        root.display()
    )))
}

/// Only a name: no way out of the directory.
fn is_plain_name(file: &str) -> bool {
    !file.is_empty() && !file.contains(['/', '\\', '\0']) && file != "." && file != ".." && file.len() <= 255
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
