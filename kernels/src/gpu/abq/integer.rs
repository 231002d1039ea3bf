//! Products of weights of 1 to 8 bits with activations of 1 to 8 bits, in integers: the bits of the processor's.
//!
//! ```text
//! x --a grid a token--> codes        few tokens: bit planes, common bits are counted
//!                                    more: bytes, into which planes of weights are spread in registers
//! ```

mod planes;
mod product;

pub use planes::Matrix;
pub(super) use planes::piece;
pub use product::{Quantising, Variant, Weights, product, product_in, variants, workspace_bytes};
