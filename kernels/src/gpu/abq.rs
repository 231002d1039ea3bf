//! Weights of 1 to 8 bits (encoding `abq`) in device memory, and products with them.
//!
//! ```text
//! activations in BF16                 [`Matrix`]     codes less their centre are multiplied as BF16, exactly
//! activations of 1 to 8 bits a token  [`integer`]    codes are multiplied as integers, exactly
//! ```

pub mod integer;
mod layout;
mod matrix;
mod product;
pub mod reference;
mod stored;

pub use matrix::Matrix;
pub use product::{Variant, Weights, product, product_in, variants, workspace_bytes};

/// The sources of each width.
const FILES: [&str; 8] = ["abq1", "abq2", "abq3", "abq4", "abq5", "abq6", "abq7", "abq8"];

/// A kernel's names in these.
macro_rules! of_each_width {
    ($name:literal) => {
        [
            concat!("abq1_", $name),
            concat!("abq2_", $name),
            concat!("abq3_", $name),
            concat!("abq4_", $name),
            concat!("abq5_", $name),
            concat!("abq6_", $name),
            concat!("abq7_", $name),
            concat!("abq8_", $name),
        ]
    };
}
use of_each_width;
