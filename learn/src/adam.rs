//! AdamW without decay (Kingma and Ba, 2015; Loshchilov and Hutter, 2019), with a cosine schedule.
//!
//! ```text
//! m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2      x -= rate m' / (sqrt(v') + eps)      ': bias corrected
//! ```

/// Decay of the mean of gradients.
const FIRST: f32 = 0.9;
/// Decay of the mean of their squares.
const SECOND: f32 = 0.95;
/// Far below any gradient that means something: losses are shares of what is to be reached.
const EPS: f32 = 1e-20;

/// Running means of gradients and of their squares.
#[derive(Clone, Debug, Default)]
pub struct Adam {
    /// Of gradients.
    pub first: Vec<f32>,
    /// Of their squares.
    pub second: Vec<f32>,
}

impl Adam {
    /// Of so many variables.
    pub fn new(count: usize) -> Self {
        Self { first: vec![0.0; count], second: vec![0.0; count] }
    }
}

/// Where in the schedule a step is.
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    /// What every variable's own rate is multiplied by.
    pub share: f32,
    first: f32,
    second: f32,
    steps: u32,
}

impl Rate {
    /// Of step `step` of `steps`, from 0: up over the first twentieth, then down along half a cosine.
    pub fn at(step: u32, steps: u32) -> Self {
        let (at, all) = (f64::from(step), f64::from(steps.max(1)));
        let warm = (all / 20.0).max(1.0);
        let share = if at < warm {
            (at + 1.0) / (warm + 1.0)
        } else {
            0.5 + 0.5 * (std::f64::consts::PI * (at - warm) / (all - warm).max(1.0)).cos()
        };
        let left = |decay: f32| 1.0 / (1.0 - f64::from(decay).powf(at + 1.0)) as f32;
        Self { share: share as f32, first: left(FIRST), second: left(SECOND), steps: steps.max(1) }
    }

    /// So many times as fast.
    #[must_use]
    pub fn times(self, factor: f32) -> Self {
        Self { share: self.share * factor, ..self }
    }

    /// What a variable goes by in a step of the greatest rate, if all steps, which fall along half a cosine, are to come to a half
    /// together.
    pub fn each(&self) -> f32 {
        1.0 / self.steps as f32
    }

    /// Takes a gradient into a variable's means; what is to be subtracted from it, for a rate of 1.
    #[inline(always)]
    pub fn step(&self, first: &mut f32, second: &mut f32, gradient: f32) -> f32 {
        *first += (1.0 - FIRST) * (gradient - *first);
        *second += (1.0 - SECOND) * (gradient * gradient - *second);
        self.share * (*first * self.first) / ((*second * self.second).sqrt() + EPS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parabola_is_descended_and_the_first_step_is_as_long_as_the_rate() {
        let (mut x, mut adam) = (3.0f32, Adam::new(1));
        let rate = Rate::at(0, 200);
        let first = rate.step(&mut adam.first[0], &mut adam.second[0], 1e-9);
        assert!((first / rate.share - 1.0).abs() < 1e-5, "{first}");
        adam = Adam::new(1);
        for step in 0..200 {
            let rate = Rate::at(step, 200);
            x -= 0.1 * rate.step(&mut adam.first[0], &mut adam.second[0], 2.0 * (x - 1.0));
        }
        assert!((x - 1.0).abs() < 1e-2, "{x}");
        assert!(Rate::at(199, 200).share < 0.01 && Rate::at(0, 1).share > 0.0);
        // A variable without a gradient stays.
        assert_eq!(Rate::at(0, 9).step(&mut 0.0, &mut 0.0, 0.0), 0.0);
    }
}
