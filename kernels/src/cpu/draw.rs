//! A token drawn by its probability, in integers: the same one on every processor and every GPU.
//!
//! ```text
//! weight   floor(2^40 e^((logit - largest) / temperature))
//! kept     of the top_k likeliest tokens the fewest whose weights sum to the share top_p, rounded down to 32 bits, of theirs
//! drawn    the first of them at which the running sum of weights passes floor(random / 2^64 * total)
//! ```

use std::cmp::Ordering;

use super::exp;

/// Which tokens may be drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Logits are divided by it: above 0.
    pub temperature: f32,
    /// Only the so many likeliest tokens; 0 for all.
    pub top_k: usize,
    /// Only the fewest likeliest tokens that have this share of the probability together: above 0, at most 1.
    pub top_p: f32,
}

impl Limits {
    /// Whether they are in range.
    #[must_use]
    pub fn valid(&self) -> bool {
        self.temperature > 0.0 && self.temperature.is_finite() && self.top_p > 0.0 && self.top_p <= 1.0
    }
}

/// The token that a number `random` out of all of 64 bits draws. Likelier tokens come first, of equals the lower id, so that limits
/// leave the same ones everywhere; NaNs come last and have no weight. 0 where all logits are NaNs, or where there are none.
///
/// The scalar reference of [`crate::gpu::sampling::draw`].
#[must_use]
pub fn draw(logits: &[f32], limits: Limits, random: u64) -> u32 {
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let logit = |i: u32| logits[i as usize];
    let likelier = |a: &u32, b: &u32| match (logit(*a).is_nan(), logit(*b).is_nan()) {
        (false, false) => logit(*b).total_cmp(&logit(*a)).then(a.cmp(b)),
        (true, true) => a.cmp(b),
        (a, _) => {
            if a {
                Ordering::Greater
            } else {
                Ordering::Less
            }
        }
    };
    if limits.top_k != 0 && limits.top_k < order.len() {
        order.select_nth_unstable_by(limits.top_k, likelier);
        order.truncate(limits.top_k);
    }
    order.sort_unstable_by(likelier);
    let Some(best) = order.first().map(|&i| logit(i)).filter(|best| !best.is_nan()) else { return 0 };
    let weights: Vec<u64> = order.iter().map(|&i| weight(logit(i), best, limits.temperature)).collect();
    let mut total: u128 = weights.iter().map(|&w| u128::from(w)).sum();
    if limits.top_p < 1.0 {
        let share = (f64::from(limits.top_p) * 2f64.powi(32)) as u128;
        let reached = ((total * share) >> 32).max(1);
        total = passes(&weights, reached - 1).1;
    }
    let target = (u128::from(random) * total) >> 64;
    order[passes(&weights, target).0]
}

fn weight(logit: f32, best: f32, temperature: f32) -> u64 {
    const ONE: f32 = (1u64 << 40) as f32;
    if logit.is_nan() {
        0
    } else if logit == best {
        // Infinities have no difference.
        1 << 40
    } else {
        (exp((logit - best) / temperature) * ONE) as u64
    }
}

/// Where a running sum passes a target, and the sum up to there.
fn passes(weights: &[u64], target: u128) -> (usize, u128) {
    let mut sum = 0;
    for (i, weight) in weights.iter().enumerate() {
        sum += u128::from(*weight);
        if sum > target {
            return (i, sum);
        }
    }
    (weights.len() - 1, sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often each of 4,000 evenly spread numbers draws a token.
    fn counts(limits: Limits, logits: &[f32]) -> Vec<usize> {
        let mut counts = vec![0; logits.len()];
        (0..4000).for_each(|i| counts[draw(logits, limits, i * (u64::MAX / 4000)) as usize] += 1);
        counts
    }

    #[test]
    fn draws_follow_the_probabilities_and_the_limits() {
        let logits = [0.0, 2.0f32.ln(), f32::NEG_INFINITY, 5.0f32.ln()];
        let all = Limits { temperature: 1.0, top_k: 0, top_p: 1.0 };
        for (count, expected) in counts(all, &logits).iter().zip([500usize, 1000, 0, 2500]) {
            assert!(count.abs_diff(expected) <= 1, "{count} {expected}");
        }
        assert_eq!(counts(Limits { top_k: 1, ..all }, &logits), [0, 0, 0, 4000]);
        assert_eq!(counts(Limits { top_k: 2, ..all }, &logits)[0], 0);
        let nucleus = counts(Limits { top_p: 0.7, ..all }, &logits);
        assert!(nucleus[0] == 0 && nucleus[1] > 0, "{nucleus:?}");
        assert_eq!(counts(Limits { top_p: 0.6, ..all }, &logits), [0, 0, 0, 4000]);
        let cold = counts(Limits { temperature: 0.1, ..all }, &logits);
        assert!(cold[3] > 3990, "{cold:?}");
    }

    #[test]
    fn odd_logits_draw_something() {
        let all = Limits { temperature: 1.0, top_k: 0, top_p: 1.0 };
        assert_eq!(draw(&[], all, 5), 0);
        assert_eq!(draw(&[f32::NAN; 3], all, u64::MAX), 0);
        assert_eq!(draw(&[f32::NEG_INFINITY; 4], all, u64::MAX), 3);
        assert_eq!(draw(&[f32::NAN, f32::INFINITY, 3.0, f32::INFINITY], all, u64::MAX), 3);
        // Of equals the first one is kept.
        assert_eq!(draw(&[1.0, 2.0, 2.0], Limits { top_k: 1, ..all }, u64::MAX), 1);
        assert!(all.valid() && !Limits { top_p: 0.0, ..all }.valid());
        assert!(
            !Limits { temperature: f32::NAN, ..all }.valid() && !Limits { temperature: 0.0, ..all }.valid()
        );
    }
}
