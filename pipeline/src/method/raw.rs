//! `raw`: a tensor's own bytes.

use std::collections::BTreeMap;

use llmpress_formats::encoding::{self, Encoding};
use llmpress_formats::{Dtype, Tensor};

use super::room::{Coding, Encoder, Fit, Room, SizedEncoder, Survey};
use crate::Result;
use crate::sink::{Encoded, Sink, Slots};
use crate::source::UnitSource;
use crate::work::{Work, pieces};

/// Bytes whose ends any dtype's elements share.
const STEP: usize = 16;

pub(crate) struct Raw;

impl Room for Raw {
    fn name(&self) -> &'static str {
        "raw"
    }

    fn fit(&self, _tensor: &Tensor) -> Fit {
        Fit::Suits
    }

    fn expected_bytes(&self, _tensor: Option<&Tensor>, bytes: u64) -> u64 {
        bytes
    }

    fn components(&self) -> &'static [&'static str] {
        &[]
    }

    fn gb_per_second(&self) -> f64 {
        0.68
    }

    fn survey(&self, _unit: &UnitSource<'_>, first: &Tensor, _work: Work<'_>) -> Result<Survey> {
        Ok(Ok(coding(first.dtype, &first.shape)))
    }
}

/// How a tensor is kept as it is.
pub(crate) fn coding(dtype: Dtype, shape: &[u64]) -> Coding {
    Coding {
        encoding: Encoding::Raw,
        spec: encoding::raw::components(dtype, shape),
        step: STEP,
        encoder: Encoder::Sized(Box::new(Copy)),
        fallback: None,
    }
}

struct Copy;

impl SizedEncoder for Copy {
    fn encode(&self, unit: &UnitSource<'_>, mut slots: Slots, work: Work<'_>) -> Result<Encoded> {
        let mut data = Sink::take(&mut slots, encoding::raw::DATA, work)?;
        let mut buffer = vec![0; (work.piece_bytes as u64 * 2).min(unit.bytes()) as usize];
        for (offset, len) in pieces(unit.bytes(), buffer.len()) {
            unit.read(offset, &mut buffer[..len])?;
            data.append(&buffer[..len])?;
            work.progress.advance(len as u64);
        }
        let mut components = BTreeMap::new();
        data.finish(&mut components)?;
        let digest = components.get(encoding::raw::DATA).map(|c| c.blake3);
        let tensors = unit.tensors().iter().zip(digest).map(|(t, digest)| (t.name.clone(), digest)).collect();
        Ok(Encoded { tensors, components })
    }
}
