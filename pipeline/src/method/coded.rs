//! `coded`: what is kept, but with the codes through an entropy coder where that takes less room.
//!
//! ```text
//! rows of codes --join--> bytes --chunks of 2^18--> frames, once to know their sizes, once to write them
//! ```

use llmpress_entropy::planes::{CHUNK_ELEMENTS, DEFAULT_LEVEL, Encoder as Frames};
use llmpress_formats::Tensor;
use llmpress_formats::encoding::Encoding;
use llmpress_formats::encoding::abq::{self, Abq, coded, matrix};

use super::kept::{self, Kept, kept_unit};
use super::room::{Coding, Encoder, Fit, Room, SizedEncoder, Survey, share};
use crate::sink::{Encoded, Sink, Slots};
use crate::source::UnitSource;
use crate::work::Work;
use crate::{Error, Result};

/// Of planes, what coded codes usually take, in percent.
const USUAL_PERCENT: u64 = 94;

pub(crate) struct Coded;

impl Room for Coded {
    fn name(&self) -> &'static str {
        "coded"
    }

    fn fit(&self, _tensor: &Tensor) -> Fit {
        Fit::Suits
    }

    fn expected_bytes(&self, _tensor: Option<&Tensor>, bytes: u64) -> u64 {
        share(bytes, USUAL_PERCENT)
    }

    fn components(&self) -> &'static [&'static str] {
        &abq::COMPONENTS
    }

    fn survey(&self, unit: &UnitSource<'_>, first: &Tensor, work: Work<'_>) -> Result<Survey> {
        let is_coded = |unit: &llmpress_formats::Unit| unit.components().contains_key(abq::CODES);
        if kept_unit(unit.checkpoint(), first).is_some_and(is_coded) {
            return Kept.survey(unit, first, work);
        }
        let mut coding = match kept::coding(unit, first, false)? {
            Ok(coding) => coding,
            Err(why) => return Ok(Err(why)),
        };
        let (Encoding::Abq(abq), Some((rows, cols))) = (&coding.encoding, matrix(&first.shape)) else {
            return Kept.survey(unit, first, work);
        };
        let codes = Codes { abq: *abq, rows, cols: cols as usize };
        let (mut stored, mut chunks) = (0u64, 0u64);
        codes.each_frame(unit, work, &mut |frame, _| {
            stored += frame.len() as u64;
            chunks += 1;
            Ok(())
        })?;
        let planes = u64::from(abq.planes()) * rows * cols.div_ceil(abq::WORD_COLUMNS as u64) * 4;
        if stored + 4 * chunks >= planes {
            return Kept.survey(unit, first, work);
        }
        coding.spec.splice(0..0, coded::components(abq, rows, cols, stored));
        let Coding { encoding, spec, step, encoder, fallback } = coding;
        let Encoder::Sized(others) = encoder else {
            return Err(Error::Invalid(format!("unit {}: has components of unknown size", first.unit)));
        };
        let encoder = Encoder::Sized(Box::new(Coder { codes, others }));
        Ok(Ok(Coding { encoding, spec, step, encoder, fallback }))
    }
}

/// Codes of a matrix.
struct Codes {
    abq: Abq,
    rows: u64,
    cols: usize,
}

impl Codes {
    /// Gives `take` every frame in turn, with the length that is stored of it.
    fn each_frame(
        &self,
        unit: &UnitSource<'_>,
        work: Work<'_>,
        take: &mut dyn FnMut(&[u8], u32) -> Result<()>,
    ) -> Result<()> {
        let of_row = coded::row_bytes(&self.abq, self.cols);
        let step = (work.piece_bytes / self.cols.max(1)).max(1) as u64;
        let mut frames = Frames::new(DEFAULT_LEVEL);
        let (mut codes, mut bytes, mut frame) = (Vec::new(), Vec::new(), Vec::new());
        let mut lengths = Vec::new();
        let mut encode = |chunk: &[u8]| {
            frame.clear();
            lengths.clear();
            let done = frames.encode_chunk(1, false, chunk, &mut frame, &mut lengths);
            done.map_err(|e| Error::Invalid(format!("tensor {}: {e}", unit.first_name())))?;
            take(&frame, frame.len() as u32)
        };
        for first in (0..self.rows).step_by(step as usize) {
            let rows = first..(first + step).min(self.rows);
            codes.resize((rows.end - rows.start) as usize * self.cols, 0);
            self.read(unit, rows, &mut codes)?;
            for row in codes.chunks_exact(self.cols.max(1)) {
                let at = bytes.len();
                bytes.resize(at + of_row, 0);
                coded::join(&self.abq, row, &mut bytes[at..]);
            }
            let whole = bytes.len() / CHUNK_ELEMENTS * CHUNK_ELEMENTS;
            bytes[..whole].chunks_exact(CHUNK_ELEMENTS).try_for_each(&mut encode)?;
            bytes.drain(..whole);
        }
        if bytes.is_empty() { Ok(()) } else { encode(&bytes) }
    }

    /// The codes of some rows.
    fn read(&self, unit: &UnitSource<'_>, rows: std::ops::Range<u64>, out: &mut [u8]) -> Result<()> {
        let (checkpoint, name) = (unit.checkpoint(), unit.first_name());
        if let Some(codes) = checkpoint.codes(name)? {
            return Ok(codes.read_codes(rows, out)?);
        }
        let packed = checkpoint.packed_rows(name, rows)?;
        out.chunks_exact_mut(self.cols.max(1)).enumerate().for_each(|(row, out)| packed.codes(row, out));
        Ok(())
    }
}

/// Writes them, and leaves the other components to whoever keeps them.
struct Coder {
    codes: Codes,
    others: Box<dyn SizedEncoder>,
}

impl SizedEncoder for Coder {
    fn encode(&self, unit: &UnitSource<'_>, mut slots: Slots, work: Work<'_>) -> Result<Encoded> {
        let mut codes = Sink::take(&mut slots, abq::CODES, work)?;
        let mut lengths = Sink::take(&mut slots, abq::CODE_LENGTHS, work)?;
        self.codes.each_frame(unit, work, &mut |frame, length| {
            codes.append(frame)?;
            lengths.append(&length.to_le_bytes())
        })?;
        let mut encoded = self.others.encode(unit, slots, work)?;
        codes.finish(&mut encoded.components)?;
        lengths.finish(&mut encoded.components)?;
        Ok(encoded)
    }
}
