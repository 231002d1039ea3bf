//! Telling whoever waits how far a job is.

use llmpress_quantize::Lesson;
use llmpress_sparsify::ast::Evaluated;

/// Is told how far a part of a job is, from any thread.
pub trait Progress: Sync {
    /// The whole work: for a conversion in bytes, where every pass over the tensors counts.
    fn start(&self, total: u64);
    /// So much of it is done.
    fn advance(&self, amount: u64);
    /// So much of it was done by earlier runs.
    fn resumed(&self, amount: u64) {
        self.advance(amount);
    }
    /// A shard is complete.
    fn shard(&self, file: &str);
    /// Matrices of a model of so many layers were learned.
    fn learned(&self, lesson: &Lesson, layers: usize) {
        let _ = (lesson, layers);
    }
    /// A model in training was measured on windows that it is not trained on.
    fn evaluated(&self, found: &Evaluated) {
        let _ = found;
    }
}

/// Nobody is told: what is done so is not counted, or how much it is is known only afterwards.
pub(crate) struct Silent;

impl Progress for Silent {
    fn start(&self, _: u64) {}
    fn advance(&self, _: u64) {}
    fn shard(&self, _: &str) {}
}

/// What work is counted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counted {
    /// Bytes of tensors.
    Bytes,
    /// Windows of a text.
    Windows,
    /// Forward passes over a window.
    Passes,
    /// Prompts that are gone on from.
    Prompts,
    /// Endings of questions.
    Endings,
    /// Weights.
    Weights,
    /// Tokens of a text.
    Tokens,
}

/// A part of a job that is about to begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Task {
    /// What is done.
    pub verb: &'static str,
    /// Its size.
    pub size: u64,
    /// What the size is counted in.
    pub counted: Counted,
}

/// Shows the parts of a job, one after the other.
pub trait Watch: Sync {
    /// A part begins, and ends when what is returned is dropped.
    fn begin(&self, task: Task) -> Box<dyn Progress + '_>;

    /// Whether what can go on later is to stop where it is.
    fn is_stopped(&self) -> bool {
        false
    }
}
