//! A checkpoint with the names, shapes and texts that C sees of it.

use std::collections::BTreeMap;
use std::ffi::{CString, c_char};
use std::ops::Range;
use std::path::Path;

use llmpress_formats::{Base, Checkpoint, Dtype, Error};

use crate::fault::invalid;

/// An open checkpoint.
pub struct LlmpressCheckpoint {
    checkpoint: Checkpoint,
    config: Option<CString>,
    /// In the order of the checkpoint's tensors.
    names: Vec<CString>,
    /// Names of dtypes and encodings.
    words: BTreeMap<&'static str, CString>,
}

/// A tensor. What it points to is its checkpoint's.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct LlmpressTensor {
    /// Its name.
    pub name: *const c_char,
    /// The dtype that it decodes to, as safetensors calls it: "BF16", "F32".
    pub dtype: *const c_char,
    /// How it is stored: "raw", "dfloat11", "fixed12", "planes", "abq", "sparse24", "lowrank" or another tool's.
    pub encoding: *const c_char,
    /// `rank` sizes, the outermost first.
    pub shape: *const u64,
    /// How many dimensions it has; 0 of a single number.
    pub rank: usize,
    /// Its size when it is decoded.
    pub bytes: u64,
}

impl LlmpressCheckpoint {
    pub(crate) fn open(path: &Path, numbers: bool, base: Option<&Path>) -> Result<Self, Error> {
        let mut checkpoint =
            if numbers { Checkpoint::open_dequantised(path) } else { Checkpoint::open(path) }?;
        if let Some(base) = base {
            checkpoint = checkpoint.with_base(&Base::open(base)?)?;
        }
        let with_nul = |what: &str| {
            Error::unsupported(path, None, format!("{what} holds a NUL, which no string of C can: rename it"))
        };
        let name =
            |name: &String| CString::new(name.as_str()).map_err(|_| with_nul(&format!("the name {name:?}")));
        let names = checkpoint.tensors().keys().map(name).collect::<Result<_, _>>()?;
        let config = checkpoint.config().map(|config| CString::new(config.text()));
        let config = config.transpose().map_err(|_| with_nul("config.json"))?;
        let encodings = checkpoint.units().values().map(|unit| unit.encoding().name());
        let dtypes = Dtype::ALL.iter().map(|dtype| dtype.name());
        let words =
            encodings.chain(dtypes).map(|word| (word, CString::new(word).unwrap_or_default())).collect();
        Ok(Self { checkpoint, config, names, words })
    }

    pub(crate) fn count(&self) -> usize {
        self.names.len()
    }

    pub(crate) fn config(&self) -> *const c_char {
        self.config.as_ref().map_or(std::ptr::null(), |config| config.as_ptr())
    }

    pub(crate) fn at(&self, index: usize) -> Result<LlmpressTensor, Error> {
        let name = self.names.get(index).ok_or_else(|| {
            invalid(&format!("there is no tensor {index}: there are {}, from 0", self.names.len()))
        })?;
        let tensor = self.checkpoint.tensor(name.to_str().unwrap_or_default())?;
        let encoding = self.checkpoint.unit_of(tensor)?.encoding().name();
        let word = |word: &str| self.words.get(word).map_or(c"".as_ptr(), |word| word.as_ptr());
        Ok(LlmpressTensor {
            name: name.as_ptr(),
            dtype: word(tensor.dtype.name()),
            encoding: word(encoding),
            shape: tensor.shape.as_ptr(),
            rank: tensor.shape.len(),
            bytes: tensor.bytes,
        })
    }

    pub(crate) fn find(&self, name: &str) -> Result<LlmpressTensor, Error> {
        // Names come sorted.
        let index = self.names.binary_search_by(|own| own.as_bytes().cmp(name.as_bytes()));
        match index {
            Ok(index) => self.at(index),
            // Which says the nearest name there is.
            Err(_) => Err(self.checkpoint.tensor(name).err().unwrap_or_else(|| invalid(name))),
        }
    }

    /// Before a buffer is looked at.
    pub(crate) fn check_size(&self, name: &str, bytes: usize) -> Result<(), Error> {
        let tensor = self.checkpoint.tensor(name)?;
        if tensor.bytes != bytes as u64 {
            return Err(invalid(&format!(
                "tensor {name}: takes {} bytes, and out has {bytes}",
                tensor.bytes
            )));
        }
        Ok(())
    }

    pub(crate) fn read(&self, name: &str, out: &mut [u8]) -> Result<(), Error> {
        self.checkpoint.read(name, 0, out)
    }

    pub(crate) fn read_rows(&self, name: &str, rows: Range<u64>, out: &mut [u8]) -> Result<(), Error> {
        self.checkpoint.read_rows(name, rows, out)
    }
}
