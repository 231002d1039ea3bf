//! `abq` without widths: codes that another tool chose are taken over (see [`kept`](super::kept)), and everything else is
//! left as it is.

use llmpress_formats::{Checkpoint, Tensor};

use super::raw;
use super::room::{Fit, Room, Survey};
use crate::source::UnitSource;
use crate::work::Work;
use crate::{Error, Result};

pub(crate) struct Abq;

impl Room for Abq {
    fn name(&self) -> &'static str {
        "abq"
    }

    fn takes_numbers(&self) -> bool {
        true
    }

    fn check_source(&self, checkpoint: &Checkpoint) -> Result<()> {
        if checkpoint.units().values().any(|unit| unit.encoding().is_lossy()) {
            return Ok(());
        }
        Err(Error::Invalid(format!(
            "{}: abq without widths takes over the codes of a checkpoint that compressed-tensors, gptq or awq quantised, and \
             this one is not: say the widths, as in abq:w4",
            checkpoint.root().display()
        )))
    }

    fn fit(&self, _tensor: &Tensor) -> Fit {
        Fit::Raw
    }

    fn expected_bytes(&self, _tensor: Option<&Tensor>, bytes: u64) -> u64 {
        bytes
    }

    fn components(&self) -> &'static [&'static str] {
        &[]
    }

    fn survey(&self, _unit: &UnitSource<'_>, first: &Tensor, _work: Work<'_>) -> Result<Survey> {
        Ok(Ok(raw::coding(first.dtype, &first.shape)))
    }
}
