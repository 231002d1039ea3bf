//! What a GGUF file says before its tensors.
//!
//! ```text
//! "GGUF" | u32 version | u64 tensors | u64 values | key, type, value ... | name, dims, type, offset ... | pad to the alignment
//! string: u64 length, bytes     list: u32 type, u64 length, values
//! ```

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use crate::encoding::ggml::Blocks;
use crate::{Dtype, Error, Result};

/// Most bytes before the tensors: vocabularies take some 20 MB. Texts take up to three times as much in memory.
const MAX_BYTES: u64 = 64 << 20;
/// Longest key, and name of a tensor.
const MAX_NAME: u64 = 1 << 16;
/// Most dimensions of a tensor.
const MAX_DIMS: u32 = 4;
const MAGIC: [u8; 4] = *b"GGUF";
/// Tensors with the dtypes that their numbers came from, `NAME DTYPE` each, where their type does not say: what llmpress exports.
pub const DTYPES_KEY: &str = "llmpress.dtypes";

/// A value, as far as anything here asks for it.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    /// As it was written, to be printed as shortly as it can be.
    Single(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    Floats(Vec<f32>),
    Integers(Vec<i64>),
    Bools(Vec<bool>),
}

/// A tensor as the file says it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Stored {
    pub(super) name: String,
    /// Rows before columns: the reverse of what is written.
    pub(super) shape: Vec<u64>,
    pub(super) blocks: Blocks,
    /// The dtype that its values are read in: that of the blocks, unless the file says that they came from a narrower one.
    pub(super) decoded: Dtype,
    /// After the start of all tensors.
    pub(super) offset: u64,
    pub(super) bytes: u64,
}

impl Stored {
    /// The dtype of its bytes in a header: that of plain floats, or bytes.
    pub(super) fn dtype(&self) -> Dtype {
        if self.blocks.is_quantised() { Dtype::U8 } else { self.blocks.decoded() }
    }

    /// The shape of its bytes in a header.
    pub(super) fn stored_shape(&self) -> Vec<u64> {
        if self.blocks.is_quantised() { vec![self.bytes] } else { self.shape.clone() }
    }
}

/// Everything before the tensors.
#[derive(Debug)]
pub(super) struct Metadata {
    values: BTreeMap<String, Value>,
    pub(super) tensors: Vec<Stored>,
    pub(super) data_start: u64,
}

impl Metadata {
    /// Reads and checks it.
    pub(super) fn read(path: &Path, file: &File) -> Result<Self> {
        let len = file.metadata().map_err(|e| Error::io(path, "examine", e))?.len();
        let mut input = Input { path, reader: BufReader::new(file.take(MAX_BYTES)), at: 0, len };
        let magic: [u8; 4] = input.bytes()?;
        if magic != MAGIC {
            return Err(input.corrupt("does not begin with GGUF: is it a GGUF file?"));
        }
        match input.u32()? {
            2 | 3 => {}
            version if version.swap_bytes() <= 3 => {
                return Err(Error::unsupported(
                    path,
                    None,
                    "is big-endian, and little-endian files are read",
                ));
            }
            version => {
                let what = format!(
                    "is of version {version} of GGUF, and 2 and 3 are read: convert the original model again"
                );
                return Err(Error::unsupported(path, None, what));
            }
        }
        let (tensors, values) = (input.u64()?, input.u64()?);
        let values = input.values(values)?;
        let alignment = match values.get("general.alignment") {
            None => 32,
            Some(Value::Unsigned(alignment @ 1..=65536)) if alignment.is_power_of_two() => *alignment,
            Some(other) => {
                return Err(
                    input.corrupt(&format!("has tensors aligned to {other:?}, which is no power of two"))
                );
            }
        };
        let mut tensors = input.tensors(tensors)?;
        if let Some(Value::Texts(dtypes)) = values.get(DTYPES_KEY) {
            set_dtypes(path, &mut tensors, dtypes)?;
        }
        let data_start = input.at.next_multiple_of(alignment);
        for stored in &tensors {
            let end = data_start.checked_add(stored.offset).and_then(|start| start.checked_add(stored.bytes));
            if end.is_none_or(|end| end > len) {
                let what =
                    format!("ends at byte {end:?} of a file of {len}: it was cut short, download it again");
                return Err(Error::corrupt(path, Some(&stored.name), what));
            }
            if !stored.offset.is_multiple_of(alignment) {
                let what = format!("begins at {}, which is not aligned to {alignment}", stored.offset);
                return Err(Error::corrupt(path, Some(&stored.name), what));
            }
        }
        Ok(Self { values, tensors, data_start })
    }

