//! The second pass over a unit: encode its pieces with all threads, write and digest the parts.
//!
//! ```text
//! batch of pieces --(all threads)--> encoded --> joined in order --> slots of the shard, digests
//! ```

use std::collections::BTreeMap;

use llmpress_entropy::{dfloat11, fixed12, planes};
use llmpress_formats::encoding;
use llmpress_formats::{ComponentEntry, Digest, Dtype, ShardWriter, Slot};
use rayon::prelude::*;

use crate::convert::Progress;
use crate::source::UnitSource;
use crate::survey::{Coding, Dfloat11Coding, SettledUnit, pieces};
use crate::{Error, Result};

/// What encoding a unit gave.
#[derive(Debug)]
pub(crate) struct Encoded {
    /// Digest of each tensor's bytes, in the unit's order.
    pub(crate) tensors: Vec<(String, Digest)>,
    /// Its components by their last name.
    pub(crate) components: BTreeMap<String, ComponentEntry>,
}

/// A component that is appended to.
struct Sink {
    name: &'static str,
    slot: Slot,
    at: u64,
    hasher: blake3::Hasher,
    threads: Threads,
}

impl Sink {
    fn new(name: &'static str, slot: Slot, threads: Threads) -> Self {
        Self { name, slot, at: 0, hasher: blake3::Hasher::new(), threads }
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.slot.write_at(self.at, bytes)?;
        self.threads.hash(&mut self.hasher, bytes);
        self.at += bytes.len() as u64;
        Ok(())
    }

    /// Checks that the component is full.
    fn finish(self, components: &mut BTreeMap<String, ComponentEntry>) -> Result<()> {
        let component = self.slot.component();
        if self.at != component.bytes() {
            return Err(Error::Invalid(format!(
                "component {}: {} of {} bytes were encoded",
                component.name(),
                self.at,
                component.bytes()
            )));
        }
        let entry =
            ComponentEntry { tensor: component.name().to_owned(), blake3: self.hasher.finalize().into() };
        components.insert(self.name.to_owned(), entry);
        Ok(())
    }
}

/// Digests of a unit's tensors, fed with its bytes in order.
struct SourceDigests<'a> {
    source: &'a UnitSource<'a>,
    threads: Threads,
    tensor: usize,
    at: u64,
    hasher: blake3::Hasher,
    done: Vec<(String, Digest)>,
}

impl<'a> SourceDigests<'a> {
    fn new(source: &'a UnitSource<'a>, threads: Threads) -> Self {
        Self { source, threads, tensor: 0, at: 0, hasher: blake3::Hasher::new(), done: Vec::new() }
    }

    fn update(&mut self, mut bytes: &[u8]) {
        while let Some(tensor) = self.source.tensors().get(self.tensor) {
            let left = (tensor.start + tensor.bytes - self.at) as usize;
            let take = left.min(bytes.len());
            self.threads.hash(&mut self.hasher, &bytes[..take]);
            self.at += take as u64;
            bytes = &bytes[take..];
            if take < left {
                break;
            }
            self.done.push((tensor.name.clone(), self.hasher.finalize().into()));
            self.hasher.reset();
            self.tensor += 1;
            if bytes.is_empty() && self.source.tensors().get(self.tensor).is_none_or(|t| t.bytes > 0) {
                break;
            }
        }
    }

    fn finish(mut self) -> Vec<(String, Digest)> {
        // Tensors without elements at the end never saw a byte.
        self.update(&[]);
        self.done
    }
}

/// Who works on the pieces of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Threads {
    /// All threads of the pool: for large units, one unit at a time.
    Pool,
    /// The calling thread alone, while others do other units. It must not wait for the pool: a waiting
    /// thread would begin another unit, and memory would no longer be bounded.
    Own,
}

impl Threads {
    fn hash(self, hasher: &mut blake3::Hasher, bytes: &[u8]) {
        match self {
            Self::Pool => hasher.update_rayon(bytes),
            Self::Own => hasher.update(bytes),
        };
    }

    fn join<A: Send, B: Send>(self, a: impl FnOnce() -> A + Send, b: impl FnOnce() -> B + Send) -> (A, B) {
        match self {
            Self::Pool => rayon::join(a, b),
            Self::Own => (a(), b()),
        }
    }

