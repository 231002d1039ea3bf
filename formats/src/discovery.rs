//! Which files of a directory are the checkpoint.
//!
//! ```text
//! what config.json names                 transformers_weights: a file, or an index and what it lists
//! else model.safetensors                 it alone, as transformers takes it
//! else model.safetensors.index.json      what it lists
//! else model-0000i-of-0000n.safetensors  all n of them
//! else other *.safetensors               all of them, but for second copies and adapters
//! else pytorch_model.bin, or its index   what torch saved
//! ```
//!
//! Hidden files, directories, FIFOs and sockets do not count, whatever their names.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::config::WEIGHTS_KEY;
use crate::files::is_plain_name;
use crate::index::Index;
use crate::torch;
use crate::{CONFIG_FILE, Error, INDEX_FILE, Result};

/// The folder that a directory holds while a job writes it.
pub const STATE_DIR: &str = ".llmpress";
const SINGLE_FILE: &str = "model.safetensors";
const SUFFIX: &str = ".safetensors";
const INDEX_SUFFIX: &str = ".safetensors.index.json";

/// What counts.
#[derive(Debug)]
pub(crate) struct Discovered {
    pub(crate) shards: Shards,
    /// Files of weights and indexes that are no part of the checkpoint, by name.
    pub(crate) left_out: Vec<String>,
}

/// The shards.
#[derive(Debug)]
pub(crate) enum Shards {
    /// Those of an index.
    Indexed(PathBuf, Index),
    /// These files.
    Files(Vec<String>),
}

/// The names that end in `.safetensors` or are its indexes.
#[derive(Debug, Default)]
struct Listing {
    /// Files.
    files: BTreeSet<String>,
    /// Links to nothing.
    dangling: BTreeSet<String>,
    /// Whatever does not count.
    others: BTreeSet<String>,
    /// Weights in other formats, for errors.
    foreign: BTreeSet<String>,
}

impl Listing {
    fn read(root: &Path) -> Result<Self> {
        let mut listing = Self::default();
        for entry in std::fs::read_dir(root).map_err(|e| Error::io(root, "read", e))? {
            let path = entry.map_err(|e| Error::io(root, "read", e))?.path();
            let Some(name) = path.file_name().and_then(|n| n.to_str()).map(str::to_owned) else { continue };
            match path.extension().and_then(|e| e.to_str()) {
                _ if name.starts_with('.') => {}
                Some("bin" | "gguf" | "pt" | "pth" | "ckpt" | "h5") => {
                    listing.foreign.insert(name);
                }
                Some("safetensors") => {
                    match std::fs::metadata(&path) {
                        Ok(meta) if meta.is_file() => listing.files.insert(name),
                        Ok(_) => listing.others.insert(name),
                        Err(e) if e.kind() == std::io::ErrorKind::NotFound => listing.dangling.insert(name),
                        Err(e) => return Err(Error::io(&path, "examine", e)),
                    };
                }
                _ if name.ends_with(INDEX_SUFFIX) => {
                    listing.others.insert(name);
                }
                _ => {}
            }
        }
        Ok(listing)
    }

    /// Everything but `taken`.
    fn left_out(&self, taken: impl Fn(&str) -> bool) -> Vec<String> {
        let all: BTreeSet<&String> =
            self.files.iter().chain(&self.dangling).chain(&self.others).filter(|name| !taken(name)).collect();
        all.into_iter().cloned().collect()
    }
}

/// Finds the shards of a directory that has no manifest to list them.
pub(crate) fn discover(root: &Path) -> Result<Discovered> {
    let listing = Listing::read(root)?;
    let index_path = root.join(INDEX_FILE);
    let index = Index::read(&index_path)?;
    let single = listing.files.contains(SINGLE_FILE);
    match index {
        Some(index) if !single || index.lists_only(SINGLE_FILE) => {
            let left_out = listing.left_out(|name| name == INDEX_FILE || index.lists(name));
            Ok(Discovered { shards: Shards::Indexed(index_path, index), left_out })
        }
        _ if single => Ok(Discovered {
            left_out: listing.left_out(|name| name == SINGLE_FILE),
            shards: Shards::Files(vec![SINGLE_FILE.to_owned()]),
        }),
        _ => without_index(root, &listing),
    }
}

