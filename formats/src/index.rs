//! The index of a sharded checkpoint: which tensor is in which file.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use crate::files::{dangling, is_plain_name, read_small_file};
use crate::{Error, Result};

/// The index's file name.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
const MAX_INDEX_BYTES: u64 = 200_000_000;

/// A parsed index. File names are kept once each: there are few files and perhaps a million tensors.
#[derive(Debug)]
pub(crate) struct Index {
    files: Vec<String>,
    /// The tensors, sorted by name, and the numbers of their files.
    tensors: Vec<(String, u32)>,
}

/// `weight_map` in the order of the text; a JSON map would hide duplicates.
struct WeightMap(Index);

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = WeightMap;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of tensor names and file names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<WeightMap, A::Error> {
                let (mut files, mut tensors) = (Vec::new(), Vec::new());
                let mut numbers: BTreeMap<String, u32> = BTreeMap::new();
                while let Some((name, file)) = entries.next_entry::<String, String>()? {
                    let number = match numbers.get(&file) {
                        Some(number) => *number,
                        None => {
                            let number = files.len() as u32;
                            files.push(file.clone());
                            numbers.insert(file, number);
                            number
                        }
                    };
                    tensors.push((name, number));
                }
                tensors.sort_by(|a, b| a.0.cmp(&b.0));
                if let Some(twice) = tensors.windows(2).find(|w| w[0].0 == w[1].0) {
                    return Err(serde::de::Error::custom(format!("{} is listed twice", twice[0].0)));
                }
                Ok(WeightMap(Index { files, tensors }))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

#[derive(Deserialize)]
struct Whole {
    weight_map: WeightMap,
}

impl Index {
    /// Reads and checks an index; `None` if there is none. A link to nothing is not none.
    pub(crate) fn read(path: &Path) -> Result<Option<Self>> {
        match path.symlink_metadata() {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io(path, "examine", e)),
            Ok(_) if !path.exists() => return Err(dangling(path)),
            Ok(_) => {}
        }
        let bytes = read_small_file(path, MAX_INDEX_BYTES)?;
        let whole: Whole = crate::python_json(&bytes)
            .map_err(|e| Error::corrupt(path, None, format!("is not a valid index: {e}")))?;
        let index = whole.weight_map.0;
        if index.tensors.is_empty() {
            return Err(Error::corrupt(
                path,
                None,
                "has an empty weight_map: it lists no tensors; download it again, or remove it if the files beside it are whole",
            ));
        }
        for (name, file) in index.tensors() {
            if !is_plain_name(file) {
                return Err(Error::corrupt(
                    path,
                    Some(name),
                    format!("is said to be in {file:?}, which is not a file of this directory"),
                ));
            }
        }
        Ok(Some(index))
    }

    /// The tensors, sorted, with their files.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = (&str, &str)> {
        self.tensors.iter().map(|(name, file)| (name.as_str(), self.files[*file as usize].as_str()))
    }

    /// How many tensors there are.
    pub(crate) fn len(&self) -> usize {
        self.tensors.len()
    }

    /// A cursor over the tensors, to be asked for sorted names.
    pub(crate) fn cursor(&self) -> Cursor<'_> {
        Cursor { index: self, at: 0 }
    }

    /// The files, sorted.
    pub(crate) fn files(&self) -> Vec<&str> {
        let mut files: Vec<&str> = self.files.iter().map(String::as_str).collect();
        files.sort_unstable();
        files
    }

    pub(crate) fn lists(&self, file: &str) -> bool {
        self.files.iter().any(|f| f == file)
    }

    pub(crate) fn lists_only(&self, file: &str) -> bool {
        matches!(&self.files[..], [only] if only == file)
    }
}

/// Finds sorted names one after the other: a step costs little where names follow each other closely, and never more
/// than two searches.
pub(crate) struct Cursor<'a> {
    index: &'a Index,
    at: usize,
}

impl<'a> Cursor<'a> {
    /// The file that a tensor is said to be in.
    pub(crate) fn file_of(&mut self, name: &str) -> Option<&'a str> {
        let left = &self.index.tensors[self.at..];
        let mut end = 1;
        while left.get(end - 1).is_some_and(|(other, _)| other.as_str() < name) {
            end *= 2;
        }
        let near = &left[..end.min(left.len())];
        self.at += near.partition_point(|(other, _)| other.as_str() < name);
        let (found, file) = self.index.tensors.get(self.at)?;
        (found == name).then(|| self.index.files[*file as usize].as_str())
    }
}
