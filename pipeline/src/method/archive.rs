//! `archive`: floats of 16 and 8 bits for storage and transfer.
//!
//! ```text
//! unit: sample --> floor --> means of rows and columns --> histogram by class --> model --> chunks
//! ```

mod timed;

use std::collections::BTreeMap;

use llmpress_entropy::archive::{self, CHUNK_ELEMENTS, Choice, Histogram, Layout, Means, Scales};
use llmpress_formats::encoding::archive as names;
use llmpress_formats::encoding::{self, Encoding};
use llmpress_formats::{Dtype, ShardWriter, Tensor};

use super::room::{Coding, Encoder, Fit, Room, StreamedEncoder, Survey, share};
use super::timed::Timed;
use crate::sink::{Encoded, Sink, Slots, SourceDigests};
use crate::source::UnitSource;
use crate::work::{Work, pieces};
use crate::{Error, Result};

/// Tensors smaller than this are left to byte planes: states and frequencies would cost more.
const MIN_BYTES: u64 = 8 << 10;

pub(crate) struct Archive;

impl Room for Archive {
    fn name(&self) -> &'static str {
        "archive"
    }

    fn fit(&self, tensor: &Tensor) -> Fit {
        if names::layout(tensor.dtype).is_some() && tensor.bytes >= MIN_BYTES {
            Fit::Suits
        } else {
            Fit::Planes
        }
    }

    fn expected_bytes(&self, tensor: Option<&Tensor>, bytes: u64) -> u64 {
        match tensor.map(|tensor| tensor.dtype) {
            Some(Dtype::F16) => share(bytes, 84),
            Some(Dtype::F8_E4M3 | Dtype::F8_E5M2) => share(bytes, 80),
            _ => share(bytes, 66),
        }
    }

    fn components(&self) -> &'static [&'static str] {
        &names::COMPONENTS
    }

    fn indivisible_bytes(&self, tensor: &Tensor) -> u64 {
        names::chunk_bytes(tensor.dtype) as u64
    }

    fn reads(&self) -> u64 {
        3
    }

    fn timed(&self, dtype: Dtype) -> Option<Box<dyn Timed>> {
        let layout = names::layout(dtype)?;
        Some(Box::new(timed::Chunks::new(layout, dtype)))
    }

    fn survey(&self, unit: &UnitSource<'_>, first: &Tensor, work: Work<'_>) -> Result<Survey> {
        let Some(layout) = names::layout(first.dtype) else {
            return Ok(Err(format!("is {}, which has no exponents to code", first.dtype.name())));
        };
        let words = Words { unit, wide: first.dtype.bits() == 16 };
        let choice = choice(layout, &words, names::sides(&first.shape), work)?;
        let expected = choice.expected_bits / 8.0;
        if expected >= first.bytes as f64 {
            return Ok(Err(format!("would take {expected:.0} bytes instead of {}", first.bytes)));
        }
        Ok(Ok(Coding {
            encoding: Encoding::Archive(names::Archive::of(&choice.model)),
            spec: names::components(words.elements(), first.bytes, first.bytes),
            step: names::chunk_bytes(first.dtype),
            encoder: Encoder::Streamed(Box::new(Chunks { choice, wide: words.wide })),
            fallback: None,
        }))
    }
}

/// The elements of a unit as words.
#[derive(Clone, Copy)]
struct Words<'a> {
    unit: &'a UnitSource<'a>,
    /// Whether elements have 16 bits, not 8.
    wide: bool,
}

impl Words<'_> {
    fn elements(&self) -> u64 {
        self.unit.bytes() / if self.wide { 2 } else { 1 }
    }

    /// Elements `first..first + count`, and their bytes where these are not the words themselves.
    fn read(&self, first: u64, count: usize, words: &mut Vec<u16>, bytes: &mut Vec<u8>) -> Result<()> {
        if self.wide {
            words.resize(count, 0);
            return self.unit.read(2 * first, bytemuck::cast_slice_mut(words));
        }
        bytes.resize(count, 0);
        self.unit.read(first, bytes)?;
        archive::widen(bytes, words);
        Ok(())
    }
}