    /// Does `job` for every item; results come in order.
    pub(crate) fn map<T: Send, S, R: Send>(
        self,
        items: Vec<T>,
        state: impl Fn() -> S + Sync + Send,
        job: impl Fn(&mut S, T) -> Result<R> + Sync + Send,
    ) -> Result<Vec<R>> {
        match self {
            Self::Pool => items.into_par_iter().with_max_len(1).map_init(state, job).collect(),
            Self::Own => {
                let mut state = state();
                items.into_iter().map(|item| job(&mut state, item)).collect()
            }
        }
    }
}

/// How pieces are cut and reported.
#[derive(Clone, Copy)]
pub(crate) struct Work<'a> {
    pub(crate) piece_bytes: usize,
    /// Pieces in flight.
    pub(crate) batch: usize,
    pub(crate) threads: Threads,
    pub(crate) progress: &'a dyn Progress,
}

/// Slots of a unit's components by their last name.
pub(crate) type Slots = BTreeMap<&'static str, Slot>;

fn take(slots: &mut Slots, name: &'static str, work: Work<'_>) -> Result<Sink> {
    let slot = slots.remove(name).ok_or_else(|| Error::Invalid(format!("component {name} has no room")))?;
    Ok(Sink::new(name, slot, work.threads))
}

/// Encodes a unit of known size into its slots. `planes` go through [`encode_planes`].
pub(crate) fn encode(unit: &SettledUnit<'_>, slots: Slots, work: Work<'_>) -> Result<Encoded> {
    match &unit.coding {
        Coding::Raw { .. } => encode_raw(&unit.source, slots, work),
        Coding::Dfloat11(coding) => encode_dfloat11(&unit.source, coding, slots, work),
        Coding::Fixed12 { grid, base, .. } => encode_fixed12(&unit.source, *grid, *base, slots, work),
        Coding::Planes { .. } => Err(Error::Invalid("planes have no known size".into())),
    }
}

/// Runs `encode_piece` over batches of pieces and `join` over each batch's results in order. Results
/// are reused as buffers.
fn batches<P: Default + Send>(
    source: &UnitSource<'_>,
    piece_bytes: usize,
    work: Work<'_>,
    encode_piece: impl Fn(usize, &[u16], &mut P) -> Result<()> + Sync,
    mut join: impl FnMut(&[(Vec<u16>, P)]) -> Result<()>,
) -> Result<()> {
    let all: Vec<(u64, usize)> = pieces(source.bytes(), piece_bytes).collect();
    let mut buffers: Vec<(Vec<u16>, P)> = Vec::new();
    buffers.resize_with(work.batch.min(all.len()), Default::default);
    for (number, batch) in all.chunks(work.batch).enumerate() {
        let first = number * work.batch;
        buffers.truncate(batch.len());
        let jobs = buffers.iter_mut().zip(batch).enumerate().collect();
        work.threads.map(
            jobs,
            || (),
            |(), (i, ((words, out), &(offset, len)))| {
                words.resize(len / 2, 0);
                source.read(offset, bytemuck::cast_slice_mut(words))?;
                encode_piece(first + i, words, out)
            },
        )?;
        join(&buffers)?;
        work.progress.advance(batch.iter().map(|&(_, len)| len as u64).sum());
    }
    Ok(())
}

/// The results of tasks that ran side by side.
fn both(a: Result<()>, b: Result<()>) -> Result<()> {
    a.and(b)
}

fn encode_raw(source: &UnitSource<'_>, mut slots: Slots, work: Work<'_>) -> Result<Encoded> {
    let mut data = take(&mut slots, encoding::raw::DATA, work)?;
    let mut buffer = vec![0; (work.piece_bytes as u64 * 2).min(source.bytes()) as usize];
    for (offset, len) in pieces(source.bytes(), buffer.len()) {
        source.read(offset, &mut buffer[..len])?;
        data.append(&buffer[..len])?;
        work.progress.advance(len as u64);
    }
    let mut components = BTreeMap::new();
    data.finish(&mut components)?;
    let digest = components.get(encoding::raw::DATA).map(|c| c.blake3);
    let tensors = source.tensors().iter().zip(digest).map(|(t, digest)| (t.name.clone(), digest)).collect();
    Ok(Encoded { tensors, components })
}

