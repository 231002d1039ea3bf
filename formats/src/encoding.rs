//! The encodings: how the logical tensors of a unit are stored as component tensors.
//!
//! ```text
//! unit --+-- tensors:    logical names, dtypes, shapes, flattened row-major and joined in order
//!        +-- encoding:   a name and a few parameters
//!        +-- components: stored tensors "<unit>.<component>"
//! ```
//!
//! One file per encoding below this one: the components it stores and the reader that decodes any
//! element range of it.

pub mod abq;
pub mod archive;
mod chunked;
pub mod delta;
pub mod dfloat11;
pub mod dfloat8;
pub mod fixed12;
pub mod foreign;
pub mod ggml;
pub mod lowrank;
mod nested;
mod packed;
pub mod planes;
pub mod raw;
pub mod scaled;
pub mod sparse24;

use serde::{Deserialize, Serialize};

use crate::{Base, Component, Dtype, Error, Named, Result};
use foreign::{Codes, Foreign};
use ggml::Ggml;
pub use packed::PackedUnit;
use scaled::Scaled;

/// An encoding and its parameters, as the manifest stores them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "lowercase")]
pub enum Encoding {
    /// The tensor's own bytes under its own name.
    Raw,
    /// Byte planes through zstd ([`planes`]).
    Planes {
        /// Elements are rotated left by one bit before they are split (IEEE floats).
        rotate: bool,
    },
    /// DFloat11, as the published format stores it ([`dfloat11`]).
    Dfloat11,
    /// FP8 in DFloat11's stream ([`dfloat8`]).
    Dfloat8,
    /// Sign and mantissa bytes and 4-bit exponent codes in tiles ([`fixed12`]).
    Fixed12 {
        /// What is added to a code and the sign to give the exponent.
        base: i16,
    },
    /// Floats of 16 or 8 bits as small as their magnitudes allow ([`archive`]).
    Archive(archive::Archive),
    /// By the tensor of the same name in another checkpoint ([`delta`]).
    Delta(delta::Delta),
    /// The bytes of another tensor of the checkpoint, which has the same dtype and shape.
    Same {
        /// Its name.
        tensor: String,
    },
    /// Codes of 1 to 8 bits as bit planes ([`abq`]).
    Abq(abq::Abq),
    /// Two kept values in four, and where they lie ([`sparse24`]).
    Sparse24(sparse24::Sparse24),
    /// What another encoding holds, and a sum for every block of inputs ([`lowrank`]).
    Lowrank(lowrank::Lowrank),
    /// As another tool quantised it ([`foreign`]): read only, in no manifest.
    #[serde(skip_deserializing)]
    Foreign(Foreign),
    /// As small floats with scales ([`scaled`]): read only, in no manifest.
    #[serde(skip_deserializing)]
    Scaled(Scaled),
    /// As ggml stores it in GGUF files ([`ggml`]): read only, in no manifest.
    #[serde(skip_deserializing)]
    Ggml(Ggml),
}

impl Encoding {
    /// Every encoding this version reads, by its name in the manifest.
    pub const NAMES: [&'static str; 11] = [
        "raw", "planes", "dfloat11", "dfloat8", "fixed12", "archive", "delta", "same", "abq", "sparse24",
        "lowrank",
    ];

