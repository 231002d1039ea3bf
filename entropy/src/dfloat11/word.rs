//! The code of one exponent.

/// A code: `length` bits of `bits`, right-justified.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct CodeWord {
    pub(super) bits: u32,
    pub(super) length: u32,
}

/// The code's bits at the top of 32.
pub(super) fn left_justified(word: CodeWord) -> u32 {
    if word.length == 0 { 0 } else { word.bits << (32 - word.length) }
}
