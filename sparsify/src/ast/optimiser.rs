//! AdamW with the decay of dropped weights inside of its update.
//!
//! ```text
//! m = b1 m + (1 - b1) g      u = m + lambda (1 - M) W      v = b2 v + (1 - b2) u^2
//! W -= rate (u / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
//! lambda(t) = lambda t / T0 up to T0, then lambda        rate: up over the warm-up, then half a cosine down to its floor
//! ```
//!
//! (Section 3.1 of the paper. Its published optimiser for GPT-2 inverts an integer mask, and lets dropped weights grow: this is the
//! equation.) Since v takes up the square of u, which is a mean already, a step is longer than Adam's: up to the rate itself.

use super::Ast;

/// Decay of the mean of gradients.
pub(super) const FIRST: f32 = 0.9;
/// Decay of the mean of the squares of updates.
pub(super) const SECOND: f32 = 0.95;
/// Far below any update that means something.
const EPS: f32 = 1e-10;
/// Share of steps over which the rate comes up.
const WARM: f64 = 0.03;
/// The last rate, of the greatest.
const FLOOR: f64 = 0.1;

/// What all variables of a step have in common.
#[derive(Clone, Copy, Debug)]
pub(super) struct Update {
    /// By which gradients are multiplied first: 1, or what clips them.
    pub(super) clip: f32,
    pub(super) rate: f32,
    /// Of weights that are dropped.
    pub(super) lambda: f32,
    first: f32,
    second: f32,
}

impl Update {
    /// Of step `step`, from 0; `decay` is the greatest lambda.
    pub(super) fn at(step: u32, settings: &Ast, decay: f32, clip: f32) -> Self {
        let left = |decay: f32| 1.0 / (1.0 - f64::from(decay).powf(f64::from(step) + 1.0)) as f32;
        Self {
            clip,
            rate: rate(step, settings.steps, settings.rate),
            lambda: lambda(step, settings, decay),
            first: left(FIRST),
            second: left(SECOND),
        }
    }

    /// The same without decay: of sums and norms.
    pub(super) fn plain(self) -> Self {
        Self { lambda: 0.0, ..self }
    }

    /// So many times as fast.
    pub(super) fn times(self, factor: f32) -> Self {
        Self { rate: self.rate * factor, ..self }
    }

    /// Takes a gradient up and gives the weight after it; `decays` is 1 where it is dropped, else 0.
    #[inline(always)]
    pub(super) fn step(&self, w: f32, first: &mut f32, second: &mut f32, gradient: f32, decays: f32) -> f32 {
        let g = self.clip * gradient;
        *first += (1.0 - FIRST) * (g - *first);
        let u = *first + self.lambda * decays * w;
        *second += (1.0 - SECOND) * (u * u - *second);
        w - self.rate * (u * self.first) / ((*second * self.second).sqrt() + EPS)
    }
}

/// Up over the warm-up, then half a cosine down to a tenth.
fn rate(step: u32, steps: u32, greatest: f32) -> f32 {
    let (at, all) = (f64::from(step), f64::from(steps.max(1)));
    let warm = (WARM * all).max(1.0);
    let share = if at < warm {
        (at + 1.0) / (warm + 1.0)
    } else {
        let done = (at - warm) / (all - warm).max(1.0);
        FLOOR + (1.0 - FLOOR) * (0.5 + 0.5 * (std::f64::consts::PI * done).cos())
    };
    (f64::from(greatest) * share) as f32
}