    /// The name in the manifest.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Planes { .. } => "planes",
            Self::Dfloat11 => "dfloat11",
            Self::Dfloat8 => "dfloat8",
            Self::Fixed12 { .. } => "fixed12",
            Self::Archive(_) => "archive",
            Self::Delta(_) => "delta",
            Self::Same { .. } => "same",
            Self::Abq(_) => "abq",
            Self::Sparse24(_) => "sparse24",
            Self::Lowrank(_) => "lowrank",
            Self::Foreign(foreign) => foreign.name(),
            Self::Scaled(scaled) => scaled.name(),
            Self::Ggml(ggml) => ggml.blocks.name(),
        }
    }

    /// The last parts of the names of its components, whether a unit has all of them or not.
    pub fn component_names(&self) -> &'static [&'static str] {
        match self {
            Self::Raw => &[raw::DATA],
            Self::Planes { .. } => &[planes::PLANES, planes::LENGTHS],
            Self::Dfloat11 => &dfloat11::COMPONENTS,
            Self::Dfloat8 => &dfloat8::COMPONENTS,
            Self::Fixed12 { .. } => &fixed12::COMPONENTS,
            Self::Archive(_) => &archive::COMPONENTS,
            Self::Delta(_) => &delta::COMPONENTS,
            Self::Same { .. } => &[],
            Self::Abq(_) => &abq::COMPONENTS,
            Self::Sparse24(_) => &sparse24::COMPONENTS,
            Self::Lowrank(_) => &lowrank::COMPONENTS,
            Self::Foreign(_) => &foreign::COMPONENTS,
            Self::Scaled(_) => &scaled::COMPONENTS,
            Self::Ggml(_) => &[raw::DATA],
        }
    }

    /// What of its parameters says how many bits a weight takes, as recipes write it: `w4,g128` of `abq`, `2:4,w4` of
    /// `sparse24`, `2:4+s16` of `lowrank`, `e4m3,128x128` of small floats, `q4_k` of ggml; none for the others.
    pub fn widths(&self) -> Option<String> {
        match self {
            Self::Abq(abq) => Some(abq.widths()),
            Self::Sparse24(sparse) => Some(sparse.widths()),
            Self::Lowrank(lowrank) => Some(lowrank.widths()),
            Self::Scaled(scaled) => Some(scaled.widths()),
            Self::Ggml(ggml) => ggml.widths(),
            Self::Raw | Self::Planes { .. } | Self::Dfloat11 | Self::Fixed12 { .. } => None,
            Self::Dfloat8 | Self::Archive(_) | Self::Delta(_) | Self::Same { .. } | Self::Foreign(_) => None,
        }
    }

    /// Whether it holds other values than the tensors had: what it decodes to is what they are from then on. Small floats of other
    /// tools, and blocks of ggml, are what their numbers are made of, and no encoding that is kept.
    pub fn is_lossy(&self) -> bool {
        match self {
            Self::Raw | Self::Planes { .. } | Self::Dfloat11 | Self::Fixed12 { .. } => false,
            Self::Dfloat8 | Self::Archive(_) | Self::Delta(_) | Self::Same { .. } => false,
            Self::Scaled(_) | Self::Ggml(_) => false,
            Self::Sparse24(sparse) => sparse.is_lossy(),
            Self::Abq(_) | Self::Lowrank(_) | Self::Foreign(_) => true,
        }
    }
}

/// The last parts of the names of all components that lossy encodings have.
pub static LOSSY_COMPONENTS: std::sync::LazyLock<Vec<&'static str>> =
    std::sync::LazyLock::new(|| [&abq::COMPONENTS[..], &sparse24::COMPONENTS, &lowrank::COMPONENTS].concat());

/// A component that is to be written: what the shard's header says of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ComponentSpec {
    /// The last part of the stored name (`<unit>.<name>`); `data` of a raw tensor stands for the
    /// tensor's own name.
    pub name: &'static str,
    /// The stored dtype.
    pub dtype: Dtype,
    /// The stored shape.
    pub shape: Vec<u64>,
}

/// The name under which `component` of `unit` is stored.
pub fn stored_name(unit: &str, encoding: &Encoding, component: &str) -> String {
    match encoding {
        Encoding::Raw | Encoding::Ggml(_) => unit.to_owned(),
        Encoding::Foreign(foreign) => {
            foreign.layout.stored_name(unit.strip_suffix(".weight").unwrap_or(unit), component)
        }
        _ => format!("{unit}.{component}"),
    }
}

/// One logical tensor of a unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// The logical name.
    pub name: String,
    /// Its dtype.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<u64>,
    /// Its size in bytes when decoded.
    pub bytes: u64,
}

/// Decodes ranges of one stored unit. `Send + Sync`; holds only small tables.
#[derive(Debug)]
pub struct UnitReader(Kind);

#[derive(Debug)]
enum Kind {
    Raw(raw::Reader),
    Planes(planes::Reader),
    Dfloat11(dfloat11::Reader),
    Dfloat8(dfloat8::Reader),
    Fixed12(fixed12::Reader),
    Archive(Box<archive::Reader>),
    Delta(Box<delta::Reader>),
    Abq(abq::Reader),
    Sparse24(sparse24::Reader),
    Lowrank(Box<lowrank::Reader>),
    Foreign(Codes),
    Scaled(Box<scaled::Reader>),
    Ggml(ggml::Reader),
}

impl UnitReader {
    /// Checks the components of a unit against its encoding and the shapes of its tensors, and
    /// reads the small tables (code, positions, lengths).
    pub fn open(
        unit: &str,
        encoding: &Encoding,
        parts: &[Part],
        components: &Named<Component>,
    ) -> Result<Self> {
        Self::open_on(unit, encoding, parts, components, None)
    }

