//! What passes that are still to run will leave of a tensor, as far as headers tell.

use llmpress_formats::Encoding;
use llmpress_formats::encoding::abq::Abq;
use llmpress_formats::encoding::lowrank::{Base, Lowrank};
use llmpress_formats::encoding::sparse24::{Inner, Sparse24};
use llmpress_sparsify::GROUP;

/// A tensor as it will be finished.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Foreseen {
    /// Bytes, on average where one of several forms is still to be chosen.
    pub(crate) bytes: u64,
    /// How they are encoded, if it is not left dense.
    pub(crate) encoding: Encoding,
}

impl Foreseen {
    /// Two in four, with or without sums.
    pub(crate) fn sparse(bytes: u64, sums: bool) -> Self {
        Self { bytes, encoding: two_in_four(None, sums) }
    }

    /// Codes: of a matrix that is dense, or of what is kept of one that is two in four, with or without sums.
    pub(crate) fn quantised(bytes: u64, abq: Abq, sparse: Option<bool>) -> Self {
        let encoding = match sparse {
            None => Encoding::Abq(abq),
            Some(sums) => two_in_four(Some(Inner::Abq(abq)), sums),
        };
        Self { bytes, encoding }
    }
}

/// An encoding with kept values that are not encoded yet in `fixed12`.
pub(crate) fn in_fixed12(encoding: Encoding) -> Encoding {
    let values = Some(Inner::Fixed12 { base: 0 });
    match encoding {
        Encoding::Sparse24(Sparse24 { values: None }) => two_in_four(values, false),
        Encoding::Lowrank(Lowrank { base: Base::Sparse24(Sparse24 { values: None }), .. }) => {
            two_in_four(values, true)
        }
        other => other,
    }
}

fn two_in_four(values: Option<Inner>, sums: bool) -> Encoding {
    let sparse = Sparse24 { values };
    if sums {
        Encoding::Lowrank(Lowrank { block: GROUP as u32, base: Base::Sparse24(sparse), sums: None })
    } else {
        Encoding::Sparse24(sparse)
    }
}
