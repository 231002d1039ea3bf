//! Checkpoints of the Hugging Face hub, by name.
//!
//! ```text
//! org/name[@revision] --> commit, files with sizes and digests       listing
//!     headers: the first bytes of each file of weights --> shell     a directory that opens like the checkpoint, without its weights
//!     whole:   shell says which files count --> downloads            into the hub's own cache, each gone on with where it stopped
//! ```
//!
//! The cache is the one that `huggingface_hub` and its kin share: `models--org--name/{blobs,refs,snapshots}`. A blob appears there
//! under its name when it is whole and its digest is right, never before.

mod at_once;
mod cache;
mod client;
mod digest;
mod download;
mod error;
mod id;
mod listing;
mod progress;
mod settings;
mod shell;
mod snapshot;

pub use error::{Error, Result};
pub use id::Id;
pub use progress::Progress;
pub use settings::Settings;
pub use shell::Shell;
pub use snapshot::{Headers, Hub, Snapshot};
