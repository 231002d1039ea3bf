//! The header of a safetensors file.
//!
//! ```text
//! u64 length | {"name": {"dtype", "shape", "data_offsets": [begin, end]}, ...} + spaces | data
//! ```
//!
//! The data section has no holes and no overlaps: every byte of it belongs to exactly one tensor.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

use crate::{Dtype, Error, Result};

/// The largest header that is read, the limit of the reference implementation.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Bytes of the length field.
const LENGTH_BYTES: u64 = 8;

/// A tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Its dtype.
    pub dtype: Dtype,
    /// Its shape; empty for a scalar.
    pub shape: Vec<u64>,
    /// Where it starts in the data section.
    pub offset: u64,
    /// Its size.
    pub bytes: u64,
}

/// A checked header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    tensors: Vec<Arc<TensorInfo>>,
    /// Numbers of the tensors, sorted by name.
    by_name: Vec<u32>,
    metadata: BTreeMap<String, String>,
    data_start: u64,
}

/// The key of the free-form metadata; no tensor can have this name.
pub const METADATA_KEY: &str = "__metadata__";

#[derive(Debug, Deserialize)]
struct RawEntry<'a> {
    #[serde(borrow)]
    dtype: Cow<'a, str>,
    shape: Shape,
    data_offsets: (u64, u64),
}

/// A shape in no more memory than it needs: a header may have a million of them.
#[derive(Debug)]
struct Shape(Vec<u64>);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Sizes;
        impl<'de> Visitor<'de> for Sizes {
            type Value = Shape;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a list of sizes")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut sizes: A) -> Result<Shape, A::Error> {
                let mut first = [0; 4];
                for (i, size) in first.iter_mut().enumerate() {
                    match sizes.next_element()? {
                        Some(found) => *size = found,
                        None => return Ok(Shape(first[..i].to_vec())),
                    }
                }
                let mut all = first.to_vec();
                while let Some(size) = sizes.next_element()? {
                    all.push(size);
                }
                all.shrink_to_fit();
                Ok(Shape(all))
            }
        }
        deserializer.deserialize_seq(Sizes)
    }
}

impl RawEntry<'_> {
    /// The entry, checked as far as it says enough itself.
    fn check(self, name: String) -> Result<TensorInfo, (String, String)> {
        let (begin, end) = self.data_offsets;
        let checked = || {
            let dtype: Dtype = self.dtype.parse().map_err(|e: Error| e.to_string())?;
            let bytes = end
                .checked_sub(begin)
                .ok_or_else(|| format!("its data_offsets [{begin}, {end}] run backwards"))?;
            let needed = dtype.byte_len(&self.shape.0).ok_or_else(|| {
                format!("its shape {:?} is no whole number of bytes of {}", self.shape.0, dtype.name())
            })?;
            if bytes != needed {
                let (shape, dtype) = (&self.shape.0, dtype.name());
                return Err(format!("has {bytes} bytes where {shape:?} of {dtype} needs {needed}"));
            }
            Ok((dtype, bytes))
        };
        match checked() {
            Ok((dtype, bytes)) => Ok(TensorInfo { name, dtype, shape: self.shape.0, offset: begin, bytes }),
            Err(what) => Err((name, what)),
        }
    }
}

/// The entries in the order of the text; a JSON map would hide duplicates.
struct RawHeader {
    entries: Vec<Arc<TensorInfo>>,
    metadata: BTreeMap<String, String>,
    /// The first entry that is wrong, and in which way.
    wrong: Option<(String, String)>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut header = RawHeader { entries: Vec::new(), metadata: BTreeMap::new(), wrong: None };
                let mut seen_metadata = false;
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA_KEY {
                        if std::mem::replace(&mut seen_metadata, true) {
                            return Err(serde::de::Error::custom("__metadata__ stands there twice"));
                        }
                        // The reference implementation takes null for none.
                        let metadata = map.next_value::<Option<_>>();
                        let named = |e| serde::de::Error::custom(format!("{METADATA_KEY}: {e}"));
                        header.metadata = metadata.map_err(named)?.unwrap_or_default();
                        continue;
                    }
                    match map.next_value::<RawEntry<'_>>()?.check(name) {
                        Ok(info) => header.entries.push(Arc::new(info)),
                        Err(wrong) => {
                            header.wrong.get_or_insert(wrong);
                        }
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

impl Header {
    /// Reads and checks the header of an open file.
    pub fn read(path: &Path, file: &File) -> Result<Self> {
        let file_len = file.metadata().map_err(|e| Error::io(path, "examine", e))?.len();
        let corrupt = |what: String| Error::corrupt(path, None, what);
        if file_len < LENGTH_BYTES {
            return Err(corrupt(format!(
                "has {file_len} bytes, too few for a safetensors header: download it again"
            )));
        }
        let mut length = [0; LENGTH_BYTES as usize];
        file.read_exact_at(&mut length, 0).map_err(|e| Error::io(path, "read", e))?;
        if length == *b"version " {
            let mut start = vec![0; file_len.min(64) as usize];
            file.read_exact_at(&mut start, 0).map_err(|e| Error::io(path, "read", e))?;
            crate::files::refuse_lfs_pointer(path, &start)?;
        }
        let length = u64::from_le_bytes(length);
        if length > MAX_HEADER_BYTES {
            return Err(corrupt(format!(
                "claims a header of {length} bytes; at most {MAX_HEADER_BYTES} are read: is it a safetensors file?"
            )));
        }
        if length > file_len - LENGTH_BYTES {
            return Err(corrupt(format!(
                "claims a header of {length} bytes but has only {file_len}: it was cut short, download it again"
            )));
        }
        let mut json = vec![0; length as usize];
        file.read_exact_at(&mut json, LENGTH_BYTES).map_err(|e| Error::io(path, "read", e))?;
        Self::parse(path, &json, file_len)
    }