    /// A value.
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    /// A number that counts something.
    pub(super) fn number(&self, key: &str) -> Option<u64> {
        match self.get(key)? {
            Value::Unsigned(number) => Some(*number),
            Value::Signed(number) => u64::try_from(*number).ok(),
            // Some are said layer by layer, and are mostly the same.
            Value::Integers(all) => {
                let first = *all.first()?;
                all.iter().all(|other| *other == first).then(|| u64::try_from(first).ok())?
            }
            _ => None,
        }
    }

    /// A float, with the digits that it was written with.
    pub(super) fn float(&self, key: &str) -> Option<f64> {
        match self.get(key)? {
            Value::Single(value) => value.to_string().parse().ok(),
            Value::Float(value) => Some(*value),
            _ => None,
        }
    }

    /// A text.
    pub(super) fn text(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// A list of texts.
    pub(super) fn texts(&self, key: &str) -> Option<&[String]> {
        match self.get(key)? {
            Value::Texts(texts) => Some(texts),
            _ => None,
        }
    }

    /// Yes or no.
    pub(super) fn flag(&self, key: &str) -> Option<bool> {
        match self.get(key)? {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        }
    }
}

/// Takes the dtypes that a file says its numbers came from.
fn set_dtypes(path: &Path, tensors: &mut [Stored], dtypes: &[String]) -> Result<()> {
    let mut said: BTreeMap<&str, &str> = dtypes.iter().filter_map(|line| line.rsplit_once(' ')).collect();
    for stored in tensors {
        let Some(name) = said.remove(stored.name.as_str()) else { continue };
        let dtype = [Dtype::F16, Dtype::BF16, Dtype::F32].into_iter().find(|dtype| dtype.name() == name);
        // Numbers of a half precision type are what they are.
        let open = stored.blocks.is_quantised() || stored.blocks == Blocks::F32;
        stored.decoded =
            dtype.filter(|dtype| open || *dtype == stored.blocks.decoded()).ok_or_else(|| {
                let what = format!(
                    "is {} and came from {name}, as {DTYPES_KEY} says, which it cannot",
                    stored.blocks.name()
                );
                Error::corrupt(path, Some(&stored.name), what)
            })?;
    }
    Ok(())
}

/// The file, read from its start on.
struct Input<'a> {
    path: &'a Path,
    reader: BufReader<std::io::Take<&'a File>>,
    at: u64,
    len: u64,
}

