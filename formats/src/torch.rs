//! `pytorch_model.bin`: tensors in a zip file, which a pickle names.
//!
//! ```text
//! <archive>/data.pkl     name -> storage, offset, shape, strides     a pickle that may ask for tensors and for nothing else
//! <archive>/data/<key>   bytes of a storage, not compressed          so a tensor is a range of the file
//! ```
//!
//! The format is torch's since version 1.6 (`torch.save` of a state dict). Nothing of a pickle is run: what it asks for is looked up in
//! a short list, and everything that is not there is refused by name.

mod pickle;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use rawzip::{CompressionMethod, RECOMMENDED_BUFFER_SIZE, ZipArchive};

use crate::header::{Header, TensorInfo};
use crate::{Dtype, Error, Result};
use pickle::Tensor;

/// What such files are called.
pub(crate) const SINGLE_FILE: &str = "pytorch_model.bin";
/// What their index is called.
pub(crate) const INDEX_FILE: &str = "pytorch_model.bin.index.json";
/// The largest pickle: a hundred thousand tensors take some 15 MB.
const MAX_PICKLE_BYTES: u64 = 64 << 20;
/// Most bytes before the first tensor.
const MAX_HEAD_BYTES: u64 = 512 << 20;

/// Whether a file is one of torch's, by its name.
pub(crate) fn is_torch(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "bin")
}

/// An entry of the archive: where its bytes lie.
#[derive(Debug, Clone, Copy)]
struct Entry {
    start: u64,
    bytes: u64,
}

/// Finds the tensors of a file.
pub(crate) fn header(path: &Path, file: &File) -> Result<Header> {
    let len = file.metadata().map_err(|e| Error::io(path, "examine", e))?.len();
    refuse_others(path, file, len)?;
    let reader = file.try_clone().map_err(|e| Error::io(path, "open", e))?;
    let broken = |e: rawzip::Error| {
        Error::corrupt(
            path,
            None,
            format!("is no whole zip file, which torch writes: {e}: download it again"),
        )
    };
    let mut buffer = vec![0; RECOMMENDED_BUFFER_SIZE];
    let archive = ZipArchive::from_file(reader, &mut buffer).map_err(broken)?;
    let mut records = archive.entries(&mut buffer);
    let mut entries = BTreeMap::new();
    while let Some(record) = records.next_entry().map_err(broken)? {
        let name = String::from_utf8_lossy(record.file_path().as_bytes()).into_owned();
        if record.flags().is_encrypted() || record.compression_method() != CompressionMethod::STORE {
            let what = format!(
                "is compressed or encrypted in the archive, and torch stores it as it is ({name}): save it again with torch.save"
            );
            return Err(Error::unsupported(path, None, what));
        }
        let (start, end) = archive.get_entry(record.wayfinder()).map_err(broken)?.compressed_data_range();
        let Some(bytes) = end.checked_sub(start).filter(|_| end <= len) else {
            return Err(Error::corrupt(
                path,
                None,
                format!("was cut short: {name} does not end in it; download it again"),
            ));
        };
        if entries.insert(name.clone(), Entry { start, bytes }).is_some() {
            return Err(Error::corrupt(path, None, format!("holds {name} twice")));
        }
    }
    let found = entries.iter().find_map(|(name, entry)| Some((name.strip_suffix("data.pkl")?, *entry)));
    let Some((root, pickle)) = found else {
        return Err(Error::corrupt(path, None, "holds no data.pkl: is it a checkpoint that torch saved?"));
    };
    if let Some(order) = entries.get(&format!("{root}byteorder"))
        && read(path, file, *order, 16)? != b"little"
    {
        return Err(Error::unsupported(
            path,
            None,
            "was saved on a big-endian machine, and little-endian files are read",
        ));
    }
    let pickle = read(path, file, pickle, MAX_PICKLE_BYTES)?;
    let mut tensors = Vec::new();
    for tensor in pickle::tensors(path, &pickle)? {
        tensors.push(placed(path, root, &entries, tensor)?);
    }
    // What lies before the first tensor is what a manifest remembers of the file.
    let data_start = tensors.iter().map(|tensor| tensor.offset).min().unwrap_or(0);
    if data_start > MAX_HEAD_BYTES {
        return Err(Error::Limit(format!(
            "{}: has {data_start} bytes before its first tensor",
            path.display()
        )));
    }
    tensors.iter_mut().for_each(|tensor| tensor.offset -= data_start);
    Header::of_tensors(path, tensors.into_iter().map(Arc::new).collect(), data_start)
}

/// Names the formats that are mistaken for this one.
fn refuse_others(path: &Path, file: &File, len: u64) -> Result<()> {
    let mut start = vec![0; len.min(64) as usize];
    file.read_exact_at(&mut start, 0).map_err(|e| Error::io(path, "read", e))?;
    crate::files::refuse_lfs_pointer(path, &start)?;
    if start.starts_with(&[0x80, 2, 0x8a]) {
        let what =
            "is in the format that torch wrote before version 1.6: load it and save it again with torch.save";
        return Err(Error::unsupported(path, None, what));
    }
    Ok(())
}

