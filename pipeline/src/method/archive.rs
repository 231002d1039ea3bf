//! `archive`: floats of 16 and 8 bits for storage and transfer.
//!
//! ```text
//! unit: sample --> floor --> means of rows and columns --> histogram by class --> model --> chunks
//! ```

mod chunks;
mod timed;

use llmpress_entropy::archive::{self, CHUNK_ELEMENTS, Choice, Histogram, Layout, Means, Model, Scales};
use llmpress_formats::encoding::Encoding;
use llmpress_formats::encoding::archive as names;
use llmpress_formats::{Dtype, Tensor};

pub(super) use self::chunks::{Chunk, Chunks, Coder, Words};
use super::room::{Coding, Encoder, Fit, Room, Survey, share};
use super::timed::Timed;
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

    fn gb_per_second(&self) -> f64 {
        0.25
    }

    fn timed(&self, dtype: Dtype) -> Option<Box<dyn Timed>> {
        let layout = names::layout(dtype)?;
        Some(Box::new(timed::Chunks::new(layout, dtype)))
    }

    fn survey(&self, unit: &UnitSource<'_>, first: &Tensor, work: Work<'_>) -> Result<Survey> {
        let Some(layout) = names::layout(first.dtype) else {
            return Ok(Err(format!("is {}, which has no exponents to code", first.dtype.name())));
        };
        let found = surveyed(unit, first, layout, work)?;
        Ok(coding_of(unit, first, found))
    }
}

/// The model for a tensor, and the bytes that it is expected to take.
pub(super) fn surveyed(
    unit: &UnitSource<'_>,
    first: &Tensor,
    layout: Layout,
    work: Work<'_>,
) -> Result<(Choice, f64)> {
    let words = Words::of(unit, first.dtype);
    let choice = choice(layout, &words, names::sides(&first.shape), work)?;
    let elements = words.elements();
    let counted: u64 = archive::counted(elements, 0, elements).map(|range| range.end - range.start).sum();
    let expected = choice.expected_bits / 8.0 * (elements as f64 / counted.max(1) as f64);
    Ok((choice, expected))
}

/// How a tensor is stored by its model, or why it is not.
pub(super) fn coding_of(unit: &UnitSource<'_>, first: &Tensor, (choice, expected): (Choice, f64)) -> Survey {
    if expected >= first.bytes as f64 {
        return Err(format!("would take {expected:.0} bytes instead of {}", first.bytes));
    }
    let words = Words::of(unit, first.dtype);
    let coder = Alone(choice);
    Ok(Coding {
        encoding: coder.encoding(),
        spec: names::components(words.elements(), first.bytes, first.bytes),
        step: names::chunk_bytes(first.dtype),
        encoder: Encoder::Streamed(Box::new(Chunks { coder, wide: words.wide })),
        fallback: None,
    })
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

/// Codes a tensor by itself.
struct Alone(Choice);

impl Coder for Alone {
    fn model(&self) -> &Model {
        &self.0.model
    }

    fn encoding(&self) -> Encoding {
        Encoding::Archive(names::Archive::of(&self.0.model))
    }

    fn frame(&self) -> std::result::Result<Vec<u8>, llmpress_entropy::Error> {
        self.0.model.pack(&self.0.scales)
    }

    fn encode(&self, words: Words<'_>, first: u64, chunk: &mut Chunk) -> Result<()> {
        let Choice { model, scales: Scales { rows, cols }, .. } = &self.0;
        let Chunk { encoder, words: of_chunk, classes, data, .. } = chunk;
        archive::classes(model, rows, cols, first, of_chunk.len(), classes)
            .and_then(|()| encoder.encode_chunk(classes, of_chunk, data))
            .map_err(|e| Error::Invalid(format!("tensor {}: {e}", words.unit.first_name())))
    }
}
