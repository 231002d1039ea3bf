//! The tokens that sub-layers are judged on.

use llmpress_formats::{Error, Result};

/// Windows of equal length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Calibration {
    windows: Vec<Vec<u32>>,
}

impl Calibration {
    /// The first `windows` windows of `length` tokens of a text, each after `bos` where there is one.
    ///
    /// # Errors
    /// [`Error::Invalid`] where the text is too short, or nothing is asked for.
    pub fn new(ids: &[u32], windows: usize, length: usize, bos: Option<u32>) -> Result<Self> {
        let body = length.saturating_sub(usize::from(bos.is_some()));
        if windows == 0 || length < 2 {
            return Err(Error::Invalid(format!(
                "{windows} calibration windows of {length} tokens are nothing to go by"
            )));
        }
        let needed = windows.saturating_mul(body);
        if ids.len() < needed {
            return Err(Error::Invalid(format!(
                "the calibration text has {} tokens; {windows} windows of {length} need {needed}: give a longer text, \
                 or fewer or shorter windows",
                ids.len()
            )));
        }
        let window = |body: &[u32]| bos.into_iter().chain(body.iter().copied()).collect();
        Ok(Self { windows: ids.chunks_exact(body).take(windows).map(window).collect() })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_follow_each_other_and_short_texts_are_refused() {
        let ids: Vec<u32> = (0..10).collect();
        let plain = Calibration::new(&ids, 2, 5, None);
        assert!(plain.is_ok_and(|c| c.windows() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]));
        let with_bos = Calibration::new(&ids, 3, 4, Some(99));
        assert!(with_bos.is_ok_and(|c| c.windows()[1] == [99, 3, 4, 5] && c.tokens() == 12));
        for (windows, length) in [(3, 4), (2, 6), (0, 4), (1, 1), (usize::MAX, 9)] {
            assert!(matches!(Calibration::new(&ids, windows, length, None), Err(Error::Invalid(_))));
        }
    }
}
