//! What every method says of itself, and what its survey hands to its encoder.
//!
//! ```text
//! headers:  which tensors suit, as units --> expected bytes, size of a piece
//! data:     survey --> Coding (encoding, exact components) --> encode
//!                 '--> why not: the unit's tensors stay raw
//! ```

use std::collections::BTreeMap;

use llmpress_formats::encoding::{ComponentSpec, Encoding};
use llmpress_formats::{Checkpoint, Digest, Dtype, PatternDict, ShardWriter, Tensor, UnitPattern};

use super::timed::Timed;
use crate::sink::{Encoded, Slots};
use crate::source::UnitSource;
use crate::work::Work;
use crate::{Error, Result};

/// How a tensor by itself takes to a method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fit {
    /// It can be stored so.
    Suits,
    /// Byte planes are the next best.
    Planes,
    /// It is kept as it is.
    Raw,
}

/// What a method may go by when it makes units of several tensors.
pub(crate) struct Asked<'a> {
    pub(crate) checkpoint: &'a Checkpoint,
    /// Whether the recipe gives a tensor to this method.
    pub(crate) wanted: &'a dyn Fn(&str) -> bool,
    /// The recipe's `pattern_dict`.
    pub(crate) patterns: Option<&'a PatternDict>,
    /// The recipe's `tied_embedding`.
    pub(crate) tied_embedding: bool,
}

/// A method of storing tensors.
pub(crate) trait Room: Sync {
    /// The name on the command line, in recipes and in plans.
    fn name(&self) -> &'static str;

    /// Whether it holds BF16 only, so that finding none is a mistake.
    fn bf16_only(&self) -> bool {
        false
    }

    /// Whether it wants matrices that another tool quantised as the numbers that they stand for, and not as they are packed.
    fn takes_numbers(&self) -> bool {
        self.bf16_only()
    }

    /// Whether it makes units of several tensors by patterns, which a recipe may give.
    fn takes_patterns(&self) -> bool {
        false
    }

    /// Refuses a source that it can make nothing of.
    fn check_source(&self, _checkpoint: &Checkpoint) -> Result<()> {
        Ok(())
    }

    /// The units that it makes of several tensors; every other tensor is a unit by itself.
    fn groups(&self, _asked: &Asked<'_>) -> Result<Vec<UnitPattern>> {
        Ok(Vec::new())
    }

    /// How a tensor outside its groups takes to it.
    fn fit(&self, tensor: &Tensor) -> Fit;

    /// What trained weights of a unit usually come to: `tensor` if it is a unit by itself, of `bytes` together.
    fn expected_bytes(&self, tensor: Option<&Tensor>, bytes: u64) -> u64;

    /// The last parts of the names that it stores components under, other than a tensor's own.
    fn components(&self) -> &'static [&'static str];

    /// Bytes of a tensor of its that must be worked on as a whole.
    fn indivisible_bytes(&self, _tensor: &Tensor) -> u64 {
        0
    }

    /// Bytes of a tensor of its that are best worked on as a whole, where memory allows.
    fn handy_bytes(&self, _tensor: &Tensor) -> u64 {
        0
    }

    /// How tensors lie in a GPU's memory that it stores by itself, where nothing else is asked for; what a GPU decodes when it is loaded is raw.
    fn on_gpu(&self) -> Encoding {
        Encoding::Raw
    }

    /// How often a unit's bytes are read.
    fn reads(&self) -> u64 {
        2
    }

    /// GB/s of source that a core takes through a whole conversion, as measured in docs/benchmarks.md ("On one core"); a careful figure where
    /// it was not measured.
    fn gb_per_second(&self) -> f64 {
        0.1
    }

    /// What to say where none of a checkpoint's tensors suits, of which there are `found`.
    fn nothing_suits(&self, found: &str, _has_bf16: bool) -> String {
        format!("{} holds BF16 matrices, and this checkpoint has {found}; use --to planes", self.name())
    }

    /// Its coders in memory for tensors of this dtype, for whoever times them; `None` where there is nothing to time.
    fn timed(&self, _dtype: Dtype) -> Option<Box<dyn Timed>> {
        None
    }

    /// Reads a unit and settles how it is stored.
    fn survey(&self, unit: &UnitSource<'_>, first: &Tensor, work: Work<'_>) -> Result<Survey>;
}

/// A coding, or why the method does not do for this unit.
pub(crate) type Survey = Result<Coding, String>;

/// How a unit will be stored.
pub(crate) struct Coding {
    pub(crate) encoding: Encoding,
    /// The components; upper bounds where the encoder streams.
    pub(crate) spec: Vec<ComponentSpec>,
    /// Bytes that a reader decodes as a whole: ranges are compared in multiples of them.
    pub(crate) step: usize,
    pub(crate) encoder: Encoder,
    /// Why it is not quite what was asked for, if it is not.
    pub(crate) fallback: Option<String>,
}

/// Writes a unit's components.
pub(crate) enum Encoder {
    /// Into slots of known size, many units side by side.
    Sized(Box<dyn SizedEncoder>),
    /// At the end of the shard: sizes are known afterwards.
    Streamed(Box<dyn StreamedEncoder>),
}

/// An encoder whose survey settled the size of every component.
pub(crate) trait SizedEncoder: Send + Sync {
    /// Encodes the unit into its slots.
    fn encode(&self, unit: &UnitSource<'_>, slots: Slots, work: Work<'_>) -> Result<Encoded>;
}

/// An encoder whose sizes are known when it is done.
pub(crate) trait StreamedEncoder: Send + Sync {
    /// Encodes the unit called `name` at the end of the shard so far and places its components.
    fn encode(
        &self,
        name: &str,
        unit: &UnitSource<'_>,
        writer: &mut ShardWriter,
        work: Work<'_>,
    ) -> Result<(Encoded, Slots)>;
}

/// Writes nothing: the tensor is stored elsewhere, as bytes that have this digest.
pub(crate) struct Elsewhere {
    pub(crate) digest: Digest,
    /// How often the unit would have been read until now.
    pub(crate) reads: u64,
}

impl SizedEncoder for Elsewhere {
    fn encode(&self, unit: &UnitSource<'_>, _slots: Slots, work: Work<'_>) -> Result<Encoded> {
        work.progress.advance(unit.bytes() * self.reads);
        let tensors = unit.tensors().iter().map(|tensor| (tensor.name.clone(), self.digest)).collect();
        Ok(Encoded { tensors, components: BTreeMap::new() })
    }
}

/// Why components that are as large as the source are not worth having.
pub(crate) fn would_not_shrink(spec: &[ComponentSpec], source_bytes: u64) -> Option<String> {
    let sizes = spec.iter().map(|c| c.dtype.byte_len(&c.shape));
    let bytes = sizes.sum::<Option<u64>>().unwrap_or(u64::MAX);
    (bytes >= source_bytes).then(|| format!("would take {bytes} bytes instead of {source_bytes}"))
}

/// `percent` of `bytes`.
pub(crate) fn share(bytes: u64, percent: u64) -> u64 {
    (u128::from(bytes) * u128::from(percent) / 100) as u64
}

/// A unit that needs a tensor which is not there.
pub(crate) fn missing_tensor(checkpoint: &Checkpoint, unit: &UnitPattern, name: &str) -> Error {
    let near = checkpoint.tensor(name).err().map(|e| e.to_string()).unwrap_or_default();
    Error::Invalid(format!("unit {} needs tensor {name}: {near}", unit.unit))
}
