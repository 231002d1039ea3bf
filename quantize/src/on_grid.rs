//! What learning wants of a matrix on its grids.

use llmpress_formats::Result;
use llmpress_formats::encoding::abq::Packed;
use llmpress_learn::Variable;

/// A matrix on its grids as it is learned.
pub(crate) trait OnGrid: Variable {
    /// The weights at their places, before they are rounded.
    fn unrounded(&self) -> Vec<f32>;

    /// Moves all weights by so much from where they are learned to be, before they are rounded.
    fn shift(&mut self, by: Vec<f32>);

    /// Sets derivatives to zero where weights lie beyond the ends of their grid: rounding passes none there.
    fn pass(&self, gradient: &mut [f32]);

    /// What is stored of it, and its weights.
    ///
    /// # Errors
    /// Those of [`crate::Grid::pack`].
    fn finish(self: Box<Self>) -> Result<(Packed<'static>, Vec<f32>)>;
}