/// The shards that `config.json` names: a file of weights, or an index.
pub(crate) fn discover_named(root: &Path, name: &str) -> Result<Discovered> {
    let listing = Listing::read(root)?;
    let path = root.join(name);
    let wrong = |what: &str| {
        let what = format!("{WEIGHTS_KEY} names {name:?}, {what}");
        Err(Error::corrupt(root.join(CONFIG_FILE), None, what))
    };
    if !is_plain_name(name) || name.starts_with('.') {
        return wrong(
            "which is not a file of this directory: put the weights beside config.json and name them there",
        );
    }
    if name.ends_with(INDEX_SUFFIX) {
        let Some(index) = Index::read(&path)? else {
            return wrong("an index that is not there: download it, or remove the entry");
        };
        let left_out = listing.left_out(|other| other == name || index.lists(other));
        return Ok(Discovered { shards: Shards::Indexed(path, index), left_out });
    }
    if !name.ends_with(SUFFIX) {
        return wrong("which is neither *.safetensors nor *.safetensors.index.json");
    }
    if listing.dangling.contains(name) {
        return Err(crate::files::dangling(&path));
    }
    if !listing.files.contains(name) {
        return wrong("a file that is not there: download it, or remove the entry");
    }
    let left_out = listing.left_out(|other| other == name);
    Ok(Discovered { shards: Shards::Files(vec![name.to_owned()]), left_out })
}

/// The shards of an official DFloat11 directory, which keeps units in files that its index does not list.
pub(crate) fn discover_official(root: &Path) -> Result<Discovered> {
    let listing = Listing::read(root)?;
    refuse_dangling(root, &listing)?;
    let files: Vec<String> = listing.files.iter().filter(|name| !is_second_copy(name)).cloned().collect();
    refuse_gaps(root, &files)?;
    if files.is_empty() {
        return Err(nothing(root, &listing));
    }
    let left_out = listing.left_out(|name| name == INDEX_FILE || files.iter().any(|f| f == name));
    Ok(Discovered { shards: Shards::Files(files), left_out })
}

/// The shards that a manifest lists.
pub(crate) fn listed<'a>(root: &Path, names: impl Iterator<Item = &'a String>) -> Result<Discovered> {
    let files: Vec<String> = names.cloned().collect();
    let taken: BTreeSet<&String> = files.iter().collect();
    let left_out =
        Listing::read(root)?.left_out(|name| name == INDEX_FILE || taken.contains(&name.to_owned()));
    Ok(Discovered { shards: Shards::Files(files), left_out })
}

fn without_index(root: &Path, listing: &Listing) -> Result<Discovered> {
    refuse_dangling(root, listing)?;
    let main: Vec<&String> = listing.files.iter().filter(|name| !is_second_copy(name)).collect();
    let numbered: Vec<&String> = main
        .iter()
        .copied()
        .filter(|name| Numbered::parse(name).is_some_and(|n| n.prefix == "model"))
        .collect();
    let files: Vec<String> = match (numbered.is_empty(), main.is_empty()) {
        (false, _) => numbered.into_iter().cloned().collect(),
        (true, false) => main.into_iter().cloned().collect(),
        // Nothing but Mistral's own layout.
        (true, true) => {
            listing.files.iter().filter(|name| name.starts_with("consolidated")).cloned().collect()
        }
    };
    if files.is_empty() {
        return torch_files(root, listing)?.ok_or_else(|| nothing(root, listing));
    }
    refuse_gaps(root, &files)?;
    let left_out = listing.left_out(|name| files.iter().any(|f| f == name));
    Ok(Discovered { shards: Shards::Files(files), left_out })
}

/// The files of torch, where there are no others.
fn torch_files(root: &Path, listing: &Listing) -> Result<Option<Discovered>> {
    let path = root.join(torch::INDEX_FILE);
    let single = listing.foreign.contains(torch::SINGLE_FILE);
    if let Some(index) = Index::read(&path)?.filter(|_| !single) {
        return Ok(Some(Discovered {
            shards: Shards::Indexed(path, index),
            left_out: listing.left_out(|_| false),
        }));
    }
    let files = torch::files(root, &listing.foreign)?;
    let left_out = listing.left_out(|_| false);
    Ok((!files.is_empty()).then_some(Discovered { shards: Shards::Files(files), left_out }))
}

/// Weights that are there beside a model: in another layout, to be put on top of it, or of a draft model.
fn is_second_copy(name: &str) -> bool {
    name.starts_with("consolidated") || name.starts_with("adapter_model") || name == "mtp.safetensors"
}

fn refuse_dangling(root: &Path, listing: &Listing) -> Result<()> {
    match listing.dangling.iter().find(|name| !is_second_copy(name)) {
        None => Ok(()),
        Some(name) => Err(crate::files::dangling(&root.join(name))),
    }
}

