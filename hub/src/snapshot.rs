//! A checkpoint in the cache, whole or by its headers.

use std::path::{Path, PathBuf};

use llmpress_formats::{Checkpoint, is_weights_file};

use crate::at_once::at_once;
use crate::cache::Cache;
use crate::client::Client;
use crate::download::download;
use crate::listing::{Listing, Remote, is_safetensors, is_torch_file, listing};
use crate::progress::{Nobody, Progress};
use crate::{Error, Id, Result, Settings, Shell};

/// Other files than weights that are taken: tokenizers, templates, licences.
const MOST_SMALL: u64 = 64 << 20;

/// A hub.
pub struct Hub {
    client: Client,
}

/// A checkpoint that lies in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its directory.
    pub path: PathBuf,
    /// Its commit.
    pub commit: String,
    /// Why the hub was not asked, where it should have been: what lies in the cache may be old.
    pub unasked: Option<String>,
}

impl Hub {
    /// A hub that is reached so.
    pub fn new(settings: Settings) -> Self {
        Self { client: Client::new(settings) }
    }

    /// A checkpoint's small files and headers.
    ///
    /// # Errors
    /// No such checkpoint; a hub that does not answer; a cache that cannot be written.
    pub fn headers(&self, id: &Id) -> Result<Headers> {
        let cache = Cache::new(&self.client.settings().cache, id);
        if let Some(snapshot) = self.offline(id, &cache, None)? {
            return Ok(Headers::Whole(snapshot));
        }
        match listing(&self.client, id) {
            Ok(listing) => Ok(Headers::Shell(self.shell(id, &cache, &listing)?)),
            Err(error) => Ok(Headers::Whole(self.after(error, id, &cache)?)),
        }
    }

    /// A whole checkpoint: what is not in the cache yet is downloaded into it. What a checkpoint of these headers does not read
    /// (other formats, second copies of the weights) stays where it is.
    ///
    /// # Errors
    /// Those of [`Self::headers`]; headers that are at fault, before anything large is downloaded; what is not what the hub says.
    pub fn snapshot(&self, id: &Id, progress: &dyn Progress) -> Result<Snapshot> {
        let cache = Cache::new(&self.client.settings().cache, id);
        if let Some(snapshot) = self.offline(id, &cache, None)? {
            return Ok(snapshot);
        }
        let found = match listing(&self.client, id) {
            Ok(found) => found,
            Err(error) => return self.after(error, id, &cache),
        };
        let path = cache.snapshot(&found.commit);
        let shell = self.shell(id, &cache, &found)?;
        let checkpoint = Checkpoint::open(shell.path())?;
        let shards: Vec<&Path> = checkpoint.directory().shards().iter().map(|shard| shard.path()).collect();
        let counts = |file: &&Remote| {
            let shard =
                shards.iter().any(|shard| shard.file_name().is_some_and(|name| name == file.name.as_str()));
            shard || is_small(file)
        };
        let taken: Vec<&Remote> = found.files.iter().filter(counts).collect();
        progress.total(taken.iter().map(|file| file.bytes).sum());
        at_once(&taken, |file| download(&self.client, &cache, file, progress))?;
        let _lock = cache.lock(&found.commit)?;
        for file in &taken {
            cache.link(&found.commit, &file.name, &file.digest)?;
        }
        cache.note(id, &found.commit)?;
        Ok(Snapshot { path, commit: found.commit, unasked: None })
    }

    fn shell(&self, id: &Id, cache: &Cache, found: &Listing) -> Result<Shell> {
        let shell = Shell::new(id)?;
        let weights = if found.files.iter().any(|file| is_safetensors(&file.name)) {
            is_safetensors
        } else {
            is_torch_file
        };
        let wanted: Vec<&Remote> =
            found.files.iter().filter(|file| is_small(file) || weights(&file.name)).collect();
        at_once(&wanted, |file| match weights(&file.name) {
            true => shell.begin(&self.client, cache, file),
            false => {
                download(&self.client, cache, file, &Nobody)?;
                shell.copy(cache, file)
            }
        })?;
        Ok(shell)
    }

    /// What lies in the cache, where the hub may not be asked.
    fn offline(&self, id: &Id, cache: &Cache, unasked: Option<&Error>) -> Result<Option<Snapshot>> {
        if !self.client.settings().offline && unasked.is_none() {
            return Ok(None);
        }
        let snapshot = cache.commit_of(id).map(|commit| (cache.snapshot(&commit), commit));
        match snapshot.filter(|(path, _)| Checkpoint::open(path).is_ok()) {
            Some((path, commit)) => {
                Ok(Some(Snapshot { path, commit, unasked: unasked.map(Error::to_string) }))
            }
            None if unasked.is_some() => Ok(None),
            None => Err(Error::Invalid(format!(
                "{id} is not whole in the cache ({}), and HF_HUB_OFFLINE forbids to ask for it: run it once without",
                self.client.settings().cache.display()
            ))),
        }
    }

    /// What lies in the cache, where nobody answers.
    fn after(&self, error: Error, id: &Id, cache: &Cache) -> Result<Snapshot> {
        if !matches!(error, Error::Unreachable { .. }) {
            return Err(error);
        }
        self.offline(id, cache, Some(&error))?.ok_or(error)
    }
}

/// What tells a checkpoint's headers.
#[derive(Debug)]
pub enum Headers {
    /// A directory without weights.
    Shell(Shell),
    /// The checkpoint itself, which lies in the cache.
    Whole(Snapshot),
}

impl Headers {
    /// The directory.
    pub fn path(&self) -> &Path {
        match self {
            Self::Shell(shell) => shell.path(),
            Self::Whole(snapshot) => &snapshot.path,
        }
    }
}

fn is_small(file: &Remote) -> bool {
    !is_weights_file(&file.name) && file.bytes <= MOST_SMALL
}
