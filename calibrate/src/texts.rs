//! Texts to calibrate on.

use std::path::{Path, PathBuf};

use llmpress_formats::{Error, Result, read_input};
use llmpress_model::Tokenizer;
use serde::Deserialize;

use crate::{Calibration, Cut};

/// The longest file that is read.
const MAX_TEXT_BYTES: u64 = 1 << 30;
/// What files of JSON lines are called.
const JSON_LINES: [&str; 2] = ["jsonl", "ndjson"];

/// Files of text, in order. One called `.jsonl` or `.ndjson` has a JSON object a line, each with a document as its
/// member `text`; any other is a document, in UTF-8.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Texts {
    /// The files.
    pub files: Vec<PathBuf>,
}

/// A line of a file of JSON lines. Other members are of no concern.
#[derive(Deserialize)]
struct Line {
    text: String,
}

impl Texts {
    /// Windows of these texts. Documents are encoded each by itself, without special tokens, and joined; a window
    /// may begin in one and end in the next. Without a seed nothing is read beyond what the windows need.
    ///
    /// # Errors
    /// A file that cannot be read, or is not what its name says; a token beyond the vocabulary of `vocab`; too short a
    /// text.
    pub fn calibration(&self, tokenizer: &Tokenizer, vocab: usize, cut: Cut) -> Result<Calibration> {
        let bos = tokenizer.bos().filter(|_| tokenizer.adds_bos());
        let most = if cut.seed.is_none() { cut.needed(bos) } else { usize::MAX };
        Calibration::new(&self.read(tokenizer, vocab, most)?, cut, bos)
    }

    /// The tokens of all of these texts, each document encoded by itself.
    ///
    /// # Errors
    /// A file that cannot be read, or is not what its name says; a token beyond the vocabulary of `vocab`.
    pub fn ids(&self, tokenizer: &Tokenizer, vocab: usize) -> Result<Vec<u32>> {
        self.read(tokenizer, vocab, usize::MAX)
    }

    /// As many tokens as are wanted, or some more.
    fn read(&self, tokenizer: &Tokenizer, vocab: usize, wanted: usize) -> Result<Vec<u32>> {
        // A name that is wrong is found before anything is read.
        for path in &self.files {
            std::fs::metadata(path).map_err(|e| Error::io(path, "open", e))?;
        }
        let mut ids: Vec<u32> = Vec::new();
        'files: for path in &self.files {
            for document in documents(path)? {
                if !ids.is_empty() && ids.len() >= wanted {
                    break 'files;
                }
                ids.extend(tokenizer.encode(&document)?);
            }
        }
        if let Some(id) = ids.iter().find(|id| **id as usize >= vocab) {
            return Err(Error::Invalid(format!(
                "the tokenizer gives token id {id}, beyond the vocabulary of {vocab}"
            )));
        }
        Ok(ids)
    }
}

/// The documents of a file.
fn documents(path: &Path) -> Result<Vec<String>> {
    let bytes = read_input(path, MAX_TEXT_BYTES)?;
    let text = String::from_utf8(bytes).map_err(|e| {
        Error::corrupt(path, None, format!("is not UTF-8 at byte {}", e.utf8_error().valid_up_to()))
    })?;
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    if !JSON_LINES.iter().any(|name| extension.eq_ignore_ascii_case(name)) {
        return Ok(vec![text]);
    }
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(number, line)| match serde_json::from_str::<Line>(line) {
            Ok(line) => Ok(line.text),
            Err(e) => Err(Error::corrupt(
                path,
                None,
                format!("line {}: is no JSON object with a member `text` that is a string: {e}", number + 1),
            )),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tinylm() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tinylm")
    }

    #[test]
    fn files_of_both_kinds_give_the_same_windows() {
        let tokenizer = Tokenizer::open(&tinylm()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            std::fs::write(dir.path().join(name), text).unwrap();
            dir.path().join(name)
        };
        let (one, two) =
            ("It is a truth universally acknowledged.", "A single man \"must\" be\nin want of a wife.");
        let line = |text: &str| serde_json::json!({"id": 7, "text": text}).to_string();
        let plain = [file("a.txt", one), file("b.txt", two)].to_vec();
        let lines = vec![file("c.jsonl", &format!("{}\n\n{}\n", line(one), line(two)))];
        let mixed = vec![plain[0].clone(), file("d.NDJSON", &line(two))];
        let of = |files: Vec<PathBuf>, windows, length| {
            Texts { files }.calibration(&tokenizer, 4096, Cut { windows, length, seed: None })
        };
        let expected = of(plain.clone(), 3, 5).unwrap();
        assert_eq!(of(lines.clone(), 3, 5).unwrap(), expected);
        assert_eq!(of(mixed, 3, 5).unwrap(), expected);
        // One document alone is as encoded by itself.
        let ids = tokenizer.encode(one).unwrap();
        assert_eq!(of(plain, 1, 5).unwrap().windows()[0], ids[..5]);
        assert!(of(lines, 300, 5).unwrap_err().to_string().contains("give a longer text"));
        let missing = of(vec![dir.path().join("none.txt")], 1, 5).unwrap_err();
        assert!(missing.to_string().contains("none.txt"), "{missing}");
        for (name, text) in [("x.jsonl", "{\"text\": \"a\"}\n{\"txt\": \"b\"}"), ("y.jsonl", "{\"text\": 3}")]
        {
            let error = of(vec![file(name, text)], 1, 5).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("`text`"), "{error}");
        }
    }
}
