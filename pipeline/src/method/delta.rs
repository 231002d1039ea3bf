//! `delta`: by the tensor of the same name, dtype and shape in a base; where that is no gain, as `archive` stores it.
//!
//! ```text
//! unit, base: the same bytes? ----yes--> nothing is stored
//!             '--exponents, differences--> model --> chunks        where the tensor by itself would not be smaller
//! ```

use llmpress_entropy::archive::{
    self, CHUNK_ELEMENTS, DifferenceChoice, Differences, Layout, Model, Scales, classes_of_base, differences,
};
use llmpress_formats::encoding::archive as names;
use llmpress_formats::encoding::delta::{COMPONENTS, Coded, Delta as Parameters};
use llmpress_formats::encoding::{Encoding, planes};
use llmpress_formats::{Checkpoint, Digest, Tensor};

use super::archive::{Archive, Chunk, Chunks, Coder, Words, coding_of, surveyed};
use super::room::{Coding, Elsewhere, Encoder, Fit, Room, Survey, share};
use crate::progress::Silent;
use crate::source::UnitSource;
use crate::work::{Work, pieces};
use crate::{Error, Method, Result};

pub(crate) struct Delta;

impl Room for Delta {
    fn name(&self) -> &'static str {
        "delta"
    }

    fn fit(&self, _tensor: &Tensor) -> Fit {
        Fit::Suits
    }

    fn expected_bytes(&self, _tensor: Option<&Tensor>, bytes: u64) -> u64 {
        share(bytes, 30)
    }

    fn components(&self) -> &'static [&'static str] {
        const { &[COMPONENTS[0], COMPONENTS[1], COMPONENTS[2], planes::PLANES] }
    }

    fn indivisible_bytes(&self, tensor: &Tensor) -> u64 {
        let planes = Method::Planes.room().indivisible_bytes(tensor);
        planes.max(names::chunk_bytes(tensor.dtype) as u64)
    }

    fn reads(&self) -> u64 {
        3
    }

    fn survey(&self, unit: &UnitSource<'_>, first: &Tensor, work: Work<'_>) -> Result<Survey> {
        let base = base_of(unit.checkpoint())?;
        let names = [unit.first_name().to_owned()];
        let base = UnitSource::new(base, &names)?;
        if base.bytes() != unit.bytes() {
            return Err(Error::Invalid(format!(
                "tensor {}: has another size in the base",
                unit.first_name()
            )));
        }
        let suits = Archive.fit(first) == Fit::Suits;
        let layout = names::layout(first.dtype).filter(|_| suits);
        let found = look(unit, &base, first, layout, work)?;
        if found.same {
            return Ok(Ok(Coding {
                encoding: Encoding::Delta(Parameters { base_blake3: found.base_blake3, coded: None }),
                spec: Vec::new(),
                step: names::chunk_bytes(first.dtype).max(16),
                encoder: Encoder::Sized(Box::new(Elsewhere { digest: found.base_blake3, reads: 1 })),
                fallback: None,
            }));
        }
        // What follows was read once already, and is counted as such.
        let again = Work { progress: &Silent, ..work };
        let (Some(layout), Some(counts)) = (layout, found.differences) else {
            let method = Method::alone(Method::Archive, first);
            return method.room().survey(unit, first, again);
        };
        let elements = Words::of(unit, first.dtype).elements();
        let choice = counts.choose().map_err(|e| Error::Invalid(e.to_string()))?;
        let scaled = elements as f64 / counts.elements().max(1) as f64;
        let expected = choice.expected_bits / 8.0 * scaled;
        // Below half no tensor by itself comes: only above is it worth a look.
        if expected * 2.0 >= first.bytes as f64 {
            let alone = surveyed(unit, first, layout, again)?;
            if alone.1 <= expected {
                return Ok(coding_of(unit, first, alone));
            }
            if expected >= first.bytes as f64 {
                return Ok(Err(format!("would take {expected:.0} bytes instead of {}", first.bytes)));
            }
        }
        let coder = OnBase { layout, choice, base_blake3: found.base_blake3 };
        Ok(Ok(Coding {
            encoding: coder.encoding(),
            spec: names::components(elements, first.bytes, first.bytes),
            step: names::chunk_bytes(first.dtype),
            encoder: Encoder::Streamed(Box::new(Chunks { coder, wide: first.dtype.bits() == 16 })),
            fallback: None,
        }))
    }
}

/// The base that a checkpoint is to be stored by.
fn base_of(checkpoint: &Checkpoint) -> Result<&Checkpoint> {
    let base = checkpoint.stored_by().and_then(|base| base.checkpoint());
    base.ok_or_else(|| {
        Error::Invalid("the plan stores tensors by a base: say with --base which it is".into())
    })
}

