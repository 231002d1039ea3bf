//! How weights are held, whatever they are stored as.

/// How weights lie in the memory that multiplies them: the processor's or a GPU's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Weights {
    /// As they are stored. A GPU holds DFloat11 and fixed12 so, every other encoding as plain BF16.
    #[default]
    Stored,
    /// Plain BF16.
    Bf16,
    /// DFloat11, a unit a layer, decoded when tokens are read.
    Dfloat11,
    /// fixed12, multiplied as it is.
    Fixed12,
}
