//! An axis with round ends and ticks.

/// Ticks that are aimed at.
const TICKS: f64 = 5.0;

/// From `low` to `high`, which are multiples of `step`: 1, 2 or 5 times a power of ten.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Axis {
    pub(crate) low: f64,
    pub(crate) high: f64,
    step: f64,
}

impl Axis {
    /// Around all values that are finite. With `zero`, from 0 on unless they crowd far from it.
    pub(crate) fn around(values: impl Iterator<Item = f64>, zero: bool) -> Self {
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for value in values.filter(|v| v.abs() < 1e300) {
            (low, high) = (low.min(value), high.max(value));
        }
        if low > high {
            (low, high) = (0.0, 1.0);
        }
        if zero && low >= 0.0 && low <= 0.5 * high {
            low = 0.0;
        } else if zero && low > 0.0 {
            // The lowest bar is still to be seen.
            low -= 0.1 * (high - low);
        }
        if high - low <= 1e-12 * high.abs().max(low.abs()) {
            let around = if high == 0.0 { 1.0 } else { 0.1 * high.abs() };
            (low, high) = (low - around, high + around);
        }
        let step = round_step((high - low) / TICKS);
        Self { low: (low / step).floor() * step, high: (high / step).ceil() * step, step }
    }

    /// Its ticks, from end to end.
    pub(crate) fn ticks(&self) -> Vec<f64> {
        let first = (self.low / self.step).round();
        let count = ((self.high - self.low) / self.step).round().clamp(1.0, 100.0) as usize;
        (0..=count).map(|i| (first + i as f64) * self.step).collect()
    }

    /// A tick in as many digits as the steps need.
    pub(crate) fn label(&self, value: f64) -> String {
        let largest = self.low.abs().max(self.high.abs());
        if largest >= 1e6 || self.step < 1e-5 {
            // As many digits as tell neighbours apart.
            let digits = (largest.log10().floor() - self.step.log10().floor()).clamp(0.0, 15.0) as usize;
            return format!("{value:.digits$e}");
        }
        let digits = (-self.step.log10().floor()).max(0.0) as usize;
        let text = format!("{value:.digits$}");
        // No minus before a zero.
        if text.trim_start_matches('-').chars().all(|c| c == '0' || c == '.') {
            text.trim_start_matches('-').to_owned()
        } else {
            text
        }
    }
}

/// The least of 1, 2, 5, 10 times a power of ten that is not below.
fn round_step(least: f64) -> f64 {
    let power = 10f64.powf(least.log10().floor());
    let digit = [1.0, 2.0, 5.0].into_iter().find(|d| d * power >= least * (1.0 - 1e-9));
    digit.unwrap_or(10.0) * power
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_hold_all_values() {
        let labels = |values: &[f64], zero| {
            let axis = Axis::around(values.iter().copied(), zero);
            let labels: Vec<String> = axis.ticks().iter().map(|t| axis.label(*t)).collect();
            for value in values.iter().filter(|v| v.is_finite()) {
                assert!((axis.low..=axis.high).contains(value), "{values:?}: {axis:?}");
            }
            labels.join(" ")
        };
        assert_eq!(labels(&[0.921, 0.934, 0.979], true), "0.90 0.92 0.94 0.96 0.98");
        assert_eq!(labels(&[0.0021, 0.7369], true), "0.0 0.2 0.4 0.6 0.8");
        assert_eq!(labels(&[1.0], true), "0.90 0.95 1.00 1.05 1.10");
        assert_eq!(labels(&[1.0, 16.0], true), "0 5 10 15 20");
        assert_eq!(labels(&[-0.3, 0.4], false), "-0.4 -0.2 0.0 0.2 0.4");
        assert_eq!(labels(&[f64::NAN, f64::INFINITY], true), "0.0 0.2 0.4 0.6 0.8 1.0");
        assert_eq!(labels(&[0.0], true), "-1.0 -0.5 0.0 0.5 1.0");
        assert_eq!(labels(&[], false), "0.0 0.2 0.4 0.6 0.8 1.0");
        assert!(
            labels(&[1e12, 3e12], true).starts_with("0e0 ") || labels(&[1e12, 3e12], true).contains("e12")
        );
        assert!(labels(&[1e-9, 3e-9], true).contains("e-9"));
    }
}
