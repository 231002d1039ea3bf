//! The special tokens that a checkpoint's small JSON files name.

use std::collections::BTreeMap;
use std::path::Path;

use llmpress_formats::{Error, Result, python_json, read_small_file};
use serde_json::{Map, Value};

pub(crate) const TOKENIZER_CONFIG_FILE: &str = "tokenizer_config.json";
const SPECIAL_TOKENS_MAP_FILE: &str = "special_tokens_map.json";
const MAX_BYTES: u64 = 16 << 20;

/// A JSON object in a file; `None` if there is no such file.
pub(crate) fn read_object(path: &Path) -> Result<Option<Map<String, Value>>> {
    let bytes = match read_small_file(path, MAX_BYTES) {
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    match python_json(&bytes) {
        Ok(Value::Object(object)) => Ok(Some(object)),
        Ok(_) => Err(Error::corrupt(path, None, "must hold a JSON object")),
        Err(e) => Err(Error::corrupt(path, None, format!("is not valid JSON: {e}"))),
    }
}

/// `bos_token`, `eos_token`, ... by name. `tokenizer_config.json` counts, also where it says null; what it
/// does not name is taken from `special_tokens_map.json`.
///
/// # Errors
/// A file cannot be read, or is no JSON object.
pub fn special_tokens(dir: &Path) -> Result<BTreeMap<String, String>> {
    let mut all = read_object(&dir.join(SPECIAL_TOKENS_MAP_FILE))?.unwrap_or_default();
    all.extend(read_object(&dir.join(TOKENIZER_CONFIG_FILE))?.unwrap_or_default());
    let names = ["bos", "eos", "unk", "pad", "sep", "cls", "mask"].map(|name| format!("{name}_token"));
    Ok(names
        .into_iter()
        .filter_map(|name| Some((content(all.get(&name)?)?, name)))
        .map(|(t, n)| (n, t))
        .collect())
}

/// A token is a string, or an object that describes it.
fn content(token: &Value) -> Option<String> {
    token.as_str().or_else(|| token.get("content")?.as_str()).map(str::to_owned)
}
