//! What a repository holds at a revision: `GET /api/models/NAME/revision/REVISION?blobs=true`.

use serde::Deserialize;

use crate::client::Client;
use crate::id::escaped;
use crate::{Error, Id, Result};

/// The longest listing that is read, and the most files of it.
const MOST_BYTES: u64 = 64 << 20;
const MOST_FILES: usize = 100_000;

/// A revision of a repository.
#[derive(Debug)]
pub(crate) struct Listing {
    pub(crate) commit: String,
    /// The files of its top folder, by name.
    pub(crate) files: Vec<Remote>,
}

/// A file of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Remote {
    pub(crate) name: String,
    pub(crate) bytes: u64,
    /// What the cache names its content by: a digest, of most hubs.
    pub(crate) digest: String,
    pub(crate) url: String,
}

#[derive(Deserialize)]
struct Answer {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: Option<String>,
    size: Option<u64>,
}

/// Asks for it.
pub(crate) fn listing(client: &Client, id: &Id) -> Result<Listing> {
    let endpoint = &client.settings().endpoint;
    let repository = id.repository();
    let url = format!("{endpoint}/api/models/{repository}/revision/{}?blobs=true", escaped(id.revision()));
    let bytes = client.small(&url, MOST_BYTES)?;
    let corrupt = |what: String| Error::Corrupt { url: url.clone(), what };
    let answer: Answer = serde_json::from_slice(&bytes)
        .map_err(|e| corrupt(format!("what answers is no hub's API ({e}): is HF_ENDPOINT right?")))?;
    if !is_plain(&answer.sha) || answer.siblings.len() > MOST_FILES {
        return Err(corrupt("it lists what no hub lists: is HF_ENDPOINT right?".to_owned()));
    }
    let mut files = Vec::new();
    for sibling in answer.siblings.into_iter().filter(|s| is_plain(&s.rfilename)) {
        let url = format!(
            "{endpoint}/{repository}/resolve/{}/{}",
            escaped(&answer.sha),
            escaped(&sibling.rfilename)
        );
        let digest = sibling.lfs.as_ref().and_then(|lfs| lfs.sha256.clone()).or(sibling.blob_id);
        let bytes = sibling.lfs.and_then(|lfs| lfs.size).or(sibling.size);
        let (bytes, digest) = match (bytes, digest) {
            (Some(bytes), Some(digest)) => (bytes, digest),
            // Mirrors that list names alone.
            _ => client.describe(&url)?,
        };
        if !is_plain(&digest) {
            return Err(corrupt(format!("names the content of {} by {digest:?}", sibling.rfilename)));
        }
        files.push(Remote { name: sibling.rfilename, bytes, digest, url });
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));
    files.dedup_by(|a, b| a.name == b.name);
    Ok(Listing { commit: answer.sha, files })
}

/// Whether a name is one of a file in a folder, and shows what it is: no way out, nothing hidden.
pub(crate) fn is_plain(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 200
        && !name.starts_with('.')
        && !name.contains(['/', '\\', '"'])
        && !name.chars().any(char::is_control)
}

pub(crate) fn is_safetensors(name: &str) -> bool {
    name.ends_with(".safetensors")
}

pub(crate) fn is_torch_file(name: &str) -> bool {
    name.starts_with("pytorch_model") && name.ends_with(".bin")
}