fn encode_dfloat11(
    source: &UnitSource<'_>,
    coding: &Dfloat11Coding,
    mut slots: Slots,
    work: Work<'_>,
) -> Result<Encoded> {
    use encoding::dfloat11 as names;
    let mut luts = take(&mut slots, names::LUTS, work)?;
    luts.append(coding.code.luts())?;
    let mut splits = take(&mut slots, names::SPLIT_POSITIONS, work)?;
    splits.append(bytemuck::cast_slice(&coding.splits))?;
    let mut encoded = take(&mut slots, names::ENCODED_EXPONENT, work)?;
    let mut sign_mantissa = take(&mut slots, names::SIGN_MANTISSA, work)?;
    let mut positions = take(&mut slots, names::OUTPUT_POSITIONS, work)?;
    let mut gaps = take(&mut slots, names::GAPS, work)?;
    let mut digests = SourceDigests::new(source, work.threads);
    let mut assembler = dfloat11::Assembler::new(&coding.layout);
    let mut sections = dfloat11::Sections::default();
    let mut write = |sections: &mut dfloat11::Sections| -> Result<()> {
        encoded.append(&sections.encoded_exponent)?;
        positions.append(&sections.output_positions)?;
        gaps.append(&sections.gaps)?;
        sections.encoded_exponent.clear();
        sections.output_positions.clear();
        sections.gaps.clear();
        Ok(())
    };
    batches::<dfloat11::Piece>(
        source,
        work.piece_bytes & !1,
        work,
        |i, words, piece| {
            let start = coding.starts.get(i).copied().unwrap_or_default();
            dfloat11::encode_piece(&coding.code, start, words, piece);
            Ok(())
        },
        |batch| {
            for (_, piece) in batch {
                assembler.push(piece, &mut sections);
            }
            let (written, others) = work.threads.join(
                || write(&mut sections),
                || {
                    let (mantissas, ()) = work.threads.join(
                        || batch.iter().try_for_each(|(_, piece)| sign_mantissa.append(&piece.sign_mantissa)),
                        || batch.iter().for_each(|(words, _)| digests.update(bytemuck::cast_slice(words))),
                    );
                    mantissas
                },
            );
            both(written, others)
        },
    )?;
    assembler.finish(&coding.code, &mut sections).map_err(|e| Error::Invalid(e.to_string()))?;
    write(&mut sections)?;
    let mut components = BTreeMap::new();
    for sink in [luts, splits, encoded, sign_mantissa, positions, gaps] {
        sink.finish(&mut components)?;
    }
    Ok(Encoded { tensors: digests.finish(), components })
}

fn encode_fixed12(
    source: &UnitSource<'_>,
    grid: fixed12::Grid,
    base: i16,
    mut slots: Slots,
    work: Work<'_>,
) -> Result<Encoded> {
    use encoding::fixed12 as names;
    let mut sign_mantissa = take(&mut slots, names::SIGN_MANTISSA, work)?;
    let mut codes = take(&mut slots, names::CODES, work)?;
    let mut offsets = take(&mut slots, names::ESCAPE_OFFSETS, work)?;
    let mut positions = take(&mut slots, names::ESCAPE_POSITIONS, work)?;
    let mut exponents = take(&mut slots, names::ESCAPE_EXPONENTS, work)?;
    let mut digests = SourceDigests::new(source, work.threads);
    let mut escapes = 0u32;
    let mut table: Vec<u32> = vec![0];
    let strip_bytes = grid.cols() as usize * fixed12::TILE_ROWS * 2;
    let piece_bytes = (work.piece_bytes / strip_bytes).max(1) * strip_bytes;
    batches::<fixed12::Strips>(
        source,
        piece_bytes,
        work,
        |_, words, strips| {
            fixed12::encode_strips(base, grid.cols() as usize, words, strips)
                .map_err(|e| Error::Invalid(e.to_string()))
        },
        |batch| {
            for count in batch.iter().flat_map(|(_, strips)| &strips.escape_counts) {
                escapes = escapes.wrapping_add(*count);
                table.push(escapes);
            }
            let (a, b) = work.threads.join(
                || batch.iter().try_for_each(|(_, strips)| sign_mantissa.append(&strips.sign_mantissa)),
                || {
                    let (small, ()) = work.threads.join(
                        || {
                            offsets.append(bytemuck::cast_slice(&table))?;
                            table.clear();
                            batch.iter().try_for_each(|(_, strips)| {
                                codes.append(&strips.codes)?;
                                positions.append(bytemuck::cast_slice(&strips.escape_positions))?;
                                exponents.append(&strips.escape_exponents)
                            })
                        },
                        || batch.iter().for_each(|(words, _)| digests.update(bytemuck::cast_slice(words))),
                    );
                    small
                },
            );
            both(a, b)
        },
    )?;
    let mut components = BTreeMap::new();
    for sink in [sign_mantissa, codes, offsets, positions, exponents] {
        sink.finish(&mut components)?;
    }
    Ok(Encoded { tensors: digests.finish(), components })
}

