//! Derivatives of the decoder's sub-layers, and the loop that learns their weights.
//!
//! ```text
//! residual --norm--> attention or gated MLP --> what is added to the residual       Net::forward
//!                    weights' derivatives  <--  that of a loss by it                Net::backward
//!
//! windows by chance -- forward, loss against targets, backward --> AdamW with a cosine schedule    reconstruct
//! ```
//!
//! All products run on the kernels of the decoder, whose order of additions is stated: what is learned has the same bits on
//! any number of threads and any processor.

mod adam;
mod attention;
mod linear;
mod mlp;
mod net;
mod norm;
mod reconstruct;

pub use adam::{Adam, Rate};
pub use net::{Kept, Net};
pub use reconstruct::{HELD_BACK, Outcome, Settings, Variable, reconstruct};