    /// The same of a unit that may be stored by that of a base.
    ///
    /// # Errors
    /// As for [`Self::open`]; a base that is not the one that it was stored with.
    pub fn open_on(
        unit: &str,
        encoding: &Encoding,
        parts: &[Part],
        components: &Named<Component>,
        base: Option<&Base>,
    ) -> Result<Self> {
        let set = ComponentSet { unit, prefix: "", components };
        Ok(Self(match encoding {
            Encoding::Raw => Kind::Raw(raw::Reader::open(set, parts)?),
            Encoding::Planes { rotate } => Kind::Planes(planes::Reader::open(set, parts, *rotate)?),
            Encoding::Dfloat11 => Kind::Dfloat11(dfloat11::Reader::open(set, parts)?),
            Encoding::Dfloat8 => Kind::Dfloat8(dfloat8::Reader::open(set, parts)?),
            Encoding::Fixed12 { base } => Kind::Fixed12(fixed12::Reader::open(set, parts, *base)?),
            Encoding::Archive(archive) => {
                Kind::Archive(Box::new(archive::Reader::open(set, parts, *archive)?))
            }
            Encoding::Delta(delta) => Kind::Delta(Box::new(delta::Reader::open(set, parts, *delta, base)?)),
            Encoding::Same { tensor } => {
                return Err(Error::Invalid(format!("unit {unit}: is stored as tensor {tensor}")));
            }
            Encoding::Abq(abq) => Kind::Abq(abq::Reader::open(set, parts, *abq)?),
            Encoding::Sparse24(sparse) => Kind::Sparse24(sparse24::Reader::open(set, parts, *sparse)?),
            Encoding::Lowrank(lowrank) => {
                Kind::Lowrank(Box::new(lowrank::Reader::open(set, parts, *lowrank)?))
            }
            Encoding::Foreign(foreign) => Kind::Foreign(Codes::open(set, parts, *foreign)?),
            Encoding::Ggml(ggml) => Kind::Ggml(ggml::Reader::open(set, parts, *ggml)?),
            Encoding::Scaled(_) => {
                return Err(Error::Invalid(format!("unit {unit}: its components are units")));
            }
        }))
    }

    /// Of small floats, whose components are units themselves.
    pub(crate) fn scaled(
        part: &Part,
        scaled: Scaled,
        component: impl FnMut(&str) -> Result<UnitReader>,
    ) -> Result<Self> {
        Ok(Self(Kind::Scaled(Box::new(scaled::Reader::open(part, scaled, component)?))))
    }

    /// The codes of a matrix that another tool quantised.
    pub fn codes(&self) -> Option<&Codes> {
        match &self.0 {
            Kind::Foreign(codes) => Some(codes),
            _ => None,
        }
    }

    /// Some rows of an `abq` matrix as they are stored; `None` for other encodings.
    pub fn packed_rows(&self, rows: std::ops::Range<u64>) -> Option<Result<abq::Packed<'static>>> {
        match &self.0 {
            Kind::Abq(reader) => Some(reader.packed_rows(rows)),
            _ => None,
        }
    }

    /// Some rows of a `sparse24` matrix as they are stored (values in `fixed12` are decoded); `None` for other encodings.
    pub fn sparse_rows(&self, rows: std::ops::Range<u64>) -> Option<Result<sparse24::Packed<'static>>> {
        match &self.0 {
            Kind::Sparse24(reader) => Some(reader.packed_rows(rows)),
            _ => None,
        }
    }

    /// Some rows of a `lowrank` matrix as they are stored; `None` for other encodings.
    pub fn lowrank_rows(&self, rows: std::ops::Range<u64>) -> Option<Result<lowrank::Packed<'static>>> {
        match &self.0 {
            Kind::Lowrank(reader) => Some(reader.packed_rows(rows)),
            _ => None,
        }
    }

    /// Rows of stored matrices that the tensor is the transpose of; `None` for other encodings.
    pub(crate) fn stored_rows(&self, rows: std::ops::Range<u64>, out: &mut [u8]) -> Option<Result<()>> {
        match &self.0 {
            Kind::Scaled(reader) => Some(reader.read_stored(rows, out)),
            _ => None,
        }
    }

    /// What small floats are multiplied with, block by block in rows of blocks, in single precision; `None` for other encodings.
    pub(crate) fn scales(&self) -> Option<Result<Vec<f32>>> {
        match &self.0 {
            Kind::Scaled(reader) => Some(reader.all_scales()),
            _ => None,
        }
    }

    /// Decodes bytes `offset .. offset + out.len()` of the unit: its tensors' little-endian bytes,
    /// joined in order. Both ends must lie on whole elements.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        if out.is_empty() {
            return Ok(());
        }
        match &self.0 {
            Kind::Raw(r) => r.read(offset, out),
            Kind::Planes(r) => r.read(offset, out),
            Kind::Archive(r) => r.read(offset, out),
            Kind::Delta(r) => r.read(offset, out),
            Kind::Dfloat8(r) => r.read(offset, out),
            Kind::Abq(r) => r.read(offset, out),
            Kind::Sparse24(r) => r.read(offset, out),
            Kind::Lowrank(r) => r.read(offset, out),
            Kind::Foreign(r) => r.read(offset, out),
            Kind::Scaled(r) => r.read(offset, out),
            Kind::Ggml(r) => r.read(offset, out),
            Kind::Dfloat11(r) => with_words(offset, out, |first, words| r.read(first, words)),
            Kind::Fixed12(r) => with_words(offset, out, |first, words| r.read(first, words)),
        }
    }
}

