//! How weights are held, whatever they are stored as.

/// How weights lie in the memory that multiplies them: the processor's or a GPU's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Weights {
    /// As they are stored. A GPU holds DFloat11 and fixed12 so, every other encoding as plain weights.
    #[default]
    Stored,
    /// Plain: BF16, F16 or F32, whatever they are.
    Bf16,
    /// DFloat11, a unit a layer, decoded when tokens are read; weights that are not BF16 stay plain.
    Dfloat11,
    /// fixed12, multiplied as it is; weights that are not BF16 stay plain.
    Fixed12,
}
