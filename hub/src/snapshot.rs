//! A checkpoint in the cache, whole or by its headers.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use llmpress_formats::{Checkpoint, is_weights_file};

use crate::cache::Cache;
use crate::client::Client;
use crate::download::download;
use crate::listing::{Listing, Remote, listing};
use crate::progress::{Nobody, Progress};
use crate::{Error, Id, Result, Settings, Shell};

/// Files that are downloaded at a time.
const AT_A_TIME: usize = 4;
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
            Ok(listing) if is_torch(&listing) => Err(Error::Invalid(format!(
                "{id} has its weights in pytorch_model.bin, which does not begin with a header: `convert` and the other verbs \
                 download it whole"
            ))),
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
        let taken: Vec<&Remote> = if is_torch(&found) {
            found.files.iter().filter(|file| is_small(file) || is_torch_file(&file.name)).collect()
        } else {
            let shell = self.shell(id, &cache, &found)?;
            let checkpoint = Checkpoint::open(shell.path())?;
            let shards: Vec<&Path> =
                checkpoint.directory().shards().iter().map(|shard| shard.path()).collect();
            let counts = |file: &&Remote| {
                let shard = shards
                    .iter()
                    .any(|shard| shard.file_name().is_some_and(|name| name == file.name.as_str()));
                shard || is_small(file)
            };
            found.files.iter().filter(counts).collect()
        };
        progress.total(taken.iter().map(|file| file.bytes).sum());
        self.all(&taken, |file| download(&self.client, &cache, file, progress))?;
        let _lock = cache.lock(&found.commit)?;
        for file in &taken {
            cache.link(&found.commit, &file.name, &file.digest)?;
        }
        cache.note(id, &found.commit)?;
        Ok(Snapshot { path, commit: found.commit, unasked: None })
    }

    fn shell(&self, id: &Id, cache: &Cache, found: &Listing) -> Result<Shell> {
        let shell = Shell::new(id)?;
        let wanted: Vec<&Remote> =
            found.files.iter().filter(|file| is_small(file) || is_safetensors(&file.name)).collect();
        self.all(&wanted, |file| match is_safetensors(&file.name) {
            true => shell.begin(&self.client, cache, file),
            false => {
                download(&self.client, cache, file, &Nobody)?;
                shell.copy(cache, file)
            }
        })?;
        Ok(shell)
    }

    /// Does something for all files, some at a time; the first error in their order counts.
    fn all(&self, files: &[&Remote], each: impl Fn(&Remote) -> Result<()> + Sync) -> Result<()> {
        let next = Mutex::new((0, None::<(usize, Error)>));
        let take = || {
            let mut next = next.lock().unwrap_or_else(|e| e.into_inner());
            let at = next.0;
            next.0 += 1;
            // After an error nothing new is begun.
            (next.1.is_none() && at < files.len()).then_some(at)
        };
        let work = || {
            while let Some(at) = take() {
                if let Err(error) = each(files[at]) {
                    let mut next = next.lock().unwrap_or_else(|e| e.into_inner());
                    if next.1.as_ref().is_none_or(|(first, _)| at < *first) {
                        next.1 = Some((at, error));
                    }
                }
            }
        };
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..AT_A_TIME.min(files.len())).map(|_| scope.spawn(work)).collect();
            for worker in workers {
                // Whoever hears of progress may unwind what is done, and is to see its own payload again.
                worker.join().unwrap_or_else(|payload| std::panic::resume_unwind(payload));
            }
        });
        match next.into_inner().unwrap_or_else(|e| e.into_inner()).1 {
            Some((_, error)) => Err(error),
            None => Ok(()),
        }
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

fn is_safetensors(name: &str) -> bool {
    name.ends_with(".safetensors")
}

fn is_torch_file(name: &str) -> bool {
    name.starts_with("pytorch_model") && name.ends_with(".bin")
}

/// Whether there is nothing but torch's own files.
fn is_torch(listing: &Listing) -> bool {
    let any = |of: fn(&str) -> bool| listing.files.iter().any(|file| of(&file.name));
    !any(is_safetensors) && any(is_torch_file)
}

fn is_small(file: &Remote) -> bool {
    !is_weights_file(&file.name) && file.bytes <= MOST_SMALL
}