    /// Checks the JSON of a header against a file of `file_len` bytes.
    pub fn parse(path: &Path, json: &[u8], file_len: u64) -> Result<Self> {
        let corrupt = |tensor: Option<&str>, what: String| Error::corrupt(path, tensor, what);
        // White space may come first, as the reference implementation reads it.
        if json.iter().find(|b| !b.is_ascii_whitespace()) != Some(&b'{') {
            return Err(corrupt(
                None,
                "its header does not start with '{': is it a safetensors file?".into(),
            ));
        }
        let raw: RawHeader = serde_json::from_slice(json)
            .map_err(|e| corrupt(None, format!("its header is not valid: {e}")))?;
        if let Some((name, what)) = raw.wrong {
            return Err(corrupt(Some(&name), what));
        }
        let data_start = LENGTH_BYTES + json.len() as u64;
        let mut tensors = raw.entries;
        tensors.shrink_to_fit();
        tensors.sort_by(|a, b| (a.offset, a.bytes, &a.name).cmp(&(b.offset, b.bytes, &b.name)));
        let mut end = 0;
        for tensor in &tensors {
            if tensor.offset != end {
                let what =
                    if tensor.offset < end { "overlaps the tensor before it" } else { "leaves a hole" };
                return Err(corrupt(
                    Some(&tensor.name),
                    format!(
                        "{what}: it starts at byte {} of the data where {end} is expected",
                        tensor.offset
                    ),
                ));
            }
            end += tensor.bytes;
        }
        // A header of at most 100 MB has fewer than 2^32 tensors.
        let mut by_name: Vec<u32> = (0..tensors.len() as u32).collect();
        by_name.sort_by(|&a, &b| tensors[a as usize].name.cmp(&tensors[b as usize].name));
        let twice = by_name.windows(2).find(|w| tensors[w[0] as usize].name == tensors[w[1] as usize].name);
        if let Some(&[first, _]) = twice {
            return Err(corrupt(Some(&tensors[first as usize].name), "stands in the header twice".into()));
        }
        match data_start.checked_add(end) {
            Some(needed) if needed == file_len => {}
            Some(needed) if needed > file_len => {
                let first = tensors.iter().find(|t| data_start + t.offset + t.bytes > file_len);
                return Err(corrupt(
                    first.map(|t| t.name.as_str()),
                    format!("the file was cut short: it has {file_len} bytes of {needed}, download it again"),
                ));
            }
            _ => {
                return Err(corrupt(
                    None,
                    format!(
                        "has {file_len} bytes, but its tensors end at {}",
                        data_start.saturating_add(end)
                    ),
                ));
            }
        }
        Ok(Self { tensors, by_name, metadata: raw.metadata, data_start })
    }

    /// Of a file in another format: tensors that lie somewhere after `data_start`. Some may share their bytes.
    pub(crate) fn of_tensors(
        path: &Path,
        mut tensors: Vec<Arc<TensorInfo>>,
        data_start: u64,
    ) -> Result<Self> {
        tensors.sort_by(|a, b| (a.offset, a.bytes, &a.name).cmp(&(b.offset, b.bytes, &b.name)));
        let mut by_name: Vec<u32> = (0..tensors.len() as u32).collect();
        by_name.sort_by(|&a, &b| tensors[a as usize].name.cmp(&tensors[b as usize].name));
        let twice = by_name.windows(2).find(|w| tensors[w[0] as usize].name == tensors[w[1] as usize].name);
        if let Some(&[first, _]) = twice {
            return Err(Error::corrupt(
                path,
                Some(&tensors[first as usize].name),
                "stands in the file twice",
            ));
        }
        Ok(Self { tensors, by_name, metadata: BTreeMap::new(), data_start })
    }

    /// The tensors in file order.
    pub fn tensors(&self) -> &[Arc<TensorInfo>] {
        &self.tensors
    }

    /// A tensor by name.
    pub fn get(&self, name: &str) -> Option<&Arc<TensorInfo>> {
        let name_of = |number: &u32| self.tensors.get(*number as usize).map_or("", |t| t.name.as_str());
        let at = self.by_name.binary_search_by(|number| name_of(number).cmp(name)).ok()?;
        self.tensors.get(self.by_name[at] as usize)
    }

