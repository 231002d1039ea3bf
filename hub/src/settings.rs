//! Where a hub is, who asks, and where what it gives lies: the variables that `huggingface_hub` reads.
//!
//! ```text
//! HF_ENDPOINT       a mirror                          https://huggingface.co
//! HF_TOKEN          who asks; else HF_TOKEN_PATH      $HF_HOME/token
//! HF_HUB_CACHE      the cache                         $HF_HOME/hub
//! HF_HOME                                             ~/.cache/huggingface
//! HF_HUB_OFFLINE    1: the cache alone
//! ```

use std::path::PathBuf;
use std::time::Duration;

use crate::{Error, Result};

const ENDPOINT: &str = "https://huggingface.co";
/// The longest token that is read of a file.
const MOST_TOKEN: u64 = 1 << 16;

/// How a hub is reached.
#[derive(Clone)]
pub struct Settings {
    /// Its address, without a slash at the end.
    pub endpoint: String,
    /// What says who asks; only the endpoint itself is told.
    pub token: Option<String>,
    /// The cache's directory.
    pub cache: PathBuf,
    /// Whether nothing may be asked for.
    pub offline: bool,
    /// What is waited before a second try; twice as long before each one after that.
    pub patience: Duration,
}

impl std::fmt::Debug for Settings {
    /// Without the token.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Settings")
            .field("endpoint", &self.endpoint)
            .field("token", &self.token.as_ref().map(|_| "..."))
            .field("cache", &self.cache)
            .field("offline", &self.offline)
            .finish_non_exhaustive()
    }
}

impl Settings {
    /// Those of the environment.
    ///
    /// # Errors
    /// An endpoint that is no address, a token that no header can hold, no home to put a cache into.
    pub fn from_environment() -> Result<Self> {
        Self::of(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    fn of(get: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let home = get("HOME").map(PathBuf::from);
        let path = |text: String| match (text.strip_prefix("~/"), &home) {
            (Some(rest), Some(home)) => home.join(rest),
            _ => PathBuf::from(text),
        };
        let base = get("HF_HOME").map(path).or_else(|| {
            let cache = get("XDG_CACHE_HOME").map(path).or_else(|| Some(home.as_ref()?.join(".cache")));
            Some(cache?.join("huggingface"))
        });
        let cache = get("HF_HUB_CACHE").or_else(|| get("HUGGINGFACE_HUB_CACHE")).map(path);
        let cache = cache.or_else(|| Some(base.as_ref()?.join("hub")));
        let Some(cache) = cache else {
            return Err(Error::Invalid(
                "there is no place for the hub's cache: set HF_HUB_CACHE, HF_HOME or HOME".to_owned(),
            ));
        };
        let endpoint = get("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        if !(endpoint.starts_with("https://") || endpoint.starts_with("http://")) {
            return Err(Error::Invalid(format!(
                "HF_ENDPOINT is {endpoint:?}: an address begins with https:// or http://"
            )));
        }
        let file = || get("HF_TOKEN_PATH").map(path).or_else(|| Some(base.as_ref()?.join("token")));
        let token = match get("HF_TOKEN").or_else(|| get("HUGGING_FACE_HUB_TOKEN")) {
            Some(token) => Some(token),
            None => match file().filter(|file| file.is_file()) {
                Some(file) => {
                    let bytes = llmpress_formats::read_small_file(&file, MOST_TOKEN)?;
                    Some(String::from_utf8_lossy(&bytes).into_owned())
                }
                None => None,
            },
        };
        let token = token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
        if token.as_ref().is_some_and(|token| !token.bytes().all(|b| b.is_ascii_graphic())) {
            return Err(Error::Invalid(
                "the token of HF_TOKEN, or of the file of tokens, holds what no token holds: log in again"
                    .to_owned(),
            ));
        }
        let is_true =
            |value: String| ["1", "on", "yes", "true"].contains(&value.to_ascii_lowercase().as_str());
        let offline = ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"].into_iter().filter_map(&get).any(is_true);
        Ok(Self { endpoint, token, cache, offline, patience: Duration::from_millis(500) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(pairs: &[(&str, &str)]) -> Result<Settings> {
        let find = |name: &str| pairs.iter().find(|pair| pair.0 == name);
        Settings::of(|name| find(name).map(|pair| pair.1.to_owned()))
    }

    #[test]
    fn variables_mean_what_they_mean_to_other_tools() {
        let plain = of(&[("HOME", "/h")]).unwrap();
        assert_eq!((plain.endpoint.as_str(), plain.offline, plain.token), (ENDPOINT, false, None));
        assert_eq!(plain.cache, PathBuf::from("/h/.cache/huggingface/hub"));
        let cache = |pairs: &[(&str, &str)]| of(pairs).unwrap().cache;
        assert_eq!(cache(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]), PathBuf::from("/x/huggingface/hub"));
        assert_eq!(cache(&[("HOME", "/h"), ("HF_HOME", "~/f")]), PathBuf::from("/h/f/hub"));
        assert_eq!(cache(&[("HF_HUB_CACHE", "/c"), ("HF_HOME", "/f")]), PathBuf::from("/c"));
        for (value, offline) in [("1", true), ("True", true), ("YES", true), ("0", false), ("off", false)] {
            assert_eq!(of(&[("HOME", "/h"), ("HF_HUB_OFFLINE", value)]).unwrap().offline, offline, "{value}");
        }
        let mirror =
            of(&[("HOME", "/h"), ("HF_ENDPOINT", "http://localhost:1/"), ("HF_TOKEN", " t\n")]).unwrap();
        assert_eq!((mirror.endpoint.as_str(), mirror.token.as_deref()), ("http://localhost:1", Some("t")));
        assert!(!format!("{:?}", of(&[("HOME", "/h"), ("HF_TOKEN", "secret")]).unwrap()).contains("secret"));
    }

    #[test]
    fn a_token_is_read_of_its_file_and_nonsense_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().to_str().unwrap();
        std::fs::write(dir.path().join("token"), "of the file\n").unwrap();
        assert!(of(&[("HF_HOME", home)]).unwrap_err().to_string().contains("log in again"));
        std::fs::write(dir.path().join("token"), "hf_x\n").unwrap();
        assert_eq!(of(&[("HF_HOME", home)]).unwrap().token.as_deref(), Some("hf_x"));
        assert!(of(&[]).unwrap_err().to_string().contains("HF_HUB_CACHE"));
        assert!(of(&[("HOME", "/h"), ("HF_ENDPOINT", "hub")]).unwrap_err().to_string().contains("https://"));
    }
}