/// The model for a unit's elements.
fn choice(layout: Layout, words: &Words<'_>, (rows, cols): (u64, u64), work: Work<'_>) -> Result<Choice> {
    let elements = words.elements();
    let all: Vec<(u64, usize)> = pieces(elements, CHUNK_ELEMENTS).collect();
    let (mut buffer, mut bytes) = (Vec::new(), Vec::new());
    let mut sample = Vec::new();
    for range in archive::sampled(elements) {
        words.read(range.start, (range.end - range.start) as usize, &mut buffer, &mut bytes)?;
        sample.extend_from_slice(&buffer);
    }
    let mut scales = Scales::default();
    if Scales::may_pay(rows, cols) {
        let mut means = Means::of(layout, layout.floor(&sample), rows as usize, cols as usize);
        for batch in all.chunks(work.batch.max(1)) {
            let parts = work.threads.map(
                batch.to_vec(),
                || (Vec::new(), Vec::new()),
                |(buffer, bytes), (first, count)| {
                    words.read(first, count, buffer, bytes)?;
                    Ok(means.part(first, buffer))
                },
            )?;
            parts.iter().for_each(|part| means.add(part));
        }
        scales = Scales::of(layout, &means);
    }
    let mut histogram = Histogram::new(layout);
    for batch in all.chunks(work.batch.max(1)) {
        let parts = work.threads.map(
            batch.to_vec(),
            || (Vec::new(), Vec::new()),
            |(buffer, bytes), (first, count)| {
                let mut part = Histogram::new(layout);
                for range in archive::counted(elements, first, first + count as u64) {
                    words.read(range.start, (range.end - range.start) as usize, buffer, bytes)?;
                    part.add(&scales, range.start, buffer);
                }
                work.progress.advance(count as u64 * if words.wide { 2 } else { 1 });
                Ok(part)
            },
        )?;
        parts.iter().for_each(|part| histogram.merge(part));
    }
    histogram.choose(&scales).map_err(|e| Error::Invalid(e.to_string()))
}

/// Encodes chunk after chunk by a model.
struct Chunks {
    choice: Choice,
    wide: bool,
}

impl StreamedEncoder for Chunks {
    fn encode(
        &self,
        name: &str,
        unit: &UnitSource<'_>,
        writer: &mut ShardWriter,
        work: Work<'_>,
    ) -> Result<(Encoded, Slots)> {
        let Choice { model, scales, .. } = &self.choice;
        let encoding = Encoding::Archive(names::Archive::of(model));
        let stored_name = |component| encoding::stored_name(name, &encoding, component);
        let words = Words { unit, wide: self.wide };
        let invalid = |e: llmpress_entropy::Error| Error::Invalid(format!("tensor {name}: {e}"));
        let room = writer.open_end(&stored_name(names::CHUNKS));
        let mut data = Sink::new(names::CHUNKS, room, work.threads);
        let mut digests = SourceDigests::new(unit, work.threads);
        let mut lengths: Vec<u32> = Vec::new();
        let all: Vec<(u64, usize)> = pieces(words.elements(), CHUNK_ELEMENTS).collect();
        let mut buffers: Vec<Chunk> = Vec::new();
        buffers.resize_with(work.batch.min(all.len()), || Chunk::new(model));
        for batch in all.chunks(work.batch.max(1)) {
            buffers.truncate(batch.len());
            work.threads.map(
                buffers.iter_mut().zip(batch).collect(),
                || (),
                |(), (chunk, &(first, count))| {
                    words.read(first, count, &mut chunk.words, &mut chunk.bytes)?;
                    chunk.encode(scales, first).map_err(invalid)
                },
            )?;
            let (written, ()) = work.threads.join(
                || buffers.iter().try_for_each(|chunk| data.append(&chunk.data)),
                || buffers.iter().for_each(|chunk| digests.update(chunk.source(self.wide))),
            );
            written?;
            // A chunk has at most 2^18 elements of some bytes each.
            lengths.extend(buffers.iter().map(|chunk| chunk.data.len() as u32));
            work.progress.advance(buffers.iter().map(|chunk| chunk.source(self.wide).len() as u64).sum());
        }
        let frame = model.pack(scales).map_err(invalid)?;
        let mut slots = Slots::new();
        for spec in names::components(words.elements(), data.written(), frame.len() as u64) {
            slots.insert(spec.name, writer.place(&stored_name(spec.name), Dtype::U8, &spec.shape)?);
        }
        let mut components = BTreeMap::new();
        let placed = slots.clone();
        if let Some(slot) = slots.remove(names::CHUNKS) {
            data.settle(slot);
        }
        data.finish(&mut components)?;
        for (component, bytes) in
            [(names::LENGTHS, bytemuck::cast_slice(&lengths)), (names::MODEL, frame.as_slice())]
        {
            let mut sink = Sink::take(&mut slots, component, work)?;
            sink.append(bytes)?;
            sink.finish(&mut components)?;
        }
        Ok((Encoded { tensors: digests.finish(), components }, placed))
    }
}

/// A chunk's buffers.
struct Chunk {
    encoder: archive::Encoder,
    words: Vec<u16>,
    bytes: Vec<u8>,
    classes: Vec<u8>,
    data: Vec<u8>,
}

impl Chunk {
    fn new(model: &archive::Model) -> Self {
        let encoder = archive::Encoder::new(model);
        Self { encoder, words: Vec::new(), bytes: Vec::new(), classes: Vec::new(), data: Vec::new() }
    }

    /// Encodes the words, the first of which is element `first`.
    fn encode(&mut self, scales: &Scales, first: u64) -> std::result::Result<(), llmpress_entropy::Error> {
        let Self { encoder, words, classes, data, .. } = self;
        archive::classes(encoder.model(), &scales.rows, &scales.cols, first, words.len(), classes)?;
        data.clear();
        encoder.encode_chunk(classes, words, data)
    }

    /// The bytes that the words came from.
    fn source(&self, wide: bool) -> &[u8] {
        if wide { bytemuck::cast_slice(&self.words) } else { &self.bytes }
    }
}