/// Encodes a `planes` unit at the end of the shard so far and places its components.
pub(crate) fn encode_planes(
    unit: &SettledUnit<'_>,
    split: encoding::planes::Split,
    writer: &mut ShardWriter,
    work: Work<'_>,
) -> Result<(Encoded, Slots)> {
    use encoding::planes as names;
    let source = &unit.source;
    let encoding = unit.coding.encoding();
    let name = encoding::stored_name(&unit.name, &encoding, names::PLANES);
    let mut data = Sink::new(names::PLANES, writer.open_end(&name), work.threads);
    let mut digests = SourceDigests::new(source, work.threads);
    let mut lengths: Vec<u32> = Vec::new();
    let chunk_bytes = planes::CHUNK_ELEMENTS * split.width;
    let all: Vec<(u64, usize)> = pieces(source.bytes(), chunk_bytes).collect();
    let mut buffers: Vec<PlanesPiece> = Vec::new();
    buffers.resize_with(work.batch.min(all.len()), PlanesPiece::new);
    for batch in all.chunks(work.batch) {
        buffers.truncate(batch.len());
        let jobs = buffers.iter_mut().zip(batch).collect();
        work.threads.map(
            jobs,
            || (),
            |(), (piece, &(offset, len))| {
                piece.bytes.resize(len, 0);
                source.read(offset, &mut piece.bytes)?;
                piece.data.clear();
                piece.lengths.clear();
                piece
                    .encoder
                    .encode_chunk(
                        split.width,
                        split.rotate,
                        &piece.bytes,
                        &mut piece.data,
                        &mut piece.lengths,
                    )
                    .map_err(|e| Error::Invalid(format!("tensor {}: {e}", unit.name)))
            },
        )?;
        let (written, ()) = work.threads.join(
            || buffers.iter().try_for_each(|piece| data.append(&piece.data)),
            || buffers.iter().for_each(|piece| digests.update(&piece.bytes)),
        );
        written?;
        lengths.extend(buffers.iter().flat_map(|piece| &piece.lengths));
        work.progress.advance(batch.iter().map(|&(_, len)| len as u64).sum());
    }
    let stored = data.at;
    let mut slots = Slots::new();
    for spec in names::components(source.bytes(), split.width, stored) {
        let name = encoding::stored_name(&unit.name, &encoding, spec.name);
        slots.insert(spec.name, writer.place(&name, Dtype::U8, &spec.shape)?);
    }
    let mut components = BTreeMap::new();
    let placed = slots.clone();
    if let Some(slot) = slots.remove(names::PLANES) {
        data.slot = slot;
    }
    data.finish(&mut components)?;
    let mut table = take(&mut slots, names::LENGTHS, work)?;
    table.append(bytemuck::cast_slice(&lengths))?;
    table.finish(&mut components)?;
    Ok((Encoded { tensors: digests.finish(), components }, placed))
}

struct PlanesPiece {
    encoder: planes::Encoder,
    bytes: Vec<u8>,
    data: Vec<u8>,
    lengths: Vec<u32>,
}

impl PlanesPiece {
    fn new() -> Self {
        Self {
            encoder: planes::Encoder::new(planes::DEFAULT_LEVEL),
            bytes: Vec::new(),
            data: Vec::new(),
            lengths: Vec::new(),
        }
    }
}