fn read(path: &Path, file: &File, entry: Entry, limit: u64) -> Result<Vec<u8>> {
    if entry.bytes > limit {
        return Err(Error::Limit(format!(
            "{}: has an entry of {} bytes where at most {limit} are read",
            path.display(),
            entry.bytes
        )));
    }
    let mut bytes = vec![0; entry.bytes as usize];
    file.read_exact_at(&mut bytes, entry.start).map_err(|e| Error::io(path, "read", e))?;
    Ok(bytes)
}

/// Where a tensor lies in the file.
fn placed(path: &Path, root: &str, entries: &BTreeMap<String, Entry>, tensor: Tensor) -> Result<TensorInfo> {
    let Tensor { name, dtype, key, offset, shape, strides } = tensor;
    let corrupt = |what: String| Error::corrupt(path, Some(&name), what);
    let entry = entries.get(&format!("{root}data/{key}"));
    let entry = entry.ok_or_else(|| {
        corrupt(format!("lies in the storage {key}, which is not in the file: download it again"))
    })?;
    let bytes = dtype.byte_len(&shape).filter(|bytes| *bytes <= crate::MAX_TOTAL_BYTES);
    let bytes =
        bytes.ok_or_else(|| corrupt(format!("is {shape:?}, which is no size of {}", dtype.name())))?;
    if bytes > 0 && !is_contiguous(&shape, &strides) {
        let what = format!(
            "has strides {strides:?} for the shape {shape:?}: its rows do not lie one after the other; save it with .contiguous()"
        );
        return Err(Error::unsupported(path, Some(&name), what));
    }
    let begin = offset.checked_mul(u64::from(dtype.bits()) / 8);
    match begin.and_then(|begin| Some((begin, begin.checked_add(bytes)?))) {
        Some((begin, end)) if end <= entry.bytes => {
            Ok(TensorInfo { offset: entry.start + begin, name, dtype, shape, bytes })
        }
        _ => Err(corrupt(format!("of {bytes} bytes does not lie in its storage of {}", entry.bytes))),
    }
}

/// Whether elements lie one after the other, the last dimension first.
fn is_contiguous(shape: &[u64], strides: &[u64]) -> bool {
    let mut expected = 1u64;
    let each = shape.iter().zip(strides).rev();
    shape.len() == strides.len()
        && each.into_iter().all(|(side, stride)| {
            let fits = *side == 1 || *stride == expected;
            expected = expected.saturating_mul(*side);
            fits
        })
}

/// Which files of weights are torch's, of a directory without safetensors: the single one, or all parts.
///
/// # Errors
/// Parts of which some are missing.
pub(crate) fn files(root: &Path, names: &BTreeSet<String>) -> Result<Vec<String>> {
    if names.contains(SINGLE_FILE) {
        return Ok(vec![SINGLE_FILE.to_owned()]);
    }
    let count = |name: &str| -> Option<usize> {
        name.strip_prefix("pytorch_model-")?.strip_suffix(".bin")?.rsplit_once("-of-")?.1.parse().ok()
    };
    let parts: Vec<String> = names.iter().filter(|name| count(name).is_some()).cloned().collect();
    match parts.iter().find(|name| count(name) != Some(parts.len())) {
        None => Ok(parts),
        Some(part) => {
            let what = format!(
                "is one of {} parts of a model, and {} are there: download the others",
                count(part).unwrap_or(0),
                parts.len()
            );
            Err(Error::corrupt(root.join(part), None, what))
        }
    }
}

/// The dtype of a torch storage or dtype by its name in a pickle.
fn dtype(name: &str) -> Option<Dtype> {
    Some(match name {
        "FloatStorage" | "float32" => Dtype::F32,
        "HalfStorage" | "float16" => Dtype::F16,
        "BFloat16Storage" | "bfloat16" => Dtype::BF16,
        "DoubleStorage" | "float64" => Dtype::F64,
        "LongStorage" | "int64" => Dtype::I64,
        "IntStorage" | "int32" => Dtype::I32,
        "ShortStorage" | "int16" => Dtype::I16,
        "CharStorage" | "int8" => Dtype::I8,
        "ByteStorage" | "uint8" => Dtype::U8,
        "BoolStorage" | "bool" => Dtype::BOOL,
        "ComplexFloatStorage" | "complex64" => Dtype::C64,
        "uint16" => Dtype::U16,
        "uint32" => Dtype::U32,
        "uint64" => Dtype::U64,
        "float8_e4m3fn" => Dtype::F8_E4M3,
        "float8_e5m2" => Dtype::F8_E5M2,
        "float8_e4m3fnuz" => Dtype::F8_E4M3FNUZ,
        "float8_e5m2fnuz" => Dtype::F8_E5M2FNUZ,
        "float8_e8m0fnu" => Dtype::F8_E8M0,
        _ => return None,
    })
}
