//! Progress that is told in parts.

/// A whole in so many parts, nothing of it lost to rounding.
#[derive(Clone, Copy, Debug)]
pub struct Shares {
    whole: u64,
    parts: u64,
    given: u64,
}

impl Shares {
    /// So many parts of `whole`.
    pub fn new(whole: u64, parts: u64) -> Self {
        Self { whole, parts, given: 0 }
    }

    /// The next part; nothing after the last.
    pub fn take(&mut self) -> u64 {
        let until = |n: u64| {
            let share =
                u128::from(self.whole) * u128::from(n.min(self.parts)) / u128::from(self.parts.max(1));
            share as u64
        };
        let now = until(self.given.saturating_add(1)) - until(self.given);
        self.given = self.given.saturating_add(1);
        now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_add_up_to_the_whole() {
        for (whole, parts) in [(0, 3), (7, 3), (u64::MAX, 7), (5, 100), (9, 1)] {
            let mut shares = Shares::new(whole, parts);
            let sum: u64 = (0..parts).map(|_| shares.take()).sum();
            assert_eq!((sum, shares.take()), (whole, 0));
        }
        assert_eq!(Shares::new(5, 0).take(), 0);
    }
}
