//! `archive`: floats of 16 or 8 bits for storage and transfer, in chunks of 2^18 elements.
//!
//! ```text
//! <tensor>.chunks    U8 [B]           chunk after chunk
//! <tensor>.lengths   U8 [chunks, 4]   u32 stored length of each
//! <tensor>.model     U8 [M]           a zstd frame: frequencies of each class, scales of rows and of columns
//! ```

use llmpress_entropy::archive::{
    CHUNK_ELEMENTS, Decoder, Layout, Model, Parameters, Scales, classes, narrow,
};
use serde::{Deserialize, Serialize};

use super::chunked::{Chunked, Fault};
use super::{ComponentSet, ComponentSpec, Part, single};
use crate::{Dtype, Error, Result};

pub use super::chunked::{CHUNKS, LENGTHS};

/// What they share.
pub const MODEL: &str = "model";
/// All of them.
pub const COMPONENTS: [&str; 3] = [CHUNKS, LENGTHS, MODEL];

/// More than the frequencies of all classes take.
const MAX_TABLES: u64 = 1 << 15;

/// The parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Archive {
    /// Bits of a magnitude that no symbol takes.
    pub low: u32,
    /// The upper part of a magnitude that is symbol 1, less 1.
    pub base: u16,
    /// Classes of elements, each of which has frequencies of its own.
    pub classes: usize,
    /// By how many bits the sum of a row's and a column's scale is shifted to give the class.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub shift: u32,
}

fn is_zero(shift: &u32) -> bool {
    *shift == 0
}

impl Archive {
    /// Those of a model.
    pub fn of(model: &Model) -> Self {
        Self { low: model.low(), base: model.base(), classes: model.classes(), shift: model.shift() }
    }
}

/// How the words of a dtype are read; `None` for those that it does not hold.
pub fn layout(dtype: Dtype) -> Option<Layout> {
    match dtype {
        Dtype::BF16 => Some(Layout::BF16),
        Dtype::F16 => Some(Layout::F16),
        Dtype::F8_E4M3 => Some(Layout::F8_E4M3),
        Dtype::F8_E5M2 => Some(Layout::F8_E5M2),
        _ => None,
    }
}

/// Rows and columns: all dimensions but the last, and the last.
pub fn sides(shape: &[u64]) -> (u64, u64) {
    let cols = shape.last().copied().unwrap_or(1);
    let rows =
        shape.split_last().map_or(1, |(_, rows)| rows.iter().fold(1, |all: u64, n| all.saturating_mul(*n)));
    (rows, cols)
}

/// Bytes of a chunk, decoded; none of a dtype that it does not hold.
pub fn chunk_bytes(dtype: Dtype) -> usize {
    CHUNK_ELEMENTS * dtype.bits() as usize / 8
}

/// The components of a tensor of `elements` whose chunks and model take so many bytes.
pub fn components(elements: u64, chunks: u64, model: u64) -> Vec<ComponentSpec> {
    let count = elements.div_ceil(CHUNK_ELEMENTS as u64);
    vec![
        ComponentSpec { name: CHUNKS, dtype: Dtype::U8, shape: vec![chunks] },
        ComponentSpec { name: LENGTHS, dtype: Dtype::U8, shape: vec![count, 4] },
        ComponentSpec { name: MODEL, dtype: Dtype::U8, shape: vec![model] },
    ]
}

/// Reads any elements of what was coded so.
#[derive(Debug)]
pub(super) struct Reader {
    chunked: Chunked,
    dtype: Dtype,
    model: Model,
    scales: Scales,
}

impl Reader {
    pub(super) fn open(set: ComponentSet<'_>, parts: &[Part], archive: Archive) -> Result<Self> {
        let part = single(&set, parts)?;
        if layout(part.dtype).is_none() {
            return Err(Error::Invalid(format!(
                "unit {}: tensor {} is {}, but the encoding holds floats of 16 and of 8 bits only",
                set.unit(),
                part.name,
                part.dtype.name()
            )));
        }
        let elements = part.bytes / (u64::from(part.dtype.bits()) / 8);
        let chunked = Chunked::open(&set, elements)?;
        let stored = set.get(MODEL)?;
        let (rows, cols) = if archive.classes == 1 { (0, 0) } else { sides(&part.shape) };
        // The chunks hold the elements, so that no more is allocated than a multiple of what is there.
        if rows.saturating_add(cols) > elements {
            return Err(stored.corrupt("has more scales than elements".to_owned()));
        }
        let most = (rows + cols).saturating_mul(2).saturating_add(MAX_TABLES);
        let Archive { low, base, classes, shift } = archive;
        let parameters = Parameters { low, base, shift, classes };
        let (model, scales) =
            Model::unpack(parameters, rows as usize, cols as usize, &stored.read_all(most)?)
                .map_err(|e| stored.corrupt(e.to_string()))?;
        Ok(Self { chunked, dtype: part.dtype, model, scales })
    }

    pub(super) fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        if self.dtype.bits() == 16 {
            return super::with_words(offset, out, |first, words| self.words(first, words));
        }
        let mut words = vec![0u16; out.len().min(CHUNK_ELEMENTS)];
        let mut first = offset;
        for piece in out.chunks_mut(CHUNK_ELEMENTS) {
            let words = words.get_mut(..piece.len()).unwrap_or_default();
            self.words(first, words)?;
            narrow(words, piece);
            first += piece.len() as u64;
        }
        Ok(())
    }

    /// Decodes elements `first..`.
    fn words(&self, first: u64, out: &mut [u16]) -> Result<()> {
        let decoder = Decoder::new(&self.model);
        let (rows, cols) = (&self.scales.rows, &self.scales.cols);
        let mut of_elements = Vec::new();
        self.chunked.words(first, out, |start, stored, words| -> Result<(), Fault> {
            classes(&self.model, rows, cols, start, words.len(), &mut of_elements)?;
            Ok(decoder.decode_chunk(&of_elements, stored, words)?)
        })
    }
}
