//! One file of tensors, opened for reading.

use std::fs::{File, Metadata};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use memmap2::Mmap;

use crate::component::OpenFile;
use crate::header::{Header, TensorInfo};
use crate::{Component, Digest, Error, Result, ShardEntry};

/// What tells a file from another one, or from itself after a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    bytes: u64,
    modified: (i64, i64),
}

impl Stamp {
    fn of(meta: &Metadata) -> Self {
        // Not the inode: some network file systems number a file anew each time.
        Self { bytes: meta.len(), modified: (meta.mtime(), meta.mtime_nsec()) }
    }
}

/// An open shard. `Send + Sync`.
#[derive(Debug)]
pub struct ShardFile {
    file: Arc<OpenFile>,
    opened: Stamp,
    header: Header,
    map: OnceLock<Mmap>,
}

impl ShardFile {
    /// Opens a file and checks its header.
    pub fn open(path: &Path) -> Result<Self> {
        if crate::torch::is_torch(path) {
            return Self::open_as(path, crate::torch::header);
        }
        Self::open_as(path, Header::read)
    }

    /// Opens a file whose tensors `header` finds.
    pub(crate) fn open_as(path: &Path, header: impl FnOnce(&Path, &File) -> Result<Header>) -> Result<Self> {
        let file = crate::files::open_file(path)?;
        let opened = Stamp::of(&file.metadata().map_err(|e| Error::io(path, "examine", e))?);
        let header = header(path, &file)?;
        Ok(Self {
            file: Arc::new(OpenFile { file, path: path.to_owned() }),
            opened,
            header,
            map: OnceLock::new(),
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    /// Its header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Its size.
    pub fn file_bytes(&self) -> u64 {
        self.opened.bytes
    }

    /// Refuses a file that was written to, cut short or replaced since it was opened.
    pub fn check_unchanged(&self) -> Result<()> {
        let examine = |e| Error::io(self.path(), "examine", e);
        let now = Stamp::of(&self.file.file.metadata().map_err(examine)?);
        let named = Stamp::of(&std::fs::metadata(self.path()).map_err(examine)?);
        if now == self.opened && named == self.opened {
            return Ok(());
        }
        Err(Error::corrupt(
            self.path(),
            None,
            "was changed while it was read: let nobody write to it and start over",
        ))
    }

    /// What a manifest says of this file.
    pub fn entry(&self) -> Result<ShardEntry> {
        let mut head = vec![0; self.header.data_start() as usize];
        self.file.file.read_exact_at(&mut head, 0).map_err(|e| Error::io(self.path(), "read", e))?;
        Ok(ShardEntry { bytes: self.opened.bytes, header_blake3: Digest::of(&head) })
    }

    /// Whether a component is a tensor of this file.
    pub(crate) fn holds(&self, component: &Component) -> bool {
        Arc::ptr_eq(&self.file, &component.file)
    }

    /// A tensor of this file, to be read in pieces.
    pub fn component(&self, tensor: &Arc<TensorInfo>) -> Component {
        Component {
            file: self.file.clone(),
            info: tensor.clone(),
            start: self.header.data_start() + tensor.offset,
            bytes: tensor.bytes,
        }
    }

    /// A tensor's bytes without a copy. The file is mapped at the first call: do not shorten it while
    /// the view is used, the system would end the process.
    pub fn view(&self, tensor: &TensorInfo) -> Result<&[u8]> {
        let map = match self.map.get() {
            Some(map) => map,
            None => {
                #[allow(unsafe_code)]
                // SAFETY: the mapping is read-only and private to this value; that nobody shortens or
                // rewrites the file meanwhile is the documented duty of the caller.
                let map =
                    unsafe { Mmap::map(&self.file.file) }.map_err(|e| Error::io(self.path(), "map", e))?;
                self.map.get_or_init(|| map)
            }
        };
        let start = self.header.data_start() + tensor.offset;
        usize::try_from(start)
            .ok()
            .zip(usize::try_from(start + tensor.bytes).ok())
            .and_then(|(start, end)| map.get(start..end))
            .ok_or_else(|| {
                Error::corrupt(self.path(), Some(&tensor.name), "the file was cut short meanwhile")
            })
    }
}
