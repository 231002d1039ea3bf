//! `delta`: a tensor by that of the same name, dtype and shape in another checkpoint, the base.
//!
//! ```text
//! nothing            it has the same bytes
//! <tensor>.chunks    U8 [B]           chunk after chunk: each element's difference from the base's
//! <tensor>.lengths   U8 [chunks, 4]   u32 stored length of each
//! <tensor>.model     U8 [M]           a zstd frame: frequencies of each class
//! ```

use llmpress_entropy::archive::{
    CHUNK_ELEMENTS, Decoder, DifferenceChoice, Layout, Model, add_to_base, classes_of_base, narrow, widen,
};
use serde::{Deserialize, Serialize};

use super::archive::{self, CHUNKS, LENGTHS, MODEL};
use super::chunked::{Chunked, Fault};
use super::{ComponentSet, Part, single};
use crate::base::{Base, BaseTensor};
use crate::{Digest, Dtype, Error, Result};

/// All components.
pub const COMPONENTS: [&str; 3] = [CHUNKS, LENGTHS, MODEL];

/// More than the frequencies of all classes take.
const MAX_TABLES: u64 = 1 << 15;

/// The parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delta {
    /// BLAKE3 of the bytes of the base's tensor.
    pub base_blake3: Digest,
    /// How differences are coded; without it there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub coded: Option<Coded>,
}

/// How differences are coded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Coded {
    /// Bits of a difference that no symbol takes.
    pub low: u32,
    /// The exponent of the base's elements of class 0; lower ones are of the classes that follow.
    pub top: u8,
    /// Classes of elements, each of which has frequencies of its own.
    pub classes: usize,
}

impl Coded {
    /// Those of a choice.
    pub fn of(choice: &DifferenceChoice) -> Self {
        Self { low: choice.model.low(), top: choice.top, classes: choice.model.classes() }
    }
}

/// Reads any elements of what was coded so.
#[derive(Debug)]
pub(super) struct Reader {
    base: BaseTensor,
    dtype: Dtype,
    differences: Option<Differences>,
}

#[derive(Debug)]
struct Differences {
    layout: Layout,
    chunked: Chunked,
    model: Model,
    top: u8,
}

impl Reader {
    pub(super) fn open(
        set: ComponentSet<'_>,
        parts: &[Part],
        delta: Delta,
        base: Option<&Base>,
    ) -> Result<Self> {
        let part = single(&set, parts)?;
        let differences = match delta.coded {
            Some(coded) => Some(Differences::open(&set, part, coded)?),
            None => None,
        };
        let unknown = Base::named("a checkpoint that is not named");
        let base = base.unwrap_or(&unknown);
        let base = base.tensor(&part.name, part.dtype, &part.shape, delta.base_blake3)?;
        Ok(Self { base, dtype: part.dtype, differences })
    }

    pub(super) fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let Some(differences) = &self.differences else { return self.base.read(offset, out) };
        if self.dtype.bits() == 16 {
            let read = |first: u64, base: &mut Vec<u16>, _: &mut Vec<u8>| {
                self.base.read(2 * first, bytemuck::cast_slice_mut(base))
            };
            return super::with_words(offset, out, |first, words| differences.words(first, words, read));
        }
        let read = |first: u64, base: &mut Vec<u16>, bytes: &mut Vec<u8>| {
            bytes.resize(base.len(), 0);
            self.base.read(first, bytes)?;
            widen(bytes, base);
            Ok(())
        };
        let mut words = vec![0u16; out.len().min(CHUNK_ELEMENTS)];
        let mut first = offset;
        for piece in out.chunks_mut(CHUNK_ELEMENTS) {
            let words = words.get_mut(..piece.len()).unwrap_or_default();
            differences.words(first, words, read)?;
            narrow(words, piece);
            first += piece.len() as u64;
        }
        Ok(())
    }
}

impl Differences {
    fn open(set: &ComponentSet<'_>, part: &Part, coded: Coded) -> Result<Self> {
        let layout = archive::layout(part.dtype).ok_or_else(|| {
            Error::Invalid(format!(
                "unit {}: tensor {} is {}, but differences are coded of floats of 16 and of 8 bits only",
                set.unit(),
                part.name,
                part.dtype.name()
            ))
        })?;
        let chunked = Chunked::open(set, part.bytes / (u64::from(part.dtype.bits()) / 8))?;
        let stored = set.get(MODEL)?;
        let model = Model::unpack_without_sign(coded.low, coded.classes, &stored.read_all(MAX_TABLES)?)
            .map_err(|e| stored.corrupt(e.to_string()))?;
        Ok(Self { layout, chunked, model, top: coded.top })
    }

    /// Decodes elements `first..`; `read` fills the first buffer with the base's elements from a place, by way of the second.
    fn words(
        &self,
        first: u64,
        out: &mut [u16],
        read: impl Fn(u64, &mut Vec<u16>, &mut Vec<u8>) -> Result<()>,
    ) -> Result<()> {
        let decoder = Decoder::new(&self.model);
        let (mut base, mut bytes, mut classes) = (Vec::new(), Vec::new(), Vec::new());
        self.chunked.words(first, out, |start, stored, words| -> Result<(), Fault> {
            base.resize(words.len(), 0);
            read(start, &mut base, &mut bytes)?;
            classes_of_base(self.layout, self.top, self.model.classes(), &base, &mut classes);
            decoder.decode_chunk(&classes, stored, words)?;
            Ok(add_to_base(&base, words)?)
        })
    }
}