impl Input<'_> {
    fn corrupt(&self, what: &str) -> Error {
        Error::corrupt(self.path, None, what)
    }

    fn fill(&mut self, out: &mut [u8]) -> Result<()> {
        self.reader.read_exact(out).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof if self.len > MAX_BYTES => Error::Limit(format!(
                "{}: has more than {MAX_BYTES} bytes before its tensors",
                self.path.display()
            )),
            std::io::ErrorKind::UnexpectedEof => {
                self.corrupt("ends before its tensors begin: it was cut short, download it again")
            }
            _ => Error::io(self.path, "read", e),
        })?;
        self.at += out.len() as u64;
        Ok(())
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    /// Refuses more of something than the file has bytes for.
    fn fits(&self, count: u64, each: u64) -> Result<usize> {
        let left = self.len.min(MAX_BYTES).saturating_sub(self.at);
        match count.checked_mul(each) {
            Some(bytes) if bytes <= left => Ok(count as usize),
            _ => Err(self.corrupt(&format!(
                "says that {count} values follow at byte {}, and {left} bytes are left: it was cut short, download it again",
                self.at
            ))),
        }
    }

    fn text(&mut self, most: u64) -> Result<String> {
        let len = self.u64()?;
        let len = self.fits(len.min(most.saturating_add(1)), 1)?;
        if len as u64 > most {
            return Err(self.corrupt(&format!("has a name of more than {most} bytes at byte {}", self.at)));
        }
        let mut bytes = vec![0; len];
        self.fill(&mut bytes)?;
        // Tokens may be parts of characters.
        Ok(match String::from_utf8(bytes) {
            Ok(text) => text,
            Err(e) => String::from_utf8_lossy(e.as_bytes()).into_owned(),
        })
    }

    fn values(&mut self, count: u64) -> Result<BTreeMap<String, Value>> {
        // A key, a type and a byte.
        let count = self.fits(count, 13)?;
        let mut values = BTreeMap::new();
        for _ in 0..count {
            let key = self.text(MAX_NAME)?;
            let kind = self.u32()?;
            let value = if kind == 9 { self.list(&key)? } else { self.value(kind, &key)? };
            if values.insert(key.clone(), value).is_some() {
                return Err(self.corrupt(&format!("says {key:?} twice")));
            }
        }
        Ok(values)
    }

    fn value(&mut self, kind: u32, key: &str) -> Result<Value> {
        Ok(match kind {
            0 => Value::Unsigned(u64::from(self.bytes::<1>()?[0])),
            1 => Value::Signed(i64::from(self.bytes::<1>()?[0] as i8)),
            2 => Value::Unsigned(u64::from(u16::from_le_bytes(self.bytes()?))),
            3 => Value::Signed(i64::from(i16::from_le_bytes(self.bytes()?))),
            4 => Value::Unsigned(u64::from(self.u32()?)),
            5 => Value::Signed(i64::from(i32::from_le_bytes(self.bytes()?))),
            6 => Value::Single(f32::from_le_bytes(self.bytes()?)),
            7 => Value::Bool(self.bytes::<1>()?[0] != 0),
            8 => Value::Text(self.text(MAX_BYTES)?),
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.bytes()?)),
            12 => Value::Float(f64::from_le_bytes(self.bytes()?)),
            other => return Err(self.corrupt(&format!("says {key:?} in type {other}, which there is not"))),
        })
    }

    fn list(&mut self, key: &str) -> Result<Value> {
        let (kind, count) = (self.u32()?, self.u64()?);
        Ok(match kind {
            0..=5 | 10 | 11 => {
                let width = [1, 1, 2, 2, 4, 4, 0, 0, 0, 0, 8, 8][kind as usize];
                let count = self.fits(count, width)?;
                let mut all = Vec::with_capacity(count);
                for _ in 0..count {
                    all.push(match self.value(kind, key)? {
                        Value::Signed(value) => value,
                        Value::Unsigned(value) => i64::try_from(value).unwrap_or(i64::MAX),
                        _ => 0,
                    });
                }
                Value::Integers(all)
            }
            6 => {
                let count = self.fits(count, 4)?;
                let mut all = Vec::with_capacity(count);
                for _ in 0..count {
                    all.push(f32::from_le_bytes(self.bytes()?));
                }
                Value::Floats(all)
            }
            7 => {
                let count = self.fits(count, 1)?;
                let mut bytes = vec![0; count];
                self.fill(&mut bytes)?;
                Value::Bools(bytes.iter().map(|byte| *byte != 0).collect())
            }
            8 => {
                let count = self.fits(count, 8)?;
                let mut all = Vec::with_capacity(count);
                for _ in 0..count {
                    all.push(self.text(MAX_NAME)?);
                }
                Value::Texts(all)
            }
            other => {
                return Err(
                    self.corrupt(&format!("says {key:?} as a list of type {other}, which is not read"))
                );
            }
        })
    }

    fn tensors(&mut self, count: u64) -> Result<Vec<Stored>> {
        // A name, one dimension, a type and an offset.
        let count = self.fits(count, 32)?;
        let mut tensors = Vec::with_capacity(count);
        for _ in 0..count {
            let name = self.text(MAX_NAME)?;
            let dims = self.u32()?;
            if dims > MAX_DIMS {
                return Err(Error::corrupt(
                    self.path,
                    Some(&name),
                    format!("has {dims} dimensions, of which there are at most {MAX_DIMS}"),
                ));
            }
            let mut shape = Vec::with_capacity(dims as usize);
            for _ in 0..dims {
                shape.push(self.u64()?);
            }
            shape.reverse();
            let kind = self.u32()?;
            let offset = self.u64()?;
            let Some(blocks) = Blocks::of_ggml(kind) else {
                let what =
                    format!("is of ggml type {kind}, which is not read; these are: {}", Blocks::names());
                return Err(Error::unsupported(self.path, Some(&name), what));
            };
            let Some(bytes) = blocks.bytes(&shape) else {
                let what = format!("is {shape:?}, which is no whole number of blocks of {}", blocks.name());
                return Err(Error::corrupt(self.path, Some(&name), what));
            };
            tensors.push(Stored { name, shape, blocks, decoded: blocks.decoded(), offset, bytes });
        }
        Ok(tensors)
    }
}
