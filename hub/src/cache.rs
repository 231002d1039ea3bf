//! The cache of the hub's tools, of one repository.
//!
//! ```text
//! CACHE/models--org--name/refs/REVISION              the commit that it was last
//!                        /blobs/DIGEST               a file's content         DIGEST.incomplete: its beginning
//!                        /snapshots/COMMIT/FILE      a link to the blob
//! CACHE/.locks/models--org--name/DIGEST.lock         held while a blob is written; COMMIT.lock: its links
//! ```

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use llmpress_formats::{read_small_file, write_atomic};

use crate::{Error, Id, Result};

/// A repository in the cache.
#[derive(Clone, Debug)]
pub(crate) struct Cache {
    root: PathBuf,
    locks: PathBuf,
}

impl Cache {
    pub(crate) fn new(cache: &Path, id: &Id) -> Self {
        let name = format!("models--{}", id.repository().replace('/', "--"));
        Self { root: cache.join(&name), locks: cache.join(".locks").join(name) }
    }

    /// A blob, whether it is there or not.
    pub(crate) fn blob(&self, digest: &str) -> PathBuf {
        self.root.join("blobs").join(digest)
    }

    /// Its beginning.
    pub(crate) fn partial(&self, digest: &str) -> PathBuf {
        self.root.join("blobs").join(format!("{digest}.incomplete"))
    }

    pub(crate) fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    fn reference(&self, revision: &str) -> PathBuf {
        self.root.join("refs").join(revision)
    }

    /// Makes the folder of a file of it.
    pub(crate) fn folder_of(path: &Path) -> Result<()> {
        let Some(parent) = path.parent() else { return Ok(()) };
        std::fs::create_dir_all(parent).map_err(Error::io(parent, "create"))
    }

    /// The commit that a revision was last, as far as the cache knows.
    pub(crate) fn commit_of(&self, id: &Id) -> Option<String> {
        if let Some(commit) = id.commit() {
            return Some(commit.to_owned());
        }
        let bytes = read_small_file(&self.reference(id.revision()), 256).ok()?;
        let commit = String::from_utf8(bytes).ok()?.trim().to_owned();
        crate::listing::is_plain(&commit).then_some(commit)
    }

    /// Says which commit a revision is.
    pub(crate) fn note(&self, id: &Id, commit: &str) -> Result<()> {
        if id.commit().is_some() || self.commit_of(id).as_deref() == Some(commit) {
            return Ok(());
        }
        let path = self.reference(id.revision());
        Self::folder_of(&path)?;
        Ok(write_atomic(&path, commit.as_bytes())?)
    }

    /// Waits until nobody else writes a blob, or a commit's links; the lock is held until the file is dropped.
    pub(crate) fn lock(&self, digest: &str) -> Result<File> {
        let path = self.locks.join(format!("{digest}.lock"));
        Self::folder_of(&path)?;
        let file = File::options().write(true).create(true).truncate(false).open(&path);
        let file = file.map_err(Error::io(&path, "open"))?;
        file.lock().map_err(Error::io(&path, "lock"))?;
        Ok(file)
    }

    /// Links a file of a commit to its blob. The commit is locked.
    pub(crate) fn link(&self, commit: &str, name: &str, digest: &str) -> Result<()> {
        let path = self.snapshot(commit).join(name);
        let target = Path::new("../../blobs").join(digest);
        if std::fs::read_link(&path).is_ok_and(|there| there == target) {
            return Ok(());
        }
        Self::folder_of(&path)?;
        let temporary = path.with_file_name(".link");
        let _ = std::fs::remove_file(&temporary);
        std::os::unix::fs::symlink(&target, &temporary).map_err(Error::io(&temporary, "link"))?;
        std::fs::rename(&temporary, &path).map_err(Error::io(&path, "link"))
    }
}

/// The time of change that downloaded files have: a plan made of headers alone goes by the same.
pub(crate) fn time_of_blobs() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000)
}
