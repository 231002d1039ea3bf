//! Reads and writes the checkpoints of language models.
//!
//! ```text
//! Hugging Face directory --+
//! official DFloat11 -------+--> Checkpoint: logical tensors, any encoding, any row range
//! llmpress checkpoint -----+
//! GGUF file ---------------+
//! pytorch_model.bin -------+
//! ```
//!
//! Light enough to be embedded in an inference engine: no threads, no network, no global state.
//!
//! ```no_run
//! # fn main() -> Result<(), llmpress_formats::Error> {
//! let checkpoint = llmpress_formats::Checkpoint::open("OUT".as_ref())?;
//! let name = "model.layers.0.self_attn.q_proj.weight";
//! let tensor = checkpoint.tensor(name)?;
//! let mut rows = vec![0u8; 16 * 2 * tensor.shape[1] as usize];
//! checkpoint.read_rows(name, 32..48, &mut rows)?;
//! # Ok(())
//! # }
//! ```

mod architecture;
mod base;
pub mod blueprint;
mod checkpoint;
mod component;
mod config;
mod directory;
mod discovery;
mod dtype;
mod edit;
pub mod encoding;
mod error;
mod files;
mod finished;
mod gguf;
mod hashed;
mod header;
mod index;
mod known_files;
mod layer_names;
mod manifest;
mod mapped;
mod named;
mod official;
mod printable;
mod python_json;
mod remade;
mod removal;
mod shard;
mod shard_writer;
mod torch;
mod transform;
mod unit;

pub use architecture::{
    KNOWN_MODEL_TYPES, PatternDict, Traits, UnitPattern, block_counts, block_linears, derive_units,
    pattern_dict,
};
pub use base::Base;
pub use blueprint::Blueprint;
pub use checkpoint::{Checkpoint, Kind, StoredSize, Tensor};
pub use component::Component;
pub use config::{CONFIG_FILE, Config, DFLOAT11_KEY, QUANTISATION_FILE, QUANTISATION_KEYS, WEIGHTS_KEY};
pub use directory::Directory;
pub use discovery::STATE_DIR;
pub use dtype::Dtype;
pub use edit::Edit;
pub use encoding::{Encoding, foreign};
pub use error::{Error, Result};
pub use files::{is_temporary_name, open_file, read_input, read_small_file, write_atomic, write_atomic_with};
pub use gguf::{DTYPES_KEY as GGUF_DTYPES_KEY, GgufLayout, GgufTensor, GgufValue};
pub use hashed::{Written, write_json};
pub use header::{Header, MAX_HEADER_BYTES, METADATA_KEY, RenderEntry, TensorInfo, render};
pub use index::INDEX_FILE;
pub use known_files::{is_known_file, is_model_file, is_weights_file};
pub use layer_names::{LayerNames, Part};
pub use manifest::{
    BaseEntry, ComponentEntry, Digest, EncodingEntry, FORMAT_VERSION, FileEntry, KNOWN_REQUIREMENTS,
    MANIFEST_FILE, Manifest, Producer, ShardEntry, Source, TensorEntry, UnitEntry,
};
pub use mapped::Mapped;
pub use named::Named;
pub use official::{PACKAGE_VERSION, dfloat11_config};
pub use printable::printable;
pub use python_json::{finite_json, python_json};
pub use remade::Remake;
pub use removal::{DROP_ATTENTION_KEY, DROP_MLP_KEY, Removal, Size};
pub use shard::ShardFile;
pub use shard_writer::{ShardWriter, Slot, SlotPlan, WrittenShard};
pub use transform::{
    Order, PermutationSite, QuantizeSite, Rotation, RotationSite, ScaleSite, Scales, Transform,
};
pub use unit::Unit;

/// Most bytes of all tensors, or of all shards, together. Far beyond any disk: sums and small multiples of sizes stay
/// below 2^64.
const MAX_TOTAL_BYTES: u64 = 1 << 58;
