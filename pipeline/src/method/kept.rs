//! `kept`: the components of a unit whose encoding is lossy, byte for byte. What was quantised stays as it is, whatever
//! the rest is stored as. Codes of other tools become those of `abq`.

use std::collections::BTreeMap;

use llmpress_formats::encoding::abq::{self, Abq, ZeroKind};
use llmpress_formats::encoding::{self, ComponentSpec, Encoding};
use llmpress_formats::foreign::Codes;
use llmpress_formats::{Checkpoint, Component, ComponentEntry, Digest, Error as FormatError, Tensor, Unit};

use super::room::{Coding, Encoder, Fit, Room, SizedEncoder, Survey};
use crate::sink::{Encoded, Sink, Slots, SourceDigests};
use crate::source::UnitSource;
use crate::work::{Work, pieces};
use crate::{Error, Result};

/// Decoded ranges begin and end on whole elements of any dtype.
const STEP: usize = 16;

pub(crate) struct Kept;

/// The unit that keeps a tensor, if its encoding is lossy. What an edit made zero is no longer what its unit stores.
pub(crate) fn kept_unit<'a>(checkpoint: &'a Checkpoint, tensor: &Tensor) -> Option<&'a Unit> {
    let unit = checkpoint.units().get(&tensor.unit)?;
    (unit.encoding().is_lossy() && !tensor.is_zero() && unit.parts().len() == 1).then_some(unit)
}

impl Room for Kept {
    fn name(&self) -> &'static str {
        "kept"
    }

    fn fit(&self, _tensor: &Tensor) -> Fit {
        Fit::Suits
    }

    fn expected_bytes(&self, _tensor: Option<&Tensor>, bytes: u64) -> u64 {
        bytes
    }

    fn components(&self) -> &'static [&'static str] {
        &encoding::LOSSY_COMPONENTS
    }

    fn survey(&self, unit: &UnitSource<'_>, first: &Tensor, _work: Work<'_>) -> Result<Survey> {
        coding(unit, first, &[])
    }
}

/// How a unit is kept: but for components that others store.
pub(super) fn coding(unit: &UnitSource<'_>, first: &Tensor, without: &[&str]) -> Result<Survey> {
    let checkpoint = unit.checkpoint();
    let Some(stored) = kept_unit(checkpoint, first) else {
        return Err(Error::Invalid(format!("unit {}: is stored without loss", first.unit)));
    };
    let wanted = |name: &str| !without.contains(&name);
    if let Some(foreign) = checkpoint.codes(unit.first_name())? {
        return taken_over(foreign, wanted);
    }
    let mut spec = Vec::new();
    let mut parts = Vec::new();
    for &name in stored.encoding().component_names().iter().filter(|name| wanted(name)) {
        let Some(component) = stored.components().get(name) else { continue };
        spec.push(ComponentSpec { name, dtype: component.dtype(), shape: component.shape().to_vec() });
        parts.push((name, component.clone()));
    }
    let encoder = Copy { unit: first.unit.clone(), parts };
    Ok(Ok(Coding {
        encoding: stored.encoding().clone(),
        spec,
        step: STEP,
        encoder: Encoder::Sized(Box::new(encoder)),
        fallback: None,
    }))
}

/// How a matrix that another tool quantised is stored with the same codes, scales and zero points, if `abq` holds them.
fn taken_over(codes: &Codes, wanted: impl Fn(&str) -> bool) -> Result<Survey> {
    let abq = match codes.foreign().abq() {
        Ok(abq) => abq,
        Err(reason) => return Ok(Err(format!("the codes cannot be kept: {reason}"))),
    };
    let zero = if codes.foreign().zeros { ZeroKind::Integer } else { ZeroKind::Symmetric };
    let mut spec = abq::components(&abq, codes.rows(), codes.cols() as u64, codes.dtype(), zero);
    spec.retain(|spec| wanted(spec.name));
    Ok(Ok(Coding {
        encoding: Encoding::Abq(abq),
        spec,
        step: STEP,
        encoder: Encoder::Sized(Box::new(TakeOver { abq, planes: wanted(abq::PLANES) })),
        fallback: None,
    }))
}

/// Writes the codes of another tool as bit planes.
struct TakeOver {
    abq: Abq,
    /// Whether the codes are wanted, and not only scales and zero points.
    planes: bool,
}

