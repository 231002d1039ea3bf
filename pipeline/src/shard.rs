//! One shard: settle its units, lay it out, encode, decode and compare, publish.
//!
//! ```text
//! | header | I64 ... BF16 ... U8 | placed in order of dtype size, unit, component
//! ```

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;

use llmpress_formats::encoding::{self, Part, UnitReader};
use llmpress_formats::{Checkpoint, Component, Digest, ShardWriter, SlotPlan, UnitEntry};

use crate::method::room::Encoder;
use crate::plan::PlannedShard;
use crate::sink::{Encoded, Slots};
use crate::survey::{SettledUnit, settle};
use crate::work::{Work, each, pieces};
use crate::{Error, Result};

/// A shard that is written and checked but not yet synced and named.
pub(crate) struct EncodedShard {
    pub(crate) writer: ShardWriter,
    pub(crate) units: BTreeMap<String, UnitEntry>,
    pub(crate) tensors: BTreeMap<String, Digest>,
}

struct QueuedSlot {
    unit: usize,
    component: &'static str,
    /// Where it stands among those of a streamed unit, whose sizes are known in this order.
    place: usize,
    plan: SlotPlan,
}

/// Writes a shard to its temporary file. Nothing has its final name yet.
pub(crate) fn encode_shard(
    checkpoint: &Checkpoint,
    shard: &PlannedShard,
    path: &Path,
    work: Work<'_>,
) -> Result<EncodedShard> {
    let settled = each(shard.units.iter().map(|u| (u.source_bytes, u)).collect(), work, |planned, work| {
        settle(checkpoint, planned, work)
    })?;
    let mut units: Vec<SettledUnit<'_>> = settled.into_iter().flatten().collect();
    units.sort_by(|a, b| a.name.cmp(&b.name));
    let mut queue = slot_queue(&units);
    let plan: Vec<SlotPlan> = queue.iter().map(|q| q.plan.clone()).collect();
    let mut writer = ShardWriter::create(path, &plan, checkpoint.directory().metadata())?;
    let mut slots: Vec<Slots> = units.iter().map(|_| Slots::new()).collect();
    let mut encoded: Vec<Option<Encoded>> = units.iter().map(|_| None).collect();
    while let Some(next) = queue.pop_front() {
        if next.plan.exact {
            let slot = writer.place(&next.plan.name, next.plan.dtype, &next.plan.shape)?;
            slots[next.unit].insert(next.component, slot);
        } else if let (Encoder::Streamed(encoder), None) =
            (&units[next.unit].coding.encoder, &encoded[next.unit])
        {
            let unit = &units[next.unit];
            let (result, placed) = encoder.encode(&unit.name, &unit.source, &mut writer, work)?;
            encoded[next.unit] = Some(result);
            slots[next.unit] = placed;
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
            let encoding = serde_json::to_value(&unit.coding.encoding)
                .map_err(|e| Error::Invalid(format!("unit {}: {e}", unit.name)))?;
            let entry = UnitEntry {
                encoding,
                tensors: encoded.tensors.iter().map(|(name, _)| name.clone()).collect(),
                components: encoded.components,
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
fn slot_queue(units: &[SettledUnit<'_>]) -> VecDeque<QueuedSlot> {
    let mut queue = Vec::new();
    for (unit, settled) in units.iter().enumerate() {
        let coding = &settled.coding;
        let exact = matches!(coding.encoder, Encoder::Sized(_));
        for (index, spec) in coding.spec.iter().enumerate() {
            let name = encoding::stored_name(&settled.name, &coding.encoding, spec.name);
            let plan = SlotPlan { name, dtype: spec.dtype, shape: spec.shape.clone(), exact };
            let place = if exact { 0 } else { index };
            queue.push(QueuedSlot { unit, component: spec.name, place, plan });
        }
    }
    // Components of one unit and dtype stay together.
    queue.sort_by(|a, b| {
        let order = |q: &QueuedSlot| (std::cmp::Reverse(q.plan.dtype), q.unit, q.place);
        order(a).cmp(&order(b)).then_with(|| a.plan.name.cmp(&b.plan.name))
    });
    queue.into()
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
    let components: BTreeMap<String, Component> =
        slots.iter().map(|(name, slot)| ((*name).to_owned(), slot.component().clone())).collect();
    let reader = UnitReader::open(&unit.name, &unit.coding.encoding, &parts, &components)?;
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
            reader.read(offset, decoded)?;
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
