//! How long parts of a job take beside each other: what progress is counted in.
//!
//! ```text
//! a weight that is quantised: 1       that is learned: what a step multiplies it with, times steps, over what quantising does
//! ```

use crate::Spec;

/// Products with each weight that a token takes in a step of learning: forward, and back to weights and inputs.
const PRODUCTS: u64 = 3;
/// One in so many tries moves a code, which takes as many products as there are columns. Measured on tinylm.
const SWEEPS: u64 = 2;

/// The text that a job goes by.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Text {
    /// All its tokens.
    pub(crate) tokens: u64,
    /// Its windows.
    pub(crate) windows: usize,
    /// Tokens of a window.
    pub(crate) window: u64,
}

impl Text {
    /// Learning a weight of a matrix of `cols`, in times of quantising it: 0 where it is not to be learned, or with the whole model afterwards.
    pub(crate) fn learning(self, spec: &Spec, cols: u64, alone: bool) -> u64 {
        let Some(learn) = spec.by_layer() else { return 0 };
        let steps = u64::from(learn.steps(spec.abq.bits, self.windows));
        let step = if alone { cols / SWEEPS } else { PRODUCTS.saturating_mul(self.window) };
        let quantising = self.tokens.saturating_mul(2).saturating_add(cols);
        steps.saturating_mul(step).div_ceil(quantising.max(1)).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Quantiser;

    #[test]
    fn learning_counts_as_what_it_multiplies() {
        let spec = |text: &str| text.parse::<Quantiser>().unwrap().spec;
        let text = Text { tokens: 16384, windows: 64, window: 256 };
        assert_eq!(text.learning(&spec("gptq:w2"), 576, false), 0);
        // 400 steps of 3 x 256 over 2 x 16384 + 576.
        assert_eq!(text.learning(&spec("gptq:w2,learn"), 576, false), 10);
        assert_eq!(text.learning(&spec("gptq:w2,learn"), 576, true), 4);
        assert_eq!(text.learning(&spec("gptq:w2,learn,steps=800"), 576, false), 19);
        assert_eq!(Text::default().learning(&spec("gptq:w2,learn,steps=1"), 0, false), 1);
    }
}
