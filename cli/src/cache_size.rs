//! What keys and values take of memory where they are held as codes: of inspect and plan.

use serde::Serialize;

/// A cache of codes.
#[derive(Debug, Serialize)]
pub(crate) struct CacheSize {
    /// Of a code.
    bits: u8,
    /// What the keys and values of a token take in all layers, scales and zero points included.
    bytes_per_token: usize,
}

impl CacheSize {
    /// Of so many bits and bytes a token.
    pub(crate) fn new((bits, bytes_per_token): (u8, usize)) -> Self {
        Self { bits, bytes_per_token }
    }

    /// In a line.
    pub(crate) fn text(&self) -> String {
        format!("cache: keys and values in {} bits, {} bytes a token\n", self.bits, self.bytes_per_token)
    }
}
