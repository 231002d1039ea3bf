//! Writes a safetensors shard whose tensors are filled in pieces, in any order, from many threads.
//!
//! ```text
//! length | header + spaces | slot | slot | ...     under a temporary name until it is complete and synced
//! ```
//!
//! Sizes of entropy-coded components are known only after coding, so the header's room is reserved
//! first and the header written last, padded with spaces as the format allows.

use std::collections::BTreeMap;
use std::io::BufWriter;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::component::OpenFile;
use crate::files::{create_anew, publish, temporary_path};
use crate::hashed::Hashed;
use crate::header::{TensorInfo, header_bytes, write_header};
use crate::{Component, Digest, Dtype, Error, Result};

/// A tensor that a shard will hold.
#[derive(Debug, Clone)]
pub struct SlotPlan {
    /// Its stored name.
    pub name: String,
    /// Its dtype.
    pub dtype: Dtype,
    /// Its shape; only an upper bound unless `exact`.
    pub shape: Vec<u64>,
    /// Whether the shape is final.
    pub exact: bool,
}

/// A shard being written.
#[derive(Debug)]
pub struct ShardWriter {
    path: PathBuf,
    file: Arc<OpenFile>,
    data_start: u64,
    end: u64,
    placed: Vec<Arc<TensorInfo>>,
    metadata: BTreeMap<String, String>,
}

/// The room of one tensor in a shard being written.
#[derive(Debug, Clone)]
pub struct Slot {
    component: Component,
}

/// A published shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrittenShard {
    /// Size of the file.
    pub bytes: u64,
    /// Digest of the length field and the header.
    pub header_blake3: Digest,
    /// Bytes of its tensors.
    pub tensor_bytes: u64,
}

/// Stands for an offset that is not known yet: no shard is larger.
const UNKNOWN_OFFSET: u64 = 9_999_999_999_999_999;

impl ShardWriter {
    /// Creates a hidden file beside `path` with room for a header that holds this `__metadata__` and names these
    /// tensors, which must then be placed in this order.
    pub fn create(
        path: &Path,
        plan: impl Iterator<Item = SlotPlan>,
        metadata: BTreeMap<String, String>,
    ) -> Result<Self> {
        let mut end = Some(0u64);
        let entries = plan.map(|slot| {
            let begin = end.unwrap_or(UNKNOWN_OFFSET);
            end = end.filter(|_| slot.exact).and_then(|e| e.checked_add(slot.dtype.byte_len(&slot.shape)?));
            let end = end.unwrap_or(UNKNOWN_OFFSET);
            (slot.name.into(), slot.dtype, slot.shape.into(), [begin, end])
        });
        let data_start = header_bytes(entries, &metadata)?;
        let temporary = temporary_path(path);
        let file = create_anew(&temporary)?;
        Ok(Self {
            path: path.to_owned(),
            file: Arc::new(OpenFile { file, path: temporary }),
            data_start,
            end: 0,
            placed: Vec::new(),
            metadata,
        })
    }

    /// The next tensor, right after the last one.
    pub fn place(&mut self, name: &str, dtype: Dtype, shape: &[u64]) -> Result<Slot> {
        let bytes = dtype.byte_len(shape);
        let end = bytes.and_then(|b| self.end.checked_add(b)).filter(|&e| e < UNKNOWN_OFFSET);
        let (Some(bytes), Some(end)) = (bytes, end) else {
            return Err(Error::Limit(format!("tensor {name}: {shape:?} of {} is too large", dtype.name())));
        };
        let slot = self.slot(name, dtype, shape.to_vec(), bytes);
        self.placed.push(slot.component.info.clone());
        self.end = end;
        Ok(slot)
    }

    /// The room from here on, for a tensor whose size is not known yet: write to it, then
    /// [`place`](Self::place) the tensor with the shape it came to.
    pub fn open_end(&self, name: &str) -> Slot {
        self.slot(name, Dtype::U8, Vec::new(), UNKNOWN_OFFSET - self.end)
    }

    fn slot(&self, name: &str, dtype: Dtype, shape: Vec<u64>, bytes: u64) -> Slot {
        Slot {
            component: Component {
                file: self.file.clone(),
                info: Arc::new(TensorInfo { name: name.to_owned(), dtype, shape, offset: self.end, bytes }),
                start: self.data_start + self.end,
                bytes,
            },
        }
    }

    /// Writes the header, syncs, and gives the file its final name.
    pub fn finish(self) -> Result<WrittenShard> {
        let OpenFile { file, path } = &*self.file;
        let entries = self.placed.iter().map(|info| {
            let range = [info.offset, info.offset + info.bytes];
            (info.name.as_str().into(), info.dtype, info.shape.as_slice().into(), range)
        });
        let mut out = BufWriter::with_capacity(1 << 16, Hashed::new(file, 0));
        write_header(&mut out, entries, &self.metadata, self.data_start)?;
        let header = out.into_inner().map_err(|e| Error::io(path, "write", e.into_error()))?.finish();
        let bytes = self.data_start + self.end;
        file.set_len(bytes).map_err(|e| Error::io(path, "resize", e))?;
        publish(file, path, &self.path)?;
        Ok(WrittenShard { bytes, header_blake3: header.digest, tensor_bytes: self.end })
    }
}

impl Slot {
    /// Writes `bytes` from `offset` bytes into the tensor. Safe from several threads.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let c = &self.component;
        if offset.checked_add(bytes.len() as u64).is_none_or(|end| end > c.bytes()) {
            return Err(Error::Invalid(format!(
                "tensor {}: writing {} bytes at {offset} of {}",
                c.name(),
                bytes.len(),
                c.bytes()
            )));
        }
        c.file.file.write_all_at(bytes, c.start + offset).map_err(|e| Error::io(c.path(), "write", e))
    }

    /// What was written, to be read back.
    pub fn component(&self) -> &Component {
        &self.component
    }
}