    /// Numbers of the tensors in [`Self::tensors`], sorted by name.
    pub(crate) fn by_name(&self) -> &[u32] {
        &self.by_name
    }

    /// The free-form `__metadata__`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Where the data section starts in the file.
    pub fn data_start(&self) -> u64 {
        self.data_start
    }
}

/// A tensor of a header to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RenderEntry {
    /// Its name.
    pub name: String,
    /// Its dtype.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<u64>,
    /// Where it begins in the data section.
    pub begin: u64,
    /// Where it ends.
    pub end: u64,
}

/// Everything before the data section: the length field and the header, its entries in the order
/// given, padded with spaces to a multiple of 8 bytes or to exactly `reserve` bytes in all.
pub fn render(
    entries: &[RenderEntry],
    metadata: &BTreeMap<String, String>,
    reserve: Option<u64>,
) -> Result<Vec<u8>> {
    let all = || {
        entries.iter().map(|e| (e.name.as_str().into(), e.dtype, e.shape.as_slice().into(), [e.begin, e.end]))
    };
    let total = match reserve {
        Some(total) => total,
        None => header_bytes(all(), metadata)?,
    };
    let mut bytes = Vec::with_capacity(total as usize);
    write_header(&mut bytes, all(), metadata, total)?;
    Ok(bytes)
}

/// Name, dtype, shape, and where it begins and ends in the data section.
pub(crate) type Entry<'a> = (Cow<'a, str>, Dtype, Cow<'a, [u64]>, [u64; 2]);

/// Bytes of everything before the data section.
pub(crate) fn header_bytes<'a>(
    entries: impl Iterator<Item = Entry<'a>>,
    metadata: &BTreeMap<String, String>,
) -> Result<u64> {
    let mut counted = Counted { out: std::io::sink(), bytes: 0 };
    let count = write_entries(&mut counted, entries, metadata)?;
    let total = (LENGTH_BYTES + counted.bytes).next_multiple_of(8);
    if total - LENGTH_BYTES > MAX_HEADER_BYTES {
        return Err(Error::Limit(format!(
            "header: {count} tensors need a header of {total} bytes; the format allows {MAX_HEADER_BYTES}: use smaller shards"
        )));
    }
    Ok(total)
}

/// Writes everything before the data section in exactly `total` bytes.
pub(crate) fn write_header<'a>(
    out: &mut dyn Write,
    entries: impl Iterator<Item = Entry<'a>>,
    metadata: &BTreeMap<String, String>,
    total: u64,
) -> Result<()> {
    let written = |e| Error::Invalid(format!("header: {e}"));
    let too_long =
        |len: u64| Err(Error::Invalid(format!("header: {len} bytes do not fit the {total} reserved")));
    if !total.is_multiple_of(8) || total < LENGTH_BYTES {
        return too_long(LENGTH_BYTES);
    }
    let mut counted = Counted { out, bytes: 0 };
    counted.write_all(&(total - LENGTH_BYTES).to_le_bytes()).map_err(written)?;
    write_entries(&mut counted, entries, metadata)?;
    let Some(spaces) = total.checked_sub(counted.bytes) else { return too_long(counted.bytes) };
    for _ in 0..spaces {
        counted.write_all(b" ").map_err(written)?;
    }
    Ok(())
}

/// Writes the header without what fills it up; gives the number of tensors.
fn write_entries<'a>(
    mut out: &mut dyn Write,
    entries: impl Iterator<Item = Entry<'a>>,
    metadata: &BTreeMap<String, String>,
) -> Result<usize> {
    #[derive(Serialize)]
    struct Body<'a> {
        dtype: Dtype,
        shape: &'a [u64],
        data_offsets: [u64; 2],
    }
    let failed = |e: serde_json::Error| Error::Invalid(format!("header: {e}"));
    let put = |out: &mut dyn Write, text: &str| out.write_all(text.as_bytes()).map_err(serde_json::Error::io);
    let mut separator = "{";
    let mut count = 0;
    if !metadata.is_empty() {
        put(out, &format!("{separator}\"{METADATA_KEY}\":")).map_err(failed)?;
        serde_json::to_writer(&mut out, metadata).map_err(failed)?;
        separator = ",";
    }
    for (name, dtype, shape, data_offsets) in entries {
        if name == METADATA_KEY {
            return Err(Error::Invalid(format!(
                "tensor {METADATA_KEY}: the safetensors format uses this name itself: rename the tensor"
            )));
        }
        put(out, separator).map_err(failed)?;
        serde_json::to_writer(&mut out, &name).map_err(failed)?;
        put(out, ":").map_err(failed)?;
        serde_json::to_writer(&mut out, &Body { dtype, shape: &shape, data_offsets }).map_err(failed)?;
        separator = ",";
        count += 1;
    }
    put(out, if separator == "{" { "{}" } else { "}" }).map_err(failed)?;
    Ok(count)
}

/// Counts what passes.
struct Counted<W> {
    out: W,
    bytes: u64,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}
