//! The model card of an export: what was done, how large it is, what was measured, how it is loaded.
//!
//! ```text
//! ---
//! front matter of the source's README.md, with what is missing of base_model and tags
//! ---
//! <!-- llmpress --> our section <!-- /llmpress -->     once, before the text that was there
//! the source's text
//! ```

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use llmpress_formats::{Checkpoint, Error as FormatError, read_input};
use serde_json::Value;

use crate::carried::Carried;
use crate::pass::recorded_passes;
use crate::{Error, ExportFormat, Result};

/// The file.
pub(crate) const CARD_FILE: &str = "README.md";
const BEGIN: &str = "<!-- llmpress -->";
const END: &str = "<!-- /llmpress -->";
const MAX_REPORT_BYTES: u64 = 16 << 20;

/// Figures of `llmpress eval ppl --json` or `eval kld --json`: rows of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Measured(Vec<(String, String)>);

impl Measured {
    /// Reads a report.
    ///
    /// # Errors
    /// A file that cannot be read, or holds no perplexity.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = read_input(path, MAX_REPORT_BYTES)?;
        let report: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        Self::of(&report).ok_or_else(|| {
            let what = "is no report of `llmpress eval ppl --json` or `llmpress eval kld --json`";
            FormatError::corrupt(path, None, what).into()
        })
    }

    fn of(report: &Value) -> Option<Self> {
        let text = Path::new(report["text"].as_str()?).file_name()?.to_str()?;
        let (windows, window) = (report["windows"].as_u64()?, report["window"].as_u64()?);
        let on = format!("{text}, {windows} windows of {window} tokens");
        let number = |value: &Value| value.as_f64();
        let mut rows = vec![(format!("perplexity ({on})"), format!("{:.4}", number(&report["perplexity"])?))];
        if let Some(base) = number(&report["base_perplexity"]) {
            rows.push(("the same of the model that it was made of".to_owned(), format!("{base:.4}")));
            rows.push((
                "KL divergence from it, nats a token".to_owned(),
                format!("{:.6}", number(&report["kl"]["mean"])?),
            ));
            rows.push((
                "same likeliest token".to_owned(),
                format!("{:.2} %", 100.0 * number(&report["same_top"])?),
            ));
        }
        Some(Self(rows))
    }
}

/// What a card tells.
pub(crate) struct Card<'a> {
    pub(crate) format: ExportFormat,
    /// The file to load, where it is one.
    pub(crate) file: Option<&'a str>,
    /// How weights are stored, in words.
    pub(crate) stored: String,
    /// Bytes of the tensors that are written, and of all of them decoded.
    pub(crate) bytes: u64,
    pub(crate) source_bytes: u64,
    pub(crate) measured: &'a [Measured],
}

