//! One shard: settle its units, lay it out, encode, decode and compare, publish.
//!
//! ```text
//! | header | I64 ... BF16 ... U8 | placed in order of dtype size, unit, component
//! ```

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;

use llmpress_formats::encoding::{self, ComponentSpec, Part, UnitReader};
use llmpress_formats::{Checkpoint, Component, Digest, ShardWriter, SlotPlan, UnitEntry};
use rayon::prelude::*;

use crate::encode::{Encoded, Slots, Threads, Work, encode, encode_planes};
use crate::plan::PlannedShard;
use crate::survey::{Coding, SettledUnit, pieces, settle};
use crate::{Error, Result};

/// A shard that is written and checked but not yet synced and named.
pub(crate) struct EncodedShard {
    pub(crate) writer: ShardWriter,
    pub(crate) units: BTreeMap<String, UnitEntry>,
    pub(crate) tensors: BTreeMap<String, Digest>,
}

struct QueuedSlot {
    unit: usize,
    spec: ComponentSpec,
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
            slots[next.unit].insert(next.spec.name, slot);
        } else if let (Coding::Planes { split, .. }, None) = (&units[next.unit].coding, &encoded[next.unit]) {
            let (result, placed) = encode_planes(&units[next.unit], *split, &mut writer, work)?;
            encoded[next.unit] = Some(result);
            slots[next.unit] = placed;
        }
    }
    let jobs = units.into_iter().zip(slots).zip(encoded);
    let finished = each(
        jobs.map(|((unit, slots), encoded)| (unit.source.bytes(), (unit, slots, encoded))).collect(),
        work,
        |(unit, slots, encoded), work| {
            let encoded = match encoded {
                Some(encoded) => encoded,
                None => encode(&unit, slots.clone(), work)?,
            };
            compare(checkpoint, &unit, &slots, work)?;
            check_source_digests(checkpoint, &encoded)?;
            let encoding = serde_json::to_value(unit.coding.encoding())
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

/// Pieces up to which a unit is left to one thread.
const SMALL_UNIT_PIECES: u64 = 64;

/// Does `job` for every item, given with its bytes of source. Large ones first, one by one, their pieces
/// in parallel; then small ones side by side, each by one thread. Either way the pieces in flight stay
/// within the budget. Results come in the order of the items.
fn each<T: Send, R: Send>(
    items: Vec<(u64, T)>,
    work: Work<'_>,
    job: impl Fn(T, Work<'_>) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let mut results: Vec<Option<R>> = items.iter().map(|_| None).collect();
    let limit = SMALL_UNIT_PIECES * work.piece_bytes as u64;
    let (mut small, large): (Vec<_>, Vec<_>) =
        items.into_iter().enumerate().partition(|(_, (bytes, _))| *bytes <= limit);
    for (i, (_, item)) in large {
        results[i] = Some(job(item, work)?);
    }
    // The longest first, so that threads end together.
    small.sort_by_key(|(_, (bytes, _))| std::cmp::Reverse(*bytes));
    let own = Work { batch: 2, threads: Threads::Own, ..work };
    let done: Vec<(usize, R)> = small
        .into_par_iter()
        .with_max_len(1)
        .map(|(i, (_, item))| Ok((i, job(item, own)?)))
        .collect::<Result<_>>()?;
    for (i, result) in done {
        results[i] = Some(result);
    }
    Ok(results.into_iter().flatten().collect())
}

/// The shard's tensors in file order: larger dtypes first so that all are aligned, then by unit.
fn slot_queue(units: &[SettledUnit<'_>]) -> VecDeque<QueuedSlot> {
    let mut queue = Vec::new();
    for (unit, settled) in units.iter().enumerate() {
        let encoding = settled.coding.encoding();
        let exact = !matches!(settled.coding, Coding::Planes { .. });
        for spec in settled.coding.spec() {
            let name = encoding::stored_name(&settled.name, &encoding, spec.name);
            let plan = SlotPlan { name, dtype: spec.dtype, shape: spec.shape.clone(), exact };
            queue.push(QueuedSlot { unit, spec: spec.clone(), plan });
        }
    }
    // Components of one unit and dtype stay together. `planes` comes before its `lengths`, whose
    // content is known last.
    queue.sort_by(|a, b| {
        let order = |q: &QueuedSlot| (std::cmp::Reverse(q.plan.dtype), q.unit);
        let late = |q: &QueuedSlot| q.spec.name == encoding::planes::LENGTHS;
        order(a).cmp(&order(b)).then(late(a).cmp(&late(b))).then(a.plan.name.cmp(&b.plan.name))
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
    let reader = UnitReader::open(&unit.name, &unit.coding.encoding(), &parts, &components)?;
    // Readers decode whole strips and chunks: cut where they do.
    let piece = match &unit.coding {
        Coding::Fixed12 { grid, .. } => {
            let strip = grid.cols() as usize * 32;
            (work.piece_bytes / strip).max(1) * strip
        }
        Coding::Planes { split, .. } => llmpress_entropy::planes::CHUNK_ELEMENTS * split.width,
        Coding::Raw { .. } | Coding::Dfloat11(_) => work.piece_bytes & !15,
    };
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
