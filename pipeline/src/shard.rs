//! One shard: settle its units, lay it out, encode, decode and compare, publish.
//!
//! ```text
//! | header | I64 ... BF16 ... U8 | placed in order of dtype size, unit, component
//! ```

use std::collections::BTreeMap;
use std::path::Path;

use llmpress_formats::encoding::{self, ComponentSpec, Part, UnitReader};
use llmpress_formats::{
    Checkpoint, Component, Digest, Encoding, EncodingEntry, Named, ShardWriter, SlotPlan, UnitEntry,
};

use crate::duplicates::Duplicates;
use crate::method::room::Encoder;
use crate::plan::PlannedShard;
use crate::sink::{Encoded, Slots};
use crate::source::UnitSource;
use crate::survey::{SettledUnit, settle};
use crate::work::{Work, each, pieces};
use crate::{Error, Result};

/// A shard that is written and checked but not yet synced and named.
pub(crate) struct EncodedShard {
    pub(crate) writer: ShardWriter,
    pub(crate) units: BTreeMap<String, UnitEntry>,
    pub(crate) tensors: BTreeMap<String, Digest>,
}

/// A component of a unit, both by their numbers: there may be a million of them.
#[derive(Clone, Copy)]
struct QueuedSlot {
    unit: u32,
    component: u32,
}

