//! Chat templates: messages to the prompt that a model was trained on.
//!
//! ```text
//! chat_template.jinja, or chat_template.json, or tokenizer_config.json --> Jinja, in a child process --> prompt
//! ```
//!
//! What a template can see is what it sees in the `transformers` library.

mod child;
mod jinja;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use llmpress_formats::{Error, Result, read_small_file};
use serde::{Deserialize, Serialize};

pub use self::child::serve_chat_template;
use crate::special_tokens::{TOKENIZER_CONFIG_FILE, read_object, special_tokens};

const JINJA_FILE: &str = "chat_template.jinja";
const JSON_FILE: &str = "chat_template.json";
const KEY: &str = "chat_template";
const MAX_TEMPLATE_BYTES: u64 = 1 << 20;

/// A message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

/// A model's chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    path: PathBuf,
    source: String,
    tokens: BTreeMap<String, String>,
}

impl ChatTemplate {
    /// Reads the chat template of a checkpoint's directory; `None` if it has none.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn open(dir: &Path) -> Result<Option<Self>> {
        let Some((path, source)) = find(dir)? else { return Ok(None) };
        if source.len() as u64 > MAX_TEMPLATE_BYTES {
            return Err(Error::corrupt(
                &path,
                None,
                format!("has a chat template of {} bytes, the most is {MAX_TEMPLATE_BYTES}", source.len()),
            ));
        }
        Ok(Some(Self { path, source, tokens: special_tokens(dir)? }))
    }

    /// The template itself.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The prompt for a conversation; with `add_generation_prompt` it ends where the assistant is to speak.
    /// It holds special tokens, the BOS too where the model wants one: encode it without adding another.
    ///
    /// It is made in a child process that limits its own memory and processor time: whatever the template does, it ends
    /// soon and at worst takes the child with it. `child` starts a program that calls [`serve_chat_template`].
    ///
    /// # Errors
    /// The template is no valid Jinja, refuses the messages, fails, or does not end in time; the child cannot be started.
    pub fn render_in(
        &self,
        child: Command,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String> {
        let request =
            child::Request { source: &self.source, tokens: &self.tokens, messages, add_generation_prompt };
        child::ask(child, &request)?.map_err(|what| Error::corrupt(&self.path, None, what))
    }
}

/// The template's source and the file it is in, looked for as `transformers` does.
fn find(dir: &Path) -> Result<Option<(PathBuf, String)>> {
    let path = dir.join(JINJA_FILE);
    match read_small_file(&path, MAX_TEMPLATE_BYTES) {
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
        bytes => {
            let text = String::from_utf8(bytes?).map_err(|_| Error::corrupt(&path, None, "is not UTF-8"))?;
            return Ok(Some((path, text)));
        }
    }
    for file in [JSON_FILE, TOKENIZER_CONFIG_FILE] {
        let path = dir.join(file);
        let object = read_object(&path)?.unwrap_or_default();
        if let Some(value) = object.get(KEY).filter(|value| !value.is_null()) {
            return Ok(Some((path.clone(), source(&path, value)?)));
        }
    }
    Ok(None)
}

/// One template, or the one called `default` of several.
fn source(path: &Path, value: &serde_json::Value) -> Result<String> {
    let default = || value.as_array()?.iter().find(|t| t.get("name").is_some_and(|n| n == "default"));
    let text = value.as_str().or_else(|| default()?.get("template")?.as_str());
    text.map(str::to_owned).ok_or_else(|| {
        Error::unsupported(
            path,
            None,
            format!("{KEY} must be a text, or a list of {{name, template}} with one named \"default\""),
        )
    })
}