fn nothing(root: &Path, listing: &Listing) -> Error {
    let names = |set: &BTreeSet<String>| set.iter().cloned().collect::<Vec<_>>().join(", ");
    let hint = if !listing.files.is_empty() {
        format!(
            "{} are no model by themselves: an adapter or a draft model is merged into its base first",
            names(&listing.files)
        )
    } else if listing.foreign.is_empty() {
        "is this the directory of a checkpoint?".to_owned()
    } else {
        let gguf = listing.foreign.iter().find(|name| name.ends_with(".gguf"));
        match gguf {
            Some(file) => format!(
                "it holds {}: give one of the GGUF files, as in {}",
                names(&listing.foreign),
                root.join(file).display()
            ),
            None => format!("it holds {}: convert them to safetensors first", names(&listing.foreign)),
        }
    };
    Error::Invalid(format!("{}: holds no safetensors files of a model; {hint}", root.display()))
}

/// A name such as `model-00002-of-00003.safetensors`.
#[derive(Debug, PartialEq, Eq)]
struct Numbered<'a> {
    prefix: &'a str,
    number: u32,
    count: u32,
    digits: usize,
}

impl<'a> Numbered<'a> {
    fn parse(name: &'a str) -> Option<Self> {
        let digits = |text: &str| {
            let plain = (1..=9).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
            plain.then(|| text.parse::<u32>().ok()).flatten()
        };
        let (left, count) = name.strip_suffix(SUFFIX)?.rsplit_once("-of-")?;
        let (prefix, number) = left.rsplit_once('-')?;
        Some(Self { prefix, number: digits(number)?, count: digits(count)?, digits: number.len() })
    }
}

/// Refuses numbered files of which some are missing: without an index nothing else would tell.
fn refuse_gaps(root: &Path, files: &[String]) -> Result<()> {
    let mut sets: BTreeMap<&str, BTreeMap<u32, BTreeSet<u32>>> = BTreeMap::new();
    for numbered in files.iter().filter_map(|name| Numbered::parse(name)) {
        sets.entry(numbered.prefix).or_default().entry(numbered.count).or_default().insert(numbered.number);
    }
    for (prefix, counts) in sets {
        if let [first, second, ..] = counts.keys().collect::<Vec<_>>()[..] {
            return Err(Error::corrupt(
                root,
                None,
                format!(
                    "holds files {prefix}-N-of-M of two checkpoints, of {first} and of {second} files, and no index: remove those of one"
                ),
            ));
        }
        for (count, present) in counts {
            // Some count from 0.
            let first = u32::from(!present.contains(&0));
            let expected = (first..).zip(&present).find(|(expected, number)| expected != *number);
            let missing = match expected {
                Some((missing, _)) => missing,
                None => first + present.len() as u32,
            };
            if present.len() as u32 == count && expected.is_none() {
                continue;
            }
            let width = files.iter().filter_map(|f| Numbered::parse(f)).find(|n| n.prefix == prefix);
            let width = width.map_or(5, |n| n.digits);
            let mut name = format!("{prefix}-{missing:0width$}-of-{count:0width$}{SUFFIX}");
            if missing >= first + count {
                name = format!("{prefix}-*-of-{count:0width$}{SUFFIX}");
            }
            return Err(Error::corrupt(
                root.join(name),
                None,
                format!(
                    "is missing: {} of {count} files are there and no index says which tensors they hold; download it",
                    present.len()
                ),
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbered_names_are_those_that_tools_write() {
        let parsed = Numbered::parse("model-00002-of-00003.safetensors");
        assert_eq!(parsed, Some(Numbered { prefix: "model", number: 2, count: 3, digits: 5 }));
        for other in
            ["model.safetensors", "model-2.safetensors", "model-a-of-3.safetensors", "model-1-of-2.bin"]
        {
            assert_eq!(Numbered::parse(other), None, "{other}");
        }
    }

    #[test]
    fn gaps_are_found_wherever_they_are() {
        let files = |numbers: &[u32], count: u32| -> Vec<String> {
            numbers.iter().map(|n| format!("model-{n:05}-of-{count:05}{SUFFIX}")).collect()
        };
        let check = |names: &[String]| refuse_gaps(Path::new("dir"), names).map_err(|e| e.to_string());
        for (numbers, count) in [(&[1, 2, 3][..], 3), (&[0, 1, 2], 3), (&[1], 1)] {
            check(&files(numbers, count)).unwrap();
        }
        for (numbers, count, missing) in
            [(&[1, 3][..], 3, "00002"), (&[2, 3], 3, "00001"), (&[1, 2], 3, "00003"), (&[0, 1], 3, "00002")]
        {
            let error = check(&files(numbers, count)).unwrap_err();
            assert!(error.contains(&format!("model-{missing}-of-00003")), "{numbers:?}: {error}");
        }
        assert!(check(&files(&[1, 2, 3], 2)).is_err());
        assert!(check(&files(&[4_000_000], 400_000_000)).is_err());
        let two = [files(&[1, 2], 2), files(&[1, 2, 3], 3)].concat();
        assert!(check(&two).unwrap_err().contains("two checkpoints"));
    }
}