/// The components of a unit, or of an encoding inside of its own, by name, with errors that say what is missing.
#[derive(Clone, Copy)]
pub(crate) struct ComponentSet<'a> {
    unit: &'a str,
    /// What the names of these begin with in the unit, a full stop at its end; empty for those of the unit itself.
    prefix: &'static str,
    components: &'a Named<Component>,
}

impl<'a> ComponentSet<'a> {
    /// The unit's name, for errors.
    pub(crate) fn unit(&self) -> &'a str {
        self.unit
    }

    /// The components of this name, if there is one.
    pub(crate) fn find(&self, name: &str) -> Option<&'a Component> {
        match self.prefix {
            "" => self.components.get(name),
            _ => self.components.get(nested::full_name(self.prefix, name)?),
        }
    }

    pub(crate) fn get(&self, name: &str) -> Result<Component> {
        self.find(name).cloned().ok_or_else(|| {
            Error::Invalid(format!("unit {}: component {}{name} is missing", self.unit, self.prefix))
        })
    }

    /// The names of all of them, without what they begin with.
    pub(crate) fn names(&self) -> impl Iterator<Item = &'a str> {
        let prefix = self.prefix;
        self.components.keys().filter_map(move |name| name.strip_prefix(prefix))
    }

    /// The components of an encoding inside of this one.
    pub(crate) fn within(&self, prefix: &'static str) -> Self {
        Self { prefix: nested::join(self.prefix, prefix), ..*self }
    }
}

/// The single tensor of a unit that cannot hold several.
pub(crate) fn single<'a>(set: &ComponentSet<'_>, parts: &'a [Part]) -> Result<&'a Part> {
    match parts {
        [part] => Ok(part),
        _ => Err(Error::Invalid(format!(
            "unit {}: holds {} tensors where its encoding holds one",
            set.unit,
            parts.len()
        ))),
    }
}

/// Refuses tensors of another dtype than BF16.
pub(crate) fn require_bf16(set: &ComponentSet<'_>, parts: &[Part]) -> Result<()> {
    match parts.iter().find(|p| p.dtype != Dtype::BF16) {
        None => Ok(()),
        Some(p) => Err(Error::Invalid(format!(
            "unit {}: tensor {} is {}, but the encoding holds BF16 only",
            set.unit,
            p.name,
            p.dtype.name()
        ))),
    }
}

/// Gives `decode` the 16-bit words behind `out`; an unaligned buffer is filled through a small
/// aligned one.
fn with_words(
    offset: u64,
    out: &mut [u8],
    mut decode: impl FnMut(u64, &mut [u16]) -> Result<()>,
) -> Result<()> {
    if !offset.is_multiple_of(2) || !out.len().is_multiple_of(2) {
        return Err(Error::Invalid(format!(
            "byte range {offset}..{} does not lie on whole BF16 words",
            offset.saturating_add(out.len() as u64)
        )));
    }
    if let Ok(words) = bytemuck::try_cast_slice_mut::<u8, u16>(out) {
        return decode(offset / 2, words);
    }
    let mut scratch = vec![0u16; out.len().div_ceil(2).min(1 << 16)];
    let mut first = offset / 2;
    for piece in out.chunks_mut(scratch.len() * 2) {
        let words = &mut scratch[..piece.len() / 2];
        decode(first, words)?;
        piece.copy_from_slice(bytemuck::cast_slice(words));
        first += words.len() as u64;
    }
    Ok(())
}
