//! One safetensors file, opened for reading.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use memmap2::Mmap;

use crate::header::{Header, TensorInfo};
use crate::{Component, Digest, Error, Result, ShardEntry};

/// An open shard. `Send + Sync`.
#[derive(Debug)]
pub struct ShardFile {
    path: PathBuf,
    shared_path: Arc<Path>,
    file: Arc<File>,
    file_bytes: u64,
    header: Header,
    map: OnceLock<Mmap>,
}

impl ShardFile {
    /// Opens a file and checks its header.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io(path, "open", e))?;
        let meta = file.metadata().map_err(|e| Error::io(path, "examine", e))?;
        if !meta.is_file() {
            return Err(Error::corrupt(path, None, "is not a file"));
        }
        let header = Header::read(path, &file)?;
        Ok(Self {
            path: path.to_owned(),
            shared_path: path.into(),
            file: Arc::new(file),
            file_bytes: meta.len(),
            header,
            map: OnceLock::new(),
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Its size.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// What a manifest says of this file.
    pub fn entry(&self) -> Result<ShardEntry> {
        let mut head = vec![0; self.header.data_start() as usize];
        self.file.read_exact_at(&mut head, 0).map_err(|e| Error::io(&self.path, "read", e))?;
        Ok(ShardEntry { bytes: self.file_bytes, header_blake3: Digest::of(&head) })
    }

    /// A tensor of this file, to be read in pieces.
    pub fn component(&self, tensor: &TensorInfo) -> Component {
        Component {
            file: self.file.clone(),
            path: self.shared_path.clone(),
            name: tensor.name.clone(),
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
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
                let map = unsafe { Mmap::map(&*self.file) }.map_err(|e| Error::io(&self.path, "map", e))?;
                self.map.get_or_init(|| map)
            }
        };
        let start = self.header.data_start() + tensor.offset;
        usize::try_from(start)
            .ok()
            .zip(usize::try_from(start + tensor.bytes).ok())
            .and_then(|(start, end)| map.get(start..end))
            .ok_or_else(|| Error::corrupt(&self.path, Some(&tensor.name), "the file was cut short meanwhile"))
    }
}