impl Card<'_> {
    /// Puts the card among the files of an export, with what the source's README.md says.
    pub(crate) fn put(
        &self,
        checkpoint: &Checkpoint,
        carried: &Carried,
        files: &mut BTreeMap<String, Vec<u8>>,
    ) -> Result<()> {
        let there = match carried.files.get(CARD_FILE) {
            Some(path) => match String::from_utf8(carried.read(checkpoint, CARD_FILE, path)?) {
                Ok(text) => text,
                // Whatever it is, it is the source's.
                Err(_) => return Ok(()),
            },
            None => String::new(),
        };
        files.insert(CARD_FILE.to_owned(), self.within(checkpoint, &there)?.into_bytes());
        Ok(())
    }

    fn within(&self, checkpoint: &Checkpoint, there: &str) -> Result<String> {
        let (matter, text) = front_matter(there);
        let mut matter = with_tags(matter, &["llmpress", self.format.name()]);
        if let Some(base) = repository(checkpoint.root()).filter(|_| !has_key(&matter, "base_model")) {
            matter.insert(0, format!("base_model: {base}"));
        }
        let matter = matter.join("\n");
        let section = self.section(checkpoint)?;
        let rest = without_section(text);
        let rest = rest.trim_start_matches('\n');
        let gap = if rest.is_empty() { "" } else { "\n" };
        Ok(format!("---\n{matter}\n---\n\n{section}{gap}{rest}"))
    }

    fn section(&self, checkpoint: &Checkpoint) -> Result<String> {
        let name = crate::source::name_of(checkpoint);
        let mut rows = vec![("made of".to_owned(), name)];
        if let Some(manifest) = checkpoint.manifest() {
            let passes: Vec<String> =
                recorded_passes(&manifest.recipe)?.iter().map(ToString::to_string).collect();
            if !passes.is_empty() {
                rows.push(("recipe".to_owned(), format!("`{}`", passes.join("+"))));
            }
        }
        rows.push(("weights".to_owned(), self.stored.clone()));
        let percent = 100.0 * self.bytes as f64 / self.source_bytes.max(1) as f64;
        let megabytes = |bytes: u64| format!("{:.1} MB", bytes as f64 / 1e6);
        rows.push((
            "size".to_owned(),
            format!("{}, {percent:.1} % of {}", megabytes(self.bytes), megabytes(self.source_bytes)),
        ));
        rows.extend(self.measured.iter().flat_map(|measured| measured.0.iter().cloned()));
        let mut text = format!("{BEGIN}\n## {} by llmpress\n\n| | |\n|---|---|\n", self.format.title());
        for (what, value) in rows {
            writeln!(text, "| {} | {} |", cell(&what), cell(&value))
                .map_err(|e| Error::Invalid(format!("{CARD_FILE}: {e}")))?;
        }
        text.push_str(&self.loading());
        text.push_str(&format!("{END}\n"));
        Ok(text)
    }

    /// How it is loaded; DIR is where it lies.
    fn loading(&self) -> String {
        match self.format {
            ExportFormat::CompressedTensors | ExportFormat::Gptq => {
                "\n```sh\nvllm serve DIR\n```\n".to_owned()
            }
            ExportFormat::Gguf => {
                format!("\n```sh\nllama-cli -m DIR/{}\n```\n", self.file.unwrap_or_default())
            }
            ExportFormat::Safetensors => {
                "\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
                                          model = AutoModelForCausalLM.from_pretrained(\"DIR\")\n\
                                          tokenizer = AutoTokenizer.from_pretrained(\"DIR\")\n```\n"
                    .to_owned()
            }
        }
    }
}

/// A text in a cell of a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace(['\n', '\r'], " ")
}

/// The repository that a snapshot of the hub's cache is of.
fn repository(root: &Path) -> Option<String> {
    let root = root.canonicalize().ok()?;
    let snapshots = root.parent().filter(|dir| dir.ends_with("snapshots"))?;
    let words = snapshots.parent()?.file_name()?.to_str()?.strip_prefix("models--")?;
    Some(words.replacen("--", "/", 1))
}

/// The lines of a front matter, and the text after it.
fn front_matter(text: &str) -> (Vec<String>, &str) {
    let Some(rest) = text.strip_prefix("---\n").or_else(|| text.strip_prefix("---\r\n")) else {
        return (Vec::new(), text);
    };
    let mut at = 0;
    for line in rest.split_inclusive('\n') {
        if line.trim_end() == "---" {
            let matter = rest.get(..at).unwrap_or_default().lines().map(str::to_owned).collect();
            return (matter, rest.get(at + line.len()..).unwrap_or_default());
        }
        at += line.len();
    }
    (Vec::new(), text)
}

fn has_key(matter: &[String], key: &str) -> bool {
    matter.iter().any(|line| line.strip_prefix(key).is_some_and(|rest| rest.starts_with(':')))
}

