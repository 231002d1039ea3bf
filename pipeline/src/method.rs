//! The methods by which tensors are stored: one room each.

mod abq;
mod archive;
mod coded;
mod delta;
mod dfloat11;
mod dfloat8;
mod exported;
mod fixed12;
mod kept;
mod kept_fixed12;
mod planes;
mod raw;
pub(crate) mod room;
mod sparse24;
pub(crate) mod timed;

use std::str::FromStr;

use llmpress_formats::Tensor;
use llmpress_formats::foreign::Layout;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};
pub(crate) use exported::Target;
pub(crate) use kept::kept_unit;
pub(crate) use kept_fixed12::plain_values;
pub(crate) use raw::coding as raw_coding;
use room::{Fit, Room};

/// The list of methods: name, room. Those that nobody asks for come last.
macro_rules! methods {
    ($($(#[$doc:meta])* $name:ident => $room:expr,)*; $($(#[$more:meta])* $other:ident => $its:expr,)*) => {
        /// What to do with a tensor.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "lowercase")]
        pub enum Method {
            $($(#[$doc])* $name,)*
            $($(#[$more])* $other,)*
        }

        impl Method {
            /// All methods that can be asked for.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            pub(crate) fn room(self) -> &'static dyn Room {
                match self {
                    $(Self::$name => &$room,)*
                    $(Self::$other => &$its,)*
                }
            }
        }
    };
}

methods! {
    /// Keep its bytes.
    Raw => raw::Raw,
    /// Byte planes through zstd; any dtype.
    Planes => planes::Planes,
    /// The published DFloat11 format; BF16 linears of repeated blocks, and the head.
    Dfloat11 => dfloat11::Dfloat11,
    /// FP8 weights with entropy-coded exponents; the rest as it is.
    Dfloat8 => dfloat8::Dfloat8,
    /// Fixed 12 bits a weight; BF16 matrices.
    Fixed12 => fixed12::Fixed12,
    /// Floats of 16 and 8 bits as small as their magnitudes allow: for storage and transfer.
    Archive => archive::Archive,
    /// Two in four, of matrices that are so already; F16, BF16 and F32.
    Sparse24 => sparse24::Sparse24 { fixed12: false },
    /// The same with twelve bits a kept value where these are BF16.
    #[serde(rename = "sparse24:fixed12")]
    Sparse24Fixed12 => sparse24::Sparse24 { fixed12: true },
    /// The codes of a checkpoint that another tool quantised; the rest as it is.
    Abq => abq::Abq,
    ;
    /// By a base, where `archive` is asked for and there is one.
    Delta => delta::Delta,
    /// What a pass or the source stores under a lossy encoding stays as it is.
    Kept => kept::Kept,
    /// The same, but for the kept values of what has sums, which take fixed12.
    #[serde(rename = "kept:fixed12")]
    KeptFixed12 => kept_fixed12::KeptFixed12,
    /// The same, but for its codes, which go through an entropy coder.
    Coded => coded::Coded,
    /// What is quantised, as compressed-tensors packs it.
    PackQuantized => exported::Exported(Layout::PackQuantized),
    /// The same in signed bytes.
    IntQuantized => exported::Exported(Layout::IntQuantized),
    /// As GPTQ lays it out.
    Gptq => exported::Exported(Layout::Gptq { plain_zeros: false }),
}

impl Method {
    /// The name on the command line and in recipes.
    pub fn name(self) -> &'static str {
        self.room().name()
    }

    /// The method that a tensor by itself really gets.
    pub(crate) fn alone(asked: Self, tensor: &Tensor) -> Self {
        match asked.room().fit(tensor) {
            Fit::Suits => asked,
            Fit::Planes if Self::Planes.room().fit(tensor) == Fit::Suits => Self::Planes,
            Fit::Planes | Fit::Raw => Self::Raw,
        }
    }
}

impl FromStr for Method {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        Self::ALL.iter().copied().find(|m| m.name() == s).ok_or_else(|| {
            let names: Vec<&str> = Self::ALL.iter().map(|m| m.name()).collect();
            Error::Invalid(format!("unknown method {s:?}; the methods are {}", names.join(", ")))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_same_on_the_command_line_and_in_files() {
        for method in Method::ALL {
            assert_eq!(method.name().parse::<Method>().unwrap(), *method);
            assert_eq!(serde_json::to_value(method).unwrap(), method.name());
        }
        assert!(
            "zip"
                .parse::<Method>()
                .unwrap_err()
                .to_string()
                .contains("raw, planes, dfloat11, dfloat8, fixed12, archive")
        );
    }
}
