//! How a text is cut into windows, and which of their tokens are scored.
//!
//! ```text
//! separate windows:   [0 ......... W) [W ......... 2W)      positions 1 .. W-1 of each
//! stride S:           [0 ......... W)
//!                          [S ......... S + W)              after the first, its last S positions
//! ```

use std::ops::Range;

use llmpress_formats::{Error, Result};
use serde::Serialize;

/// How a text is evaluated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Protocol {
    /// Tokens of a window, the BOS not counted.
    pub window: usize,
    /// Distance of sliding windows; separate windows if absent.
    pub stride: Option<usize>,
    /// Take the first so many windows only.
    pub limit: Option<usize>,
    /// The token put before every window.
    pub bos: Option<u32>,
}

/// One window.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    /// What the model reads.
    pub(crate) ids: Vec<u32>,
    /// Which of them are predicted, each from all before it.
    pub(crate) scored: Range<usize>,
}

impl Protocol {
    /// How many windows there are of so many tokens.
    ///
    /// # Errors
    /// A window below 2 tokens or longer than the text; a stride of 0 or not below the window.
    pub fn windows(&self, tokens: usize) -> Result<usize> {
        let Self { window, stride, limit, .. } = *self;
        if window < 2 {
            return Err(Error::Invalid(format!(
                "a window of {window} tokens predicts nothing: take 2 or more"
            )));
        }
        if stride.is_some_and(|s| s == 0 || s >= window) {
            return Err(Error::Invalid(format!(
                "the stride must be 1 to {}, less than the window",
                window - 1
            )));
        }
        if tokens < window {
            return Err(Error::Invalid(format!(
                "the text has {tokens} tokens, fewer than a window of {window}: take a longer text or a smaller window"
            )));
        }
        let all = (tokens - window) / stride.unwrap_or(window) + 1;
        Ok(all.min(limit.unwrap_or(all)))
    }

    /// Window `index` of a text.
    pub(crate) fn window(&self, ids: &[u32], index: usize) -> Window {
        let start = index * self.stride.unwrap_or(self.window);
        let skipped = match self.stride {
            Some(stride) if index > 0 => self.window - stride,
            _ => 1,
        };
        let before = usize::from(self.bos.is_some());
        let ids = self.bos.into_iter().chain(ids[start..start + self.window].iter().copied()).collect();
        Window { ids, scored: before + skipped..before + self.window }
    }

    /// Windows from `first` on that can be read at once: up to `most` of `windows` whose scored tokens lie alike.
    pub(crate) fn alike(&self, ids: &[u32], first: usize, windows: usize, most: usize) -> Vec<Window> {
        let mut alike: Vec<Window> = Vec::new();
        for index in first..windows.min(first.saturating_add(most)) {
            let window = self.window(ids, index);
            if alike.first().is_some_and(|first| first.scored != window.scored) {
                break;
            }
            alike.push(window);
        }
        alike
    }

    /// Tokens of a window as the model reads it.
    pub(crate) fn length(&self) -> usize {
        self.window + usize::from(self.bos.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_position_that_has_a_context_is_scored_once() {
        let ids: Vec<u32> = (0..100).collect();
        for (stride, bos) in [(None, None), (None, Some(7)), (Some(3), None), (Some(9), Some(7))] {
            let protocol = Protocol { window: 10, stride, limit: None, bos };
            let scored: Vec<u32> = (0..protocol.windows(ids.len()).unwrap())
                .flat_map(|i| {
                    let window = protocol.window(&ids, i);
                    assert_eq!(window.ids.len(), protocol.length());
                    assert!(bos.is_none_or(|bos| window.ids[0] == bos));
                    window.ids[window.scored].to_vec()
                })
                .collect();
            let expected: Vec<u32> = match stride {
                None => (0..100).filter(|i| i % 10 != 0).collect(),
                Some(stride) => (1..10 + (100 - 10) / stride as u32 * stride as u32).collect(),
            };
            assert_eq!(scored, expected, "{stride:?}");
        }
    }

    #[test]
    fn windows_that_are_read_at_once_are_all_windows_and_alike() {
        let ids: Vec<u32> = (0..100).collect();
        for stride in [None, Some(3)] {
            let protocol = Protocol { window: 10, stride, limit: Some(9), bos: None };
            let windows = protocol.windows(ids.len()).unwrap();
            let (mut all, mut at) = (Vec::new(), 0);
            while at < windows {
                let alike = protocol.alike(&ids, at, windows, 4);
                assert!(!alike.is_empty() && alike.len() <= 4);
                assert!(alike.iter().all(|window| window.scored == alike[0].scored));
                at += alike.len();
                all.extend(alike);
            }
            let expected: Vec<Window> = (0..windows).map(|index| protocol.window(&ids, index)).collect();
            assert_eq!(all, expected, "{stride:?}");
        }
    }

    #[test]
    fn impossible_windows_are_refused() {
        let protocol = Protocol { window: 10, stride: None, limit: Some(2), bos: None };
        assert_eq!(protocol.windows(100).unwrap(), 2);
        assert_eq!(protocol.windows(10).unwrap(), 1);
        assert!(protocol.windows(9).unwrap_err().to_string().contains("9 tokens"));
        assert!(Protocol { window: 1, ..protocol }.windows(9).is_err());
        assert!(Protocol { stride: Some(10), ..protocol }.windows(99).is_err());
        assert!(Protocol { stride: Some(0), ..protocol }.windows(99).is_err());
    }
}