/// What a tensor and that of its base have to do with each other.
struct Looked {
    same: bool,
    base_blake3: Digest,
    differences: Option<Differences>,
}

/// Reads both once; counts differences where they can be coded.
fn look(
    unit: &UnitSource<'_>,
    base: &UnitSource<'_>,
    first: &Tensor,
    layout: Option<Layout>,
    work: Work<'_>,
) -> Result<Looked> {
    let of_base = Words::of(base, first.dtype);
    let elements = of_base.elements();
    let mut counts = match layout {
        Some(layout) => {
            let (mut sample, mut buffer, mut bytes) = (Vec::new(), Vec::new(), Vec::new());
            for range in archive::sampled(elements) {
                of_base.read(range.start, (range.end - range.start) as usize, &mut buffer, &mut bytes)?;
                sample.extend_from_slice(&buffer);
            }
            Some(Differences::new(layout, layout.top(&sample)))
        }
        None => None,
    };
    let none = counts.clone();
    let width = if of_base.wide { 2 } else { 1 };
    let all: Vec<(u64, usize)> = pieces(unit.bytes(), CHUNK_ELEMENTS * width).collect();
    let (mut same, mut hasher) = (true, blake3::Hasher::new());
    for batch in all.chunks(work.batch.max(1)) {
        let parts = work.threads.map(batch.to_vec(), Vec::new, |source: &mut Vec<u16>, (offset, len)| {
            // Words, so that they are aligned.
            source.resize(len.div_ceil(2), 0);
            let mut of_base = vec![0u16; len.div_ceil(2)];
            let bytes = bytemuck::cast_slice_mut::<u16, u8>(source).get_mut(..len).unwrap_or_default();
            let base_bytes =
                bytemuck::cast_slice_mut::<u16, u8>(&mut of_base).get_mut(..len).unwrap_or_default();
            unit.read(offset, bytes)?;
            base.read(offset, base_bytes)?;
            let same = bytes == base_bytes;
            let mut part = none.clone();
            if let Some(part) = &mut part {
                let at = offset / width as u64;
                let (mut words, mut base_words) = (Vec::new(), Vec::new());
                if width == 1 {
                    archive::widen(bytes, &mut words);
                    archive::widen(base_bytes, &mut base_words);
                }
                let (words, base_words) =
                    if width == 1 { (&words[..], &base_words[..]) } else { (&source[..], &of_base[..]) };
                for range in archive::counted(elements, at, at + words.len() as u64) {
                    let range = (range.start - at) as usize..(range.end - at) as usize;
                    let (words, base_words) = (words.get(range.clone()), base_words.get(range));
                    let counted = part.add(base_words.unwrap_or_default(), words.unwrap_or_default());
                    counted.map_err(|e| Error::Invalid(e.to_string()))?;
                }
            }
            work.progress.advance(len as u64);
            Ok((same, of_base, len, part))
        })?;
        for (same_part, of_base, len, part) in parts {
            same &= same_part;
            work.threads.hash(&mut hasher, bytemuck::cast_slice(&of_base).get(..len).unwrap_or_default());
            if let (Some(counts), Some(part)) = (&mut counts, &part) {
                counts.merge(part);
            }
        }
    }
    Ok(Looked { same, base_blake3: hasher.finalize().into(), differences: counts })
}

/// Codes differences from the base.
struct OnBase {
    layout: Layout,
    choice: DifferenceChoice,
    base_blake3: Digest,
}

impl Coder for OnBase {
    fn model(&self) -> &Model {
        &self.choice.model
    }

    fn encoding(&self) -> Encoding {
        let coded = Some(Coded::of(&self.choice));
        Encoding::Delta(Parameters { base_blake3: self.base_blake3, coded })
    }

    fn frame(&self) -> std::result::Result<Vec<u8>, llmpress_entropy::Error> {
        self.choice.model.pack(&Scales::default())
    }

    fn encode(&self, words: Words<'_>, first: u64, chunk: &mut Chunk) -> Result<()> {
        let name = words.unit.first_name();
        let base = UnitSource::new(base_of(words.unit.checkpoint())?, &[name.to_owned()])?;
        let Chunk {
            encoder,
            words: of_chunk,
            classes,
            data,
            base: (base_words, bytes),
            differences: found,
            ..
        } = chunk;
        Words { unit: &base, wide: words.wide }.read(first, of_chunk.len(), base_words, bytes)?;
        classes_of_base(self.layout, self.choice.top, self.choice.model.classes(), base_words, classes);
        differences(base_words, of_chunk, found)
            .and_then(|()| encoder.encode_chunk(classes, found, data))
            .map_err(|e| Error::Invalid(format!("tensor {name}: {e}")))
    }
}