/// The same lines with these tags, whichever of the two ways a list is written in.
fn with_tags(mut matter: Vec<String>, tags: &[&str]) -> Vec<String> {
    let line = matter.iter().position(|line| line.starts_with("tags:"));
    let Some(line) = line else {
        matter.push("tags:".to_owned());
        matter.extend(tags.iter().map(|tag| format!("- {tag}")));
        return matter;
    };
    let listed = matter[line]["tags:".len()..].trim().to_owned();
    if let Some(inside) = listed.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        let there: Vec<&str> = inside.split(',').map(str::trim).filter(|tag| !tag.is_empty()).collect();
        let missing = tags.iter().copied().filter(|tag| !there.contains(tag));
        matter[line] =
            format!("tags: [{}]", there.iter().copied().chain(missing).collect::<Vec<_>>().join(", "));
    } else if listed.is_empty() {
        let items = matter[line + 1..].iter().take_while(|line| line.trim_start().starts_with("- "));
        let items: Vec<String> = items.cloned().collect();
        let indent: String =
            items.first().map(|item| item.chars().take_while(|c| *c == ' ').collect()).unwrap_or_default();
        let missing =
            tags.iter().filter(|tag| !items.iter().any(|item| item.trim_start()[2..].trim() == **tag));
        let missing: Vec<String> = missing.map(|tag| format!("{indent}- {tag}")).collect();
        let end = line + 1 + items.len();
        matter.splice(end..end, missing);
    }
    matter
}

/// A text without the section of an earlier export.
fn without_section(text: &str) -> String {
    let parts = text.split_once(BEGIN).and_then(|(before, rest)| Some((before, rest.split_once(END)?.1)));
    match parts {
        Some((before, after)) => format!("{before}{}", after.trim_start_matches('\n')),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tagged(text: &str) -> String {
        with_tags(front_matter(text).0, &["llmpress", "gguf"]).join("\n")
    }

    #[test]
    fn tags_join_those_that_are_there_however_they_are_written() {
        assert_eq!(tagged("no front matter"), "tags:\n- llmpress\n- gguf");
        assert_eq!(tagged("---\nlicense: mit\n---\ntext"), "license: mit\ntags:\n- llmpress\n- gguf");
        let block = "---\ntags:\n  - a\n  - gguf\nlicense: mit\n---\n";
        assert_eq!(tagged(block), "tags:\n  - a\n  - gguf\n  - llmpress\nlicense: mit");
        assert_eq!(tagged("---\ntags: [a, llmpress]\n---\n"), "tags: [a, llmpress, gguf]");
        assert_eq!(tagged("---\ntags: []\n---\n"), "tags: [llmpress, gguf]");
        // What is no list is left as it is.
        assert_eq!(tagged("---\ntags: a\n---\n"), "tags: a");
        // A front matter that does not end is a text.
        assert_eq!(front_matter("---\nlicense: mit\n"), (Vec::new(), "---\nlicense: mit\n"));
    }

    #[test]
    fn the_section_of_an_earlier_export_makes_room() {
        let text = format!("before\n{BEGIN}\nold\n{END}\n\nafter\n");
        assert_eq!(without_section(&text), "before\nafter\n");
        assert_eq!(without_section("plain"), "plain");
        assert_eq!(without_section(&format!("{BEGIN} without an end")), format!("{BEGIN} without an end"));
    }

    #[test]
    fn reports_of_eval_are_rows_and_other_files_none() {
        let report = serde_json::json!({
            "text": "/a/wiki.txt", "windows": 4, "window": 512, "perplexity": 12.34567, "base_perplexity": 12.0,
            "kl": {"mean": 0.0123}, "same_top": 0.987,
        });
        let rows = Measured::of(&report).unwrap().0;
        assert_eq!(
            rows[0],
            ("perplexity (wiki.txt, 4 windows of 512 tokens)".to_owned(), "12.3457".to_owned())
        );
        assert_eq!(rows.len(), 4);
        assert!(Measured::of(&serde_json::json!({"text": "a"})).is_none());
    }
}
