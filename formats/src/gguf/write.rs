//! What a GGUF file says before its tensors, made of values and tensors: the counterpart of `metadata.rs`.
//!
//! ```text
//! "GGUF" | u32 3 | u64 tensors | u64 values | key, type, value ... | name, dims, type, offset ... | pad to 32 | tensors, each padded
//! ```

use crate::encoding::ggml::Blocks;
use crate::{Error, Result};

/// Tensors begin at multiples of this.
const ALIGNMENT: u64 = 32;

/// A value of the metadata.
#[derive(Debug, Clone, PartialEq)]
pub enum GgufValue {
    /// A number that counts something.
    Number(u32),
    /// A number in single precision.
    Float(f32),
    /// Yes or no.
    Flag(bool),
    /// A text.
    Text(String),
    /// A list of texts.
    Texts(Vec<String>),
    /// A list of numbers in single precision.
    Floats(Vec<f32>),
    /// A list of integers.
    Integers(Vec<i32>),
}

/// A tensor that will lie in the file.
#[derive(Debug, Clone, PartialEq)]
pub struct GgufTensor {
    /// Its name, as llama.cpp has it.
    pub name: String,
    /// The type of its blocks.
    pub blocks: Blocks,
    /// Rows before columns.
    pub shape: Vec<u64>,
}

/// Where everything lies in a file that is going to be written.
#[derive(Debug, Clone, PartialEq)]
pub struct GgufLayout {
    header: Vec<u8>,
    offsets: Vec<u64>,
    bytes: u64,
}

impl GgufLayout {
    /// The layout of a file of version 3, with its tensors in this order.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a tensor whose rows are no whole blocks, or one that makes the file too large.
    pub fn new(values: &[(String, GgufValue)], tensors: &[GgufTensor]) -> Result<Self> {
        let mut header = b"GGUF".to_vec();
        header.extend(3u32.to_le_bytes());
        header.extend((tensors.len() as u64).to_le_bytes());
        header.extend((values.len() as u64).to_le_bytes());
        for (key, value) in values {
            text(&mut header, key);
            write_value(&mut header, value);
        }
        let mut places = Vec::with_capacity(tensors.len());
        let mut at = 0u64;
        for tensor in tensors {
            let end = tensor.blocks.bytes(&tensor.shape).and_then(|bytes| at.checked_add(bytes));
            let end = end.filter(|end| *end <= crate::MAX_TOTAL_BYTES).ok_or_else(|| {
                Error::Invalid(format!(
                    "tensor {}: {:?} is no whole number of blocks of {}, or too large",
                    tensor.name,
                    tensor.shape,
                    tensor.blocks.name()
                ))
            })?;
            text(&mut header, &tensor.name);
            header.extend((tensor.shape.len() as u32).to_le_bytes());
            tensor.shape.iter().rev().for_each(|side| header.extend(side.to_le_bytes()));
            header.extend(tensor.blocks.ggml().to_le_bytes());
            header.extend(at.to_le_bytes());
            places.push(at);
            at = end.next_multiple_of(ALIGNMENT);
        }
        header.resize(header.len().next_multiple_of(ALIGNMENT as usize), 0);
        let start = header.len() as u64;
        Ok(Self {
            header,
            offsets: places.into_iter().map(|place| start + place).collect(),
            bytes: start + at,
        })
    }

    /// Everything before the tensors.
    pub fn header(&self) -> &[u8] {
        &self.header
    }

    /// Where a tensor begins in the file, by its number.
    pub fn offset(&self, tensor: usize) -> Option<u64> {
        self.offsets.get(tensor).copied()
    }

    /// Bytes of the whole file: it ends in padding.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

fn text(out: &mut Vec<u8>, value: &str) {
    out.extend((value.len() as u64).to_le_bytes());
    out.extend(value.as_bytes());
}

fn write_value(out: &mut Vec<u8>, value: &GgufValue) {
    let mut kind = |number: u32| out.extend(number.to_le_bytes());
    match value {
        GgufValue::Number(number) => {
            kind(4);
            out.extend(number.to_le_bytes());
        }
        GgufValue::Float(number) => {
            kind(6);
            out.extend(number.to_le_bytes());
        }
        GgufValue::Flag(flag) => {
            kind(7);
            out.push(u8::from(*flag));
        }
        GgufValue::Text(value) => {
            kind(8);
            text(out, value);
        }
        GgufValue::Texts(all) => {
            list(out, 8, all.len());
            all.iter().for_each(|value| text(out, value));
        }
        GgufValue::Floats(all) => {
            list(out, 6, all.len());
            all.iter().for_each(|value| out.extend(value.to_le_bytes()));
        }
        GgufValue::Integers(all) => {
            list(out, 5, all.len());
            all.iter().for_each(|value| out.extend(value.to_le_bytes()));
        }
    }
}

fn list(out: &mut Vec<u8>, kind: u32, count: usize) {
    out.extend(9u32.to_le_bytes());
    out.extend(kind.to_le_bytes());
    out.extend((count as u64).to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::metadata::{Metadata, Value};

    #[test]
    fn what_is_laid_out_is_read_again() {
        let values = [
            ("general.architecture", GgufValue::Text("llama".into())),
            ("number", GgufValue::Number(7)),
            ("float", GgufValue::Float(0.1)),
            ("flag", GgufValue::Flag(true)),
            ("texts", GgufValue::Texts(vec![String::new(), "é".into()])),
            ("floats", GgufValue::Floats(vec![-1.0, 2.5])),
            ("integers", GgufValue::Integers(vec![-3, 4])),
        ];
        let values = values.map(|(key, value)| (key.to_owned(), value));
        let tensor = |name: &str, blocks, shape: &[u64]| GgufTensor {
            name: name.into(),
            blocks,
            shape: shape.to_vec(),
        };
        let tensors = [
            tensor("a", Blocks::F32, &[3]),
            tensor("b", Blocks::Q4_0, &[5, 64]),
            tensor("c", Blocks::Bf16, &[2, 3, 32]),
            tensor("empty", Blocks::F16, &[0]),
        ];
        let layout = GgufLayout::new(&values, &tensors).unwrap();
        assert!(layout.header().len().is_multiple_of(32));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.gguf");
        let mut bytes = layout.header().to_vec();
        bytes.resize(layout.bytes() as usize, 0);
        std::fs::write(&path, bytes).unwrap();
        let read = Metadata::read(&path, &std::fs::File::open(&path).unwrap()).unwrap();
        assert_eq!(
            (read.number("number"), read.float("float"), read.flag("flag")),
            (Some(7), Some(0.1), Some(true))
        );
        assert_eq!(read.texts("texts"), Some(&[String::new(), "é".to_owned()][..]));
        assert_eq!(read.get("floats"), Some(&Value::Floats(vec![-1.0, 2.5])));
        assert_eq!(read.get("integers"), Some(&Value::Integers(vec![-3, 4])));
        for (number, (stored, tensor)) in read.tensors.iter().zip(&tensors).enumerate() {
            assert_eq!(
                (&stored.name, &stored.shape, stored.blocks),
                (&tensor.name, &tensor.shape, tensor.blocks)
            );
            assert_eq!(layout.offset(number), Some(read.data_start + stored.offset));
        }
        assert_eq!(layout.offset(4), None);
        let error = GgufLayout::new(&[], &[tensor("odd", Blocks::Q8_0, &[4, 33])]).unwrap_err().to_string();
        assert!(error.contains("odd") && error.contains("q8_0"), "{error}");
    }
}
