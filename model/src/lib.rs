//! Runs language models from checkpoints of any encoding, on the processor, in single precision.
//!
//! ```text
//! checkpoint (plain or compressed) --> Model --> hidden states --> logits
//!                                        '-- taps for passes, sub-layers left out for pruning
//! ```
//!
//! Weights stay as they are stored; a product decodes the rows that it needs. So a model takes the memory of
//! its checkpoint, some MiB a thread, and its activations.

mod attention;
mod block;
mod cache;
mod chat;
mod config;
mod decoder;
mod delta;
mod engine;
mod fold;
mod generate;
mod generate_all;
mod gpu;
mod head;
mod latent;
mod linear;
mod load_mixers;
mod mlp;
mod norm;
mod observe;
mod online;
mod panels;
mod parts;
mod picks;
mod python_json;
mod rope;
mod side_by_side;
mod special_tokens;
mod tokenizer;
mod unused;
mod weights;

pub use block::{Reads, SharedInput};
pub use cache::Cache;
pub use chat::{ChatTemplate, Message, serve_chat_template};
pub use config::{Activation, Clamped, LayerConfig, MlpConfig, ModelConfig, Temperature};
pub use decoder::{Model, soft_cap};
pub use delta::DeltaConfig;
pub use engine::{Batch, Engine, Session};
pub use fold::{Folds, changed, folded, undone};
pub use generate::{Generation, Sampling, greedy};
pub use generate_all::{Finished, generate_all};
pub use gpu::{GpuModel, GpuNeeds};
pub use latent::LatentConfig;
pub use linear::{Linear, rounded as rounded_inputs};
pub use llmpress_formats::{Blueprint, Error, Result};
pub use observe::{Observer, Skips, SubLayer, Unobserved};
pub use online::HeadRounding;
pub use panels::Panels;
pub use parts::{Body, Outlet, Parts};
pub use picks::{Groups, Picks};
pub use rope::{RopeConfig, Rotation, Scaling};
pub use special_tokens::special_tokens;
pub use tokenizer::{DecodeStream, Tokenizer};
pub use weights::Weights;
