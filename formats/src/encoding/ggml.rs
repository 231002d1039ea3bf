//! Tensors as ggml stores them in GGUF files: floats, and blocks of codes with scales inside.
//!
//! ```text
//! row: | block | block | ... |     block: scales, minima, codes of 32 or 256 neighbouring weights
//! ```
//!
//! Blocks decode as the reference dequantisers of the `gguf` package do, in single precision, and are then rounded once to BF16.
//! Plain floats stay what they are. In no manifest; an export writes them.

mod blocks;
mod pack;
mod reader;

use serde::Serialize;

pub use blocks::Blocks;
pub use pack::{holding, pack_rows};
pub(super) use reader::Reader;

/// How a tensor lies in a GGUF file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Ggml {
    /// The type of its blocks.
    pub blocks: Blocks,
    /// The heads whose rows are interleaved: of each head, the two halves that a rotary embedding turns together take turns.
    pub heads: Option<u64>,
    /// Whether one was added to every value.
    pub offset_by_one: bool,
}

impl Ggml {
    /// The type, where it says how many bits a weight takes.
    pub fn widths(&self) -> Option<String> {
        self.blocks.is_quantised().then(|| self.blocks.name().to_owned())
    }
}
