//! The state of a layer that sums up what it read: as large after a million tokens as after one.
//!
//! ```text
//! held   after the tokens before position `at`
//! next   after those that were read last, of which the cache may not have counted any yet
//! ```
//!
//! A state cannot be taken back, so both are kept: a layer may read the same tokens once more, as passes do that try other weights, and goes
//! on from either.

/// Of a layer.
#[derive(Debug, Default)]
pub(crate) struct Recurrent {
    held: State,
    next: State,
}

/// What is known after some tokens.
#[derive(Clone, Debug, Default)]
pub(crate) struct State {
    /// How many tokens.
    at: usize,
    /// The last inputs of each channel of a convolution, the oldest first: `[channels, length - 1]`.
    pub(crate) inputs: Vec<f32>,
    /// What each head remembers: `[heads, key features, value features]`.
    pub(crate) memory: Vec<f32>,
}

impl Recurrent {
    /// Bytes of both states.
    pub(super) fn bytes(&self) -> usize {
        let of = |state: &State| 4 * (state.inputs.len() + state.memory.len());
        of(&self.held) + of(&self.next)
    }

    /// The state to change by `tokens` tokens from `first` on. All zero before the first one.
    ///
    /// # Errors
    /// The token after which a state is known, where it is another one.
    pub(crate) fn begin(
        &mut self,
        first: usize,
        tokens: usize,
        inputs: usize,
        memory: usize,
    ) -> Result<&mut State, usize> {
        if first == 0 {
            for (part, len) in [(&mut self.held.inputs, inputs), (&mut self.held.memory, memory)] {
                part.clear();
                part.resize(len, 0.0);
            }
            self.held.at = 0;
        } else if self.next.at == first {
            std::mem::swap(&mut self.held, &mut self.next);
        } else if self.held.at != first {
            return Err(self.next.at);
        }
        self.next.clone_from(&self.held);
        self.next.at = first + tokens;
        Ok(&mut self.next)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn tokens_may_be_read_again_and_no_others_than_those_that_follow() {
        let mut all = Recurrent::default();
        let read = |all: &mut Recurrent, first: usize, tokens: usize| {
            let state = all.begin(first, tokens, 1, 2)?;
            state.memory.iter_mut().for_each(|x| *x += tokens as f32);
            Ok::<_, usize>(state.memory.clone())
        };
        for _ in 0..3 {
            assert_eq!(read(&mut all, 0, 3), Ok(vec![3.0; 2]));
        }
        for _ in 0..3 {
            assert_eq!(read(&mut all, 3, 2), Ok(vec![5.0; 2]), "the same tokens again");
        }
        assert_eq!(read(&mut all, 5, 1), Ok(vec![6.0; 2]));
        assert_eq!(read(&mut all, 3, 1), Err(6), "what was before is forgotten");
        assert_eq!(read(&mut all, 7, 1), Err(6));
        assert_eq!(read(&mut all, 0, 4), Ok(vec![4.0; 2]), "from the start everything can be read");
        assert_eq!(read(&mut all, 4, 1), Ok(vec![5.0; 2]));
        assert_eq!(all.bytes(), 2 * 4 * 3);
    }
}
