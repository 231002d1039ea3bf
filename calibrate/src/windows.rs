//! Windows of tokens.

use llmpress_formats::{Error, Result};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Which windows of a text are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// How many.
    pub windows: usize,
    /// Tokens of each, its BOS included.
    pub length: usize,
    /// Draws them by chance from all of the text; else they are the first ones.
    pub seed: Option<u64>,
}

impl Cut {
    /// Tokens of text that a window takes.
    fn body(&self, bos: Option<u32>) -> usize {
        self.length.saturating_sub(usize::from(bos.is_some()))
    }

    /// Tokens of text that are needed at least.
    pub(crate) fn needed(&self, bos: Option<u32>) -> usize {
        self.windows.saturating_mul(self.body(bos))
    }
}

/// Windows of equal length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Calibration {
    windows: Vec<Vec<u32>>,
}

impl Calibration {
    /// Windows of a text's tokens, each after `bos` where there is one, in the text's order. They never overlap.
    ///
    /// # Errors
    /// [`Error::Invalid`] where the text is too short, or nothing is asked for.
    pub fn new(ids: &[u32], cut: Cut, bos: Option<u32>) -> Result<Self> {
        let Cut { windows, length, seed } = cut;
        if windows == 0 || length < 2 {
            return Err(Error::Invalid(format!(
                "{windows} calibration windows of {length} tokens are nothing to go by"
            )));
        }
        let needed = cut.needed(bos);
        if ids.len() < needed {
            return Err(Error::Invalid(format!(
                "the calibration text has {} tokens; {windows} windows of {length} need {needed}: give a longer text, \
                 or fewer or shorter windows",
                ids.len()
            )));
        }
        let body = cut.body(bos);
        let window = |body: &[u32]| bos.into_iter().chain(body.iter().copied()).collect();
        let all = ids.chunks_exact(body);
        let windows = match seed {
            None => all.take(windows).map(window).collect(),
            Some(seed) => {
                let taken = draw(all.len(), windows, seed);
                all.enumerate()
                    .filter(|(i, _)| taken.binary_search(i).is_ok())
                    .map(|(_, w)| window(w))
                    .collect()
            }
        };
        Ok(Self { windows })
    }

    /// The first windows of it, one at least.
    #[must_use]
    pub fn first(&self, windows: usize) -> Self {
        Self { windows: self.windows.iter().take(windows.max(1)).cloned().collect() }
    }

    /// The windows.
    pub fn windows(&self) -> &[Vec<u32>] {
        &self.windows
    }

    /// Tokens of a window.
    pub fn length(&self) -> usize {
        self.windows.first().map_or(0, Vec::len)
    }

    /// Tokens of all windows.
    pub fn tokens(&self) -> usize {
        self.windows.iter().map(Vec::len).sum()
    }

    /// A digest of the ids.
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for window in &self.windows {
            hasher.update(&(window.len() as u64).to_le_bytes());
            window.iter().for_each(|id| {
                hasher.update(&id.to_le_bytes());
            });
        }
        hasher.finalize().to_hex().to_string()
    }
}

/// `count` different numbers below `all`, ascending.
fn draw(all: usize, count: usize, seed: u64) -> Vec<usize> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut numbers: Vec<usize> = (0..all).collect();
    for i in 0..count.min(all) {
        // The bias of a remainder over 64 bits is far below what anyone could see.
        numbers.swap(i, i + (random.next_u64() % (all - i) as u64) as usize);
    }
    numbers.truncate(count);
    numbers.sort_unstable();
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(windows: usize, length: usize) -> Cut {
        Cut { windows, length, seed: None }
    }

    #[test]
    fn windows_follow_each_other_and_short_texts_are_refused() {
        let ids: Vec<u32> = (0..10).collect();
        let plain = Calibration::new(&ids, cut(2, 5), None);
        assert!(plain.is_ok_and(|c| c.windows() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]));
        let with_bos = Calibration::new(&ids, cut(3, 4), Some(99));
        assert!(with_bos.is_ok_and(|c| c.windows()[1] == [99, 3, 4, 5] && c.tokens() == 12));
        for (windows, length) in [(3, 4), (2, 6), (0, 4), (1, 1), (usize::MAX, 9)] {
            assert!(matches!(Calibration::new(&ids, cut(windows, length), None), Err(Error::Invalid(_))));
        }
    }

    #[test]
    fn a_seed_draws_windows_by_chance_and_the_same_ones_again() {
        let ids: Vec<u32> = (0..400).collect();
        let of = |seed| Calibration::new(&ids, Cut { seed, ..cut(10, 4) }, None).unwrap();
        let (first, seven) = (of(None), of(Some(7)));
        assert_eq!(seven, of(Some(7)));
        assert!(seven != first && seven != of(Some(8)));
        let starts: Vec<u32> = seven.windows().iter().map(|w| w[0]).collect();
        // Whole windows of the text, none twice, from all of it.
        assert!(
            starts.is_sorted_by(|a, b| a < b) && starts.iter().all(|s| s.is_multiple_of(4)),
            "{starts:?}"
        );
        assert!(starts.iter().any(|s| *s >= 200), "{starts:?}");
        // As many as there are: all of them.
        let all = Calibration::new(&ids, Cut { seed: Some(1), ..cut(100, 4) }, None);
        assert_eq!(all.unwrap(), Calibration::new(&ids, cut(100, 4), None).unwrap());
    }
}
