//! The dtypes of safetensors.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::Error;

macro_rules! dtypes {
    ($($variant:ident $name:literal $bits:literal $doc:literal,)*) => {
        /// A dtype, by its name in safetensors. Ordered as safetensors orders it, so that sorting
        /// downwards puts larger elements first.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[allow(non_camel_case_types, clippy::upper_case_acronyms)]
        pub enum Dtype {
            $(#[doc = $doc] #[serde(rename = $name)] $variant,)*
        }

        impl Dtype {
            /// Every dtype.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The name in safetensors.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// Bits an element.
            pub fn bits(self) -> u32 {
                match self { $(Self::$variant => $bits,)* }
            }
        }
    };
}

dtypes! {
    BOOL "BOOL" 8 "Boolean, a byte each.",
    F4 "F4" 4 "MXFP4 (E2M1), two a byte.",
    F6_E2M3 "F6_E2M3" 6 "MXFP6.",
    F6_E3M2 "F6_E3M2" 6 "MXFP6.",
    U8 "U8" 8 "Unsigned 8-bit integer.",
    I8 "I8" 8 "Signed 8-bit integer.",
    F8_E5M2 "F8_E5M2" 8 "FP8.",
    F8_E4M3 "F8_E4M3" 8 "FP8.",
    F8_E8M0 "F8_E8M0" 8 "An exponent, the scale of MX formats.",
    F8_E4M3FNUZ "F8_E4M3FNUZ" 8 "FP8 without infinities and negative zero.",
    F8_E5M2FNUZ "F8_E5M2FNUZ" 8 "FP8 without infinities and negative zero.",
    I16 "I16" 16 "Signed 16-bit integer.",
    U16 "U16" 16 "Unsigned 16-bit integer.",
    F16 "F16" 16 "IEEE half precision.",
    BF16 "BF16" 16 "Brain float: sign, 8 bits of exponent, 7 of mantissa.",
    I32 "I32" 32 "Signed 32-bit integer.",
    U32 "U32" 32 "Unsigned 32-bit integer.",
    F32 "F32" 32 "IEEE single precision.",
    C64 "C64" 64 "Complex of two F32.",
    F64 "F64" 64 "IEEE double precision.",
    I64 "I64" 64 "Signed 64-bit integer.",
    U64 "U64" 64 "Unsigned 64-bit integer.",
}

impl Dtype {
    /// Bytes of a tensor of this shape; `None` if they overflow or are not whole bytes.
    pub fn byte_len(self, shape: &[u64]) -> Option<u64> {
        let elements = shape.iter().try_fold(1u64, |product, &dim| product.checked_mul(dim))?;
        let bits = elements.checked_mul(u64::from(self.bits()))?;
        (bits % 8 == 0).then_some(bits / 8)
    }
}

impl FromStr for Dtype {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self, Error> {
        Self::ALL.iter().copied().find(|d| d.name() == s).ok_or_else(|| {
            let names: Vec<&str> = Self::ALL.iter().map(|d| d.name()).collect();
            Error::Invalid(format!("unknown dtype {s:?}; safetensors knows {}", names.join(", ")))
        })
    }
}
