//! `dfloat8`: FP8 weights in DFloat11's stream; all other tensors as they are.

mod timed;

use llmpress_formats::encoding::dfloat8 as names;
use llmpress_formats::{Dtype, Encoding, Tensor};

use super::dfloat11::stream::{self, Form};
use super::room::{Fit, Room, Survey, share};
use super::timed::Timed;
use crate::Result;
use crate::source::UnitSource;
use crate::work::Work;

/// Tensors smaller than this are kept: tables and a last block would cost more.
const MIN_BYTES: u64 = 8 << 10;

pub(crate) struct Dfloat8;

impl Room for Dfloat8 {
    fn name(&self) -> &'static str {
        "dfloat8"
    }

    fn fit(&self, tensor: &Tensor) -> Fit {
        match tensor.dtype {
            Dtype::F8_E4M3 if tensor.bytes >= MIN_BYTES => Fit::Suits,
            _ => Fit::Raw,
        }
    }

    fn expected_bytes(&self, _tensor: Option<&Tensor>, bytes: u64) -> u64 {
        share(bytes, 86)
    }

    fn components(&self) -> &'static [&'static str] {
        &names::COMPONENTS
    }

    fn nothing_suits(&self, found: &str, _has_bf16: bool) -> String {
        format!(
            "dfloat8 holds FP8 (F8_E4M3) matrices, and this checkpoint has {found}: use --to dfloat11 or archive"
        )
    }

    fn on_gpu(&self) -> Encoding {
        Encoding::Dfloat8
    }

    fn reads(&self) -> u64 {
        3
    }

    fn gb_per_second(&self) -> f64 {
        0.17
    }

    fn timed(&self, dtype: Dtype) -> Option<Box<dyn Timed>> {
        (dtype == Dtype::F8_E4M3).then(|| Box::<timed::Unit>::default() as Box<dyn Timed>)
    }

    fn survey(&self, unit: &UnitSource<'_>, _first: &Tensor, work: Work<'_>) -> Result<Survey> {
        stream::survey(Form::Fp8, unit, work)
    }
}
