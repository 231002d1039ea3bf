//! `coded`: what is kept, but with codes, and the positions of two in four, through an entropy coder where that takes less room.
//!
//! ```text
//! rows of bytes --chunks of 2^18--> frames, once to know their sizes, once to write them
//! ```

mod stream;

use llmpress_formats::Tensor;
use llmpress_formats::encoding;

use super::kept::{self, Kept, kept_unit};
use super::room::{Coding, Encoder, Fit, Room, SizedEncoder, Survey, share};
use crate::sink::{Encoded, Sink, Slots};
use crate::source::UnitSource;
use crate::work::Work;
use crate::{Error, Result};
use stream::Stream;

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
        &encoding::LOSSY_COMPONENTS
    }

    fn survey(&self, unit: &UnitSource<'_>, first: &Tensor, work: Work<'_>) -> Result<Survey> {
        // What another tool quantised is stored as `abq`.
        let stored_as = match kept::coding(unit, first, &[])? {
            Ok(coding) => coding.encoding,
            Err(why) => return Ok(Err(why)),
        };
        let stored = kept_unit(unit.checkpoint(), first);
        let is_coded = |name: &str| stored.is_some_and(|unit| unit.components().contains_key(name));
        let (mut streams, mut without, mut specs) = (Vec::new(), Vec::new(), Vec::new());
        for stream in Stream::of(&stored_as, &first.shape) {
            let [plain, codes, _] = stream.names();
            if is_coded(codes) {
                continue;
            }
            let (mut bytes, mut chunks) = (0u64, 0u64);
            stream.each_frame(unit, work, &mut |frame, _| {
                bytes += frame.len() as u64;
                chunks += 1;
                Ok(())
            })?;
            if bytes + 4 * chunks < stream.plain_bytes() {
                without.push(plain);
                specs.extend(stream.components(bytes));
                streams.push(stream);
            }
        }
        if streams.is_empty() {
            return Kept.survey(unit, first, work);
        }
        let Coding { encoding, spec, step, encoder, fallback } = match kept::coding(unit, first, &without)? {
            Ok(coding) => coding,
            Err(why) => return Ok(Err(why)),
        };
        let Encoder::Sized(others) = encoder else {
            return Err(Error::Invalid(format!("unit {}: has components of unknown size", first.unit)));
        };
        specs.extend(spec);
        let encoder = Encoder::Sized(Box::new(Coder { streams, others }));
        Ok(Ok(Coding { encoding, spec: specs, step, encoder, fallback }))
    }
}

/// Writes them, and leaves the other components to whoever keeps them.
struct Coder {
    streams: Vec<Stream>,
    others: Box<dyn SizedEncoder>,
}

impl SizedEncoder for Coder {
    fn encode(&self, unit: &UnitSource<'_>, mut slots: Slots, work: Work<'_>) -> Result<Encoded> {
        let mut done = Vec::new();
        for stream in &self.streams {
            let [_, codes, lengths] = stream.names();
            let mut codes = Sink::take(&mut slots, codes, work)?;
            let mut lengths = Sink::take(&mut slots, lengths, work)?;
            stream.each_frame(unit, work, &mut |frame, length| {
                codes.append(frame)?;
                lengths.append(&length.to_le_bytes())
            })?;
            done.extend([codes, lengths]);
        }
        let mut encoded = self.others.encode(unit, slots, work)?;
        done.into_iter().try_for_each(|sink| sink.finish(&mut encoded.components))?;
        Ok(encoded)
    }
}