impl QueuedSlot {
    fn unit<'a, 'b>(self, units: &'a [SettledUnit<'b>]) -> Option<&'a SettledUnit<'b>> {
        units.get(self.unit as usize)
    }

    fn spec<'a>(self, units: &'a [SettledUnit<'_>]) -> Option<&'a ComponentSpec> {
        self.unit(units)?.coding.spec.get(self.component as usize)
    }

    fn plan(self, units: &[SettledUnit<'_>]) -> Option<SlotPlan> {
        let (unit, spec) = (self.unit(units)?, self.spec(units)?);
        let name = encoding::stored_name(&unit.name, &unit.coding.encoding, spec.name);
        let exact = matches!(unit.coding.encoder, Encoder::Sized(_));
        Some(SlotPlan { name, dtype: spec.dtype, shape: spec.shape.clone(), exact })
    }
}

/// Writes a shard to its temporary file. Nothing has its final name yet.
pub(crate) fn encode_shard(
    checkpoint: &Checkpoint,
    shard: &PlannedShard,
    path: &Path,
    duplicates: &Duplicates,
    work: Work<'_>,
) -> Result<EncodedShard> {
    let settled = each(shard.units.iter().map(|u| (u.source_bytes, u)).collect(), work, |planned, work| {
        settle(checkpoint, planned, duplicates, work)
    })?;
    let mut units: Vec<SettledUnit<'_>> = settled.into_iter().flatten().collect();
    units.sort_by(|a, b| a.name.cmp(&b.name));
    let queue = slot_queue(&units);
    let plan = queue.iter().filter_map(|slot| slot.plan(&units));
    let mut writer = ShardWriter::create(path, plan, checkpoint.directory().metadata())?;
    let mut slots: Vec<Slots> = units.iter().map(|_| Slots::new()).collect();
    let mut encoded: Vec<Option<Encoded>> = units.iter().map(|_| None).collect();
    for next in queue {
        let (Some(unit), Some(spec), Some(plan)) = (next.unit(&units), next.spec(&units), next.plan(&units))
        else {
            continue;
        };
        let number = next.unit as usize;
        if plan.exact {
            let slot = writer.place(&plan.name, plan.dtype, &plan.shape)?;
            slots[number].insert(spec.name, slot);
        } else if let (Encoder::Streamed(encoder), None) = (&unit.coding.encoder, &encoded[number]) {
            let (result, placed) = encoder.encode(&unit.name, &unit.source, &mut writer, work)?;
            encoded[number] = Some(result);
            slots[number] = placed;
        }
    }
    let jobs = units.into_iter().zip(slots).zip(encoded);
    let finished = each(
        jobs.map(|((unit, slots), encoded)| (unit.source.bytes(), (unit, slots, encoded))).collect(),
        work,
        |(unit, slots, encoded), work| {
            let encoded = match (encoded, &unit.coding.encoder) {
                (Some(encoded), _) => encoded,
                (None, Encoder::Sized(encoder)) => encoder.encode(&unit.source, slots.clone(), work)?,
                (None, Encoder::Streamed(_)) => {
                    return Err(Error::Invalid(format!("unit {}: has no component", unit.name)));
                }
            };
            compare(checkpoint, &unit, &slots, work)?;
            check_source_digests(checkpoint, &encoded)?;
            let entry = UnitEntry {
                encoding: EncodingEntry::of(&unit.coding.encoding)?,
                tensors: encoded.tensors.iter().map(|(name, _)| name.clone()).collect(),
                components: encoded.components.into(),
                fallback: unit.fallback,
            };
            Ok((unit.name, entry, encoded.tensors))
        },
    )?;
    let mut entries = BTreeMap::new();
    let mut tensors = BTreeMap::new();
    for (name, entry, digests) in finished {
        entries.insert(name, entry);
        tensors.extend(digests);
    }
    Ok(EncodedShard { writer, units: entries, tensors })
}

/// The shard's tensors in file order: larger dtypes first so that all are aligned, then by unit.
fn slot_queue(units: &[SettledUnit<'_>]) -> Vec<QueuedSlot> {
    let mut queue = Vec::new();
    for (unit, settled) in (0..).zip(units) {
        queue.extend((0..).zip(&settled.coding.spec).map(|(component, _)| QueuedSlot { unit, component }));
    }
    // Components of one unit and dtype stay together; those of a streamed unit in the order in which their sizes become
    // known.
    queue.sort_by_key(|slot| {
        let spec = slot.spec(units);
        let exact = slot.unit(units).is_some_and(|u| matches!(u.coding.encoder, Encoder::Sized(_)));
        let place = if exact { 0 } else { slot.component };
        (std::cmp::Reverse(spec.map(|s| s.dtype)), slot.unit, place, spec.map(|s| s.name))
    });
    queue
}

/// Decodes what was written and compares it with the source, byte for byte.
fn compare(checkpoint: &Checkpoint, unit: &SettledUnit<'_>, slots: &Slots, work: Work<'_>) -> Result<()> {
    let mut parts = Vec::new();
    for tensor in unit.source.tensors() {
        let t = checkpoint.tensor(&tensor.name)?;
        parts.push(Part {
            name: tensor.name.clone(),
            dtype: t.dtype,
            shape: t.shape.clone(),
            bytes: t.bytes,
        });
    }
    let components: Named<Component> =
        slots.iter().map(|(name, slot)| ((*name).to_owned(), slot.component().clone())).collect();
    let base = checkpoint.stored_by();
    let open = || UnitReader::open_on(&unit.name, &unit.coding.encoding, &parts, &components, base);
    let (reader, other) = match &unit.coding.encoding {
        Encoding::Same { tensor } => (None, Some(UnitSource::new(checkpoint, std::slice::from_ref(tensor))?)),
        _ => (Some(open()?), None),
    };
    let decode = |offset: u64, out: &mut [u8]| -> Result<()> {
        other.iter().try_for_each(|other| other.read(offset, out))?;
        Ok(reader.iter().try_for_each(|reader| reader.read(offset, out))?)
    };
    // Readers decode whole strips and chunks: cut where they do.
    let step = unit.coding.step.max(1);
    let piece = (work.piece_bytes / step).max(1) * step;
    let all: Vec<(u64, usize)> = pieces(unit.source.bytes(), piece).collect();
    let compared = work.threads.map(
        all,
        || (Vec::<u64>::new(), Vec::<u64>::new()),
        |(source, decoded), (offset, len)| {
            // Words of 64 bits, so that the buffers are aligned for every dtype.
            source.resize(len.div_ceil(8), 0);
            decoded.resize(len.div_ceil(8), 0);
            let source = &mut bytemuck::cast_slice_mut::<u64, u8>(source)[..len];
            let decoded = &mut bytemuck::cast_slice_mut::<u64, u8>(decoded)[..len];
            unit.source.read(offset, source)?;
            decode(offset, decoded)?;
            if source != decoded {
                let at = source.iter().zip(decoded.iter()).take_while(|(a, b)| a == b).count();
                return Err(Error::Mismatch { unit: unit.name.clone(), offset: offset + at as u64 });
            }
            work.progress.advance(len as u64);
            Ok(())
        },
    );
    compared.map(|_| ())
}

/// A source with a manifest says what its tensors must decode to.
fn check_source_digests(checkpoint: &Checkpoint, encoded: &Encoded) -> Result<()> {
    let Some(manifest) = checkpoint.manifest() else { return Ok(()) };
    for (name, digest) in &encoded.tensors {
        if let Some(entry) = manifest.tensors.get(name)
            && entry.blake3 != *digest
        {
            return Err(llmpress_formats::Error::corrupt(
                checkpoint.root(),
                Some(name),
                format!(
                    "decodes to bytes with digest {digest}, the manifest says {}: get a good copy of this directory",
                    entry.blake3
                ),
            )
            .into());
        }
    }
    Ok(())
}