impl SizedEncoder for TakeOver {
    fn encode(&self, unit: &UnitSource<'_>, mut slots: Slots, work: Work<'_>) -> Result<Encoded> {
        let name = unit.first_name();
        let codes = unit.checkpoint().codes(name)?;
        let codes = codes.ok_or_else(|| Error::Invalid(format!("tensor {name}: has no codes")))?;
        let (cols, groups) = (codes.cols(), codes.groups());
        let width = codes.dtype().bits() as usize / 8;
        let step = (work.piece_bytes / cols.max(1)).max(1) as u64;
        let strips = || (0..codes.rows()).step_by(step as usize).map(|r| r..(r + step).min(codes.rows()));
        let mut components = BTreeMap::new();
        let (mut buffer, mut words) = (Vec::new(), Vec::new());
        // A plane lies as a whole before the next: the codes are read once for each.
        let wanted = if self.planes { Some(Sink::take(&mut slots, abq::PLANES, work)?) } else { None };
        if let Some(mut planes) = wanted {
            for (plane, rows) in
                (0..self.abq.planes()).flat_map(|plane| strips().map(move |rows| (plane, rows)))
            {
                let count = (rows.end - rows.start) as usize;
                buffer.resize(count * cols, 0);
                codes.read_codes(rows, &mut buffer)?;
                let of_row = cols.div_ceil(abq::WORD_COLUMNS);
                words.resize(count * of_row, 0u32);
                for (codes, words) in buffer.chunks_exact(cols).zip(words.chunks_exact_mut(of_row)) {
                    abq::pack_row(codes, plane, words);
                }
                planes.append(bytemuck::cast_slice(&words))?;
            }
            planes.finish(&mut components)?;
        }
        let mut scale = Sink::take(&mut slots, abq::SCALE, work)?;
        for rows in strips() {
            buffer.resize((rows.end - rows.start) as usize * groups * width, 0);
            codes.read_scales(rows, &mut buffer)?;
            scale.append(&buffer)?;
        }
        scale.finish(&mut components)?;
        if codes.foreign().zeros {
            let mut zero = Sink::take(&mut slots, abq::ZERO, work)?;
            for rows in strips() {
                buffer.resize((rows.end - rows.start) as usize * groups, 0);
                codes.read_zeros(rows, &mut buffer)?;
                zero.append(&buffer)?;
            }
            zero.finish(&mut components)?;
        }
        Ok(Encoded { tensors: decoded_digests(unit, work)?, components })
    }
}

/// The digest of a lossy tensor is that of what it decodes to.
pub(super) fn decoded_digests(unit: &UnitSource<'_>, work: Work<'_>) -> Result<Vec<(String, Digest)>> {
    let mut buffer = Vec::new();
    let mut digests = SourceDigests::new(unit, work.threads);
    for (offset, len) in pieces(unit.bytes(), (work.piece_bytes / STEP).max(1) * STEP) {
        buffer.resize(len, 0);
        unit.read(offset, &mut buffer)?;
        digests.update(&buffer);
        work.progress.advance(len as u64);
    }
    Ok(digests.finish())
}

/// Components to copy.
pub(super) struct Copy {
    pub(super) unit: String,
    pub(super) parts: Vec<(&'static str, Component)>,
}

impl SizedEncoder for Copy {
    fn encode(&self, unit: &UnitSource<'_>, mut slots: Slots, work: Work<'_>) -> Result<Encoded> {
        let mut components = BTreeMap::new();
        self.copy(unit, &mut slots, work, &mut components)?;
        Ok(Encoded { tensors: decoded_digests(unit, work)?, components })
    }
}

impl Copy {
    /// Copies them to where they are to lie.
    pub(super) fn copy(
        &self,
        unit: &UnitSource<'_>,
        slots: &mut Slots,
        work: Work<'_>,
        components: &mut BTreeMap<String, ComponentEntry>,
    ) -> Result<()> {
        let mut buffer = Vec::new();
        for (name, component) in &self.parts {
            let mut sink = Sink::take(slots, name, work)?;
            for (offset, len) in pieces(component.bytes(), work.piece_bytes) {
                buffer.resize(len, 0);
                component.read_at(offset, &mut buffer)?;
                sink.append(&buffer)?;
            }
            sink.finish(components)?;
            self.check(unit.checkpoint(), name, component, components)?;
        }
        Ok(())
    }

    /// A source with a manifest says what the bytes must be, also where they do not show in what they decode to.
    fn check(
        &self,
        checkpoint: &Checkpoint,
        name: &str,
        component: &Component,
        copied: &BTreeMap<String, ComponentEntry>,
    ) -> Result<()> {
        let said = checkpoint.manifest().and_then(|m| m.units.get(&self.unit)?.components.get(name));
        let is_of_source = component.path().parent() == Some(checkpoint.root());
        match (said, copied.get(name)) {
            (Some(said), Some(copied)) if is_of_source && said.blake3 != copied.blake3 => {
                Err(FormatError::corrupt(
                    component.path(),
                    Some(component.name()),
                    "its bytes are not those that the manifest says: get a good copy of this directory",
                )
                .into())
            }
            _ => Ok(()),
        }
    }
}
