//! Derivatives of the decoder's sub-layers, and the loops that learn their weights.
//!
//! ```text
//! residual --norm--> attention or gated MLP --> what is added to the residual       Net::forward
//!                    weights' derivatives  <--  that of a loss by it                Net::backward
//!
//! ids --> all sub-layers, last norm --> head, loss against a teacher --> back through all of it           Decoder, Head
//! text --packed, shuffled--> windows of a step --> that --> what a pass trains; states to go on from      train
//!
//! windows by chance -- forward, loss against targets, backward --> AdamW with a cosine schedule    descend
//!     of a sub-layer, against the original's stream after it                                       reconstruct
//!     of both sub-layers of a block, against what the original gives out on either stream          Block
//! ```
//!
//! All products run on the kernels of the decoder, whose order of additions is stated: what is learned has the same bits on
//! any number of threads and any processor.

mod adam;
mod attention;
mod block;
mod decoder;
mod descend;
mod distil;
mod distiller;
mod family;
mod linear;
mod maps;
mod mlp;
mod net;
mod norm;
mod reconstruct;
mod state;
mod text;
mod train;

pub use adam::{Adam, Rate};
pub use block::{Block, BlockKept, BlockStreams, Losses, Variables, learn_block};
pub use decoder::{Decoder, DecoderGradients, DecoderKept};
pub use descend::{HELD_BACK, Outcome, Settings};
pub use distil::{Distillation, Head, HeadRoom, Loss, MOST_BYTES as MOST_LOGIT_BYTES};
pub use distiller::{Distiller, Evaluated, GivenAll, Student};
pub use family::{check, unlearnable};
pub use maps::Maps;
pub use net::{Given, Gradients, Kept, Net, Turned};
pub use reconstruct::{Variable, reconstruct};
pub use state::{StateHead, read_state, read_values, write_state, write_values};
pub use text::{Order, Text, Window};
pub use train::{Schedule, Then, Training, Watch, train};