/// The decay of a step: it grows up to its share of steps, or is there from the start.
fn lambda(step: u32, settings: &Ast, greatest: f32) -> f32 {
    let until = f64::from(settings.anneal) * f64::from(settings.steps);
    let share = if until > 0.0 { (f64::from(step) / until).min(1.0) } else { 1.0 };
    (f64::from(greatest) * share) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two steps by hand: a kept weight of 1 and a dropped one of 0.5, gradients 0.2 and -0.1, rate 0.01, lambda 0.04.
    #[test]
    fn the_decay_of_dropped_weights_is_inside_of_the_update_and_outside_of_the_first_moment() {
        let of = |t: i32| Update {
            clip: 1.0,
            rate: 0.01,
            lambda: 0.04,
            first: 1.0 / (1.0 - 0.9f32.powi(t)),
            second: 1.0 / (1.0 - 0.95f32.powi(t)),
        };
        let close = |a: f32, b: f64| assert!((f64::from(a) - b).abs() < 1e-6, "{a} {b}");
        // Kept: m = 0.02, u = 0.02, v = 0.05 x 0.0004 = 0.00002. Step: 0.01 (0.2) / sqrt(0.0004) = 0.1.
        let (mut m, mut v) = (0.0, 0.0);
        let w = of(1).step(1.0, &mut m, &mut v, 0.2, 0.0);
        close(m, 0.02);
        close(v, 0.000_02);
        close(w, 0.9);
        // Again with -0.1: m = 0.018 - 0.01 = 0.008, u = m, v = 0.95 x 0.00002 + 0.05 x 0.000064 = 0.0000222.
        // u / 0.19 = 0.0421053, v / 0.0975 = 0.000227692, its root 0.0150895: step 0.0279038.
        let w = of(2).step(w, &mut m, &mut v, -0.1, 0.0);
        close(m, 0.008);
        close(v, 0.000_022_2);
        close(w, 0.872_096_2);
        // Dropped: m = 0.02 as well, u = 0.02 + 0.04 x 0.5 = 0.04, v = 0.05 x 0.0016. Step: 0.01 (0.4) / sqrt(0.0016) = 0.1.
        let (mut m, mut v) = (0.0, 0.0);
        let w = of(1).step(0.5, &mut m, &mut v, 0.2, 1.0);
        close(m, 0.02);
        close(v, 0.000_08);
        close(w, 0.4);
        // m = 0.008, u = 0.008 + 0.04 x 0.4 = 0.024, v = 0.000076 + 0.05 x 0.000576 = 0.0001048.
        // u / 0.19 = 0.1263158, v / 0.0975 = 0.00107487, its root 0.0327852: step 0.0385283.
        let w = of(2).step(w, &mut m, &mut v, -0.1, 1.0);
        close(m, 0.008);
        close(v, 0.000_104_8);
        close(w, 0.361_471_7);
        // Without a gradient a dropped weight goes towards zero, and a kept one stays.
        let (mut m, mut v) = (0.0, 0.0);
        assert!(of(1).step(-0.5, &mut m, &mut v, 0.0, 1.0) > -0.5 && m == 0.0);
        assert!(of(1).step(-0.5, &mut 0.0, &mut 0.0, 0.0, 0.0) == -0.5);
    }

    #[test]
    fn decay_grows_to_its_share_of_steps_and_rates_come_up_and_go_down_to_a_tenth() {
        let settings = Ast { steps: 1000, anneal: 0.2, rate: 2e-4, ..Ast::default() };
        let lambda = |step, settings: &Ast| lambda(step, settings, 6e-5);
        assert_eq!(lambda(0, &settings), 0.0);
        assert!((lambda(100, &settings) - 3e-5).abs() < 1e-9);
        assert_eq!((lambda(200, &settings), lambda(999, &settings)), (6e-5, 6e-5));
        let fixed = Ast { anneal: 0.0, ..settings };
        assert_eq!((lambda(0, &fixed), lambda(999, &fixed)), (6e-5, 6e-5));
        let rates: Vec<f32> = (0..1000).map(|step| rate(step, 1000, 2e-4)).collect();
        assert!(rates[0] < 1e-5 && rates.iter().all(|rate| *rate > 0.0 && *rate <= 2e-4));
        assert!((rates[30] - 2e-4).abs() < 1e-7 && (rates[999] - 2e-5).abs() < 1e-7);
        assert!(rates[..30].is_sorted() && rates[30..].is_sorted_by(|a, b| a >= b));
        assert!(rate(0, 1, 2e-4) > 0.0);
    }
}
