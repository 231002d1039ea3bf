//! One file into the cache, from where it stopped.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};

use ureq::http::StatusCode;

use crate::cache::{Cache, time_of_blobs};
use crate::client::{Client, Failed, begins_at, soon};
use crate::digest::Hasher;
use crate::listing::Remote;
use crate::progress::Progress;
use crate::{Error, Result};

/// Bytes that are read at a time.
const PIECE: usize = 1 << 18;

/// Makes sure that a file's blob is in the cache.
pub(crate) fn download(client: &Client, cache: &Cache, file: &Remote, progress: &dyn Progress) -> Result<()> {
    let blob = cache.blob(&file.digest);
    let is_there = || std::fs::metadata(&blob).is_ok_and(|meta| meta.is_file() && meta.len() == file.bytes);
    if !is_there() {
        let _lock = cache.lock(&file.digest)?;
        if !is_there() {
            return fetch(client, cache, file, progress);
        }
    }
    progress.advance(file.bytes);
    Ok(())
}

fn fetch(client: &Client, cache: &Cache, file: &Remote, progress: &dyn Progress) -> Result<()> {
    let partial = cache.partial(&file.digest);
    Cache::folder_of(&partial)?;
    for again in [false, true] {
        let mut writer = Writer::open(&partial, file, progress)?;
        client.persist(&file.url, || {
            let before = writer.at;
            writer.once(client, file, progress).map_err(|failed| {
                let something = writer.at > before;
                (failed, something)
            })
        })?;
        if writer.finish(&cache.blob(&file.digest), &partial, &file.digest)? {
            return Ok(());
        }
        // What an earlier run left may have been wrong; what arrived in this one was not.
        progress.retreat(file.bytes);
        std::fs::remove_file(&partial).map_err(Error::io(&partial, "remove"))?;
        if again {
            break;
        }
    }
    Err(Error::Corrupt {
        url: file.url.clone(),
        what: format!("twice what arrived is not what the hub says it is: its digest is not {}", file.digest),
    })
}

/// The beginning of a file, growing.
struct Writer {
    file: File,
    path: std::path::PathBuf,
    hasher: Hasher,
    at: u64,
}

impl Writer {
    /// Goes on from what is there.
    fn open(path: &std::path::Path, remote: &Remote, progress: &dyn Progress) -> Result<Self> {
        let io = |action| Error::io(path, action);
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(io("open"))?;
        let mut hasher = Hasher::new(&remote.digest, remote.bytes);
        let mut at = file.metadata().map_err(io("examine"))?.len();
        if at > remote.bytes {
            file.set_len(0).map_err(io("shorten"))?;
            at = 0;
        }
        let mut piece = vec![0; PIECE];
        let mut left = at;
        while left > 0 {
            let piece = &mut piece[..PIECE.min(usize::try_from(left).unwrap_or(PIECE))];
            file.read_exact(piece).map_err(io("read"))?;
            hasher.update(piece);
            left -= piece.len() as u64;
        }
        progress.advance(at);
        Ok(Self { file, path: path.to_owned(), hasher, at })
    }

    /// One try to have the rest.
    fn once(&mut self, client: &Client, remote: &Remote, progress: &dyn Progress) -> Result<(), Failed> {
        if self.at == remote.bytes {
            return Ok(());
        }
        let answer = client.ask(&remote.url, self.at, None)?;
        if answer.status() == StatusCode::RANGE_NOT_SATISFIABLE || begins_at(&answer) != Some(self.at) {
            // A server that knows no ranges, or another size: from the start, then.
            let from_start = answer.status() == StatusCode::OK;
            self.restart(remote, progress).map_err(Failed::Never)?;
            if !from_start {
                return Err(Failed::Soon {
                    why: "the hub gives other bytes than asked for".to_owned(),
                    wait: None,
                });
            }
        }
        let mut reader = answer.into_body().into_reader();
        let mut piece = vec![0; PIECE];
        loop {
            let count = reader.read(&mut piece).map_err(|e| soon(&e))?;
            if count == 0 {
                break;
            }
            if self.at + count as u64 > remote.bytes {
                let what = format!("more than the {} bytes that the hub lists arrive", remote.bytes);
                return Err(Failed::Never(Error::Corrupt { url: remote.url.clone(), what }));
            }
            let written = self.file.write_all(&piece[..count]).map_err(Error::io(&self.path, "write"));
            written.map_err(Failed::Never)?;
            self.hasher.update(&piece[..count]);
            self.at += count as u64;
            progress.advance(count as u64);
        }
        match self.at == remote.bytes {
            true => Ok(()),
            false => Err(Failed::Soon {
                why: format!("the connection ended after {} of {} bytes", self.at, remote.bytes),
                wait: None,
            }),
        }
    }

    fn restart(&mut self, remote: &Remote, progress: &dyn Progress) -> Result<()> {
        self.file.set_len(0).map_err(Error::io(&self.path, "shorten"))?;
        self.file.seek(SeekFrom::Start(0)).map_err(Error::io(&self.path, "rewind"))?;
        progress.retreat(self.at);
        (self.at, self.hasher) = (0, Hasher::new(&remote.digest, remote.bytes));
        Ok(())
    }

    /// Gives a whole file its name; false where it is not what it should be.
    fn finish(self, blob: &std::path::Path, partial: &std::path::Path, digest: &str) -> Result<bool> {
        if !self.hasher.is(digest) {
            return Ok(false);
        }
        self.file.set_modified(time_of_blobs()).map_err(Error::io(partial, "date"))?;
        self.file.sync_all().map_err(Error::io(partial, "sync"))?;
        std::fs::rename(partial, blob).map_err(Error::io(blob, "rename"))?;
        Ok(true)
    }
}
