//! Near-optimal scales and zero points (after NeUQI, 2025): min-max is the wrong grid at 2 and 3 bits, and an integer
//! zero point as well.
//!
//! ```text
//! a start --> codes nearest to the weights --> scale and zero by weighted least squares --> codes ... --> the best kept
//! 12 of them, between 20 and 100 % of the range
//! ```
//!
//! For given codes q the least sum of h (w - s q - o)^2 has s and o in closed form, and for given s and o the nearest codes
//! are best: a step never makes it worse.

use crate::line::{Line, round};
use crate::rounding::Rounding;
use crate::{Spec, ZeroPoint};

/// Starts.
const STARTS: u8 = 12;
/// Steps from each at most.
const STEPS: usize = 12;
/// Steps after rounding.
const FINAL_STEPS: usize = 3;
/// The narrowest start's share of the range.
const NARROWEST: f32 = 0.2;
/// Weights whose sums are taken in single precision before they are added in double.
const RUN: usize = 512;
/// Sums side by side.
const LANES: usize = 8;

/// The grid from the least to the greatest weight.
pub(crate) fn min_max(w: &[f32], spec: Spec) -> Line {
    let (lo, hi) = range(w);
    let top = f32::from(spec.top());
    match spec.zero {
        ZeroPoint::Real if lo == hi => Line::real(1.0, lo),
        ZeroPoint::Real => Line::real(over(lo, hi, top), lo),
        ZeroPoint::Integer => {
            let (lo, hi) = (lo.min(0.0), hi.max(0.0));
            if lo == hi {
                return Line::on_code(1.0, 0);
            }
            let scale = over(lo, hi, top);
            Line::on_code(scale, round(-lo / scale, top) as u8)
        }
        ZeroPoint::Symmetric => {
            let centre = spec.abq.centre();
            let most = lo.abs().max(hi.abs());
            // Codes of an unbalanced grid reach from -centre to centre - 1: half a step is cut off on either side.
            let half = top / 2.0;
            Line::on_code(if most == 0.0 { 1.0 } else { most / half }, centre)
        }
    }
}

/// A step of `top` steps; the range may be wider than single precision says.
fn over(lo: f32, hi: f32, top: f32) -> f32 {
    ((f64::from(hi) - f64::from(lo)) / f64::from(top)) as f32
}

fn range(w: &[f32]) -> (f32, f32) {
    w.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(lo, hi), &w| (lo.min(w), hi.max(w)))
}

/// The best line that the search finds for a group, before rounding, and the min-max one.
pub(crate) fn group(w: &[f32], h: &[f32], spec: Spec) -> [Line; 2] {
    let widest = min_max(w, spec);
    let (lo, hi) = range(w);
    if lo == hi || !widest.is_sound() {
        return [widest; 2];
    }
    let ones = vec![1.0; w.len()];
    let g = Group::new(w, if h.iter().any(|h| *h > 0.0) { h } else { &ones }, spec);
    let mut best = Best { line: widest, error: g.sums(widest).error };
    let shares = (0..STARTS).map(|i| NARROWEST + (1.0 - NARROWEST) * f32::from(i) / f32::from(STARTS - 1));
    if spec.zero != ZeroPoint::Symmetric {
        let mean = g.mean();
        let mut real = Best { line: Line::real(over(lo, hi, g.top), lo), error: f64::INFINITY };
        for share in shares.clone() {
            let start = Line::real(share * over(lo, hi, g.top), mean + share * (lo - mean));
            g.alternate(start, None, &mut real);
        }
        if spec.zero == ZeroPoint::Real {
            return [if real.error < best.error { real.line } else { widest }, widest];
        }
        best.zeros_near(&g, real.line);
        for zero in zeros(&g, real.line) {
            for share in shares.clone() {
                g.alternate(Line::on_code(share * reach(lo, hi, zero, g.top), zero), Some(zero), &mut best);
            }
        }
        return [best.line, widest];
    }
    let centre = spec.abq.centre();
    for share in shares {
        for (lo, hi, sign) in [(lo, hi, 1.0), (-hi, -lo, -1.0)] {
            // A negative scale lets the side with one level more be that of the positive weights.
            let start = Line::on_code(sign * share * reach(lo, hi, centre, g.top), centre);
            g.alternate(start, Some(centre), &mut best);
            if spec.abq.balanced {
                break;
            }
        }
    }
    [best.line, widest]
}

/// A line that is stored so, and its error: the offset, where there is one, is fitted anew to the rounded scale.
pub(crate) fn finish(w: &[f32], h: &[f32], spec: Spec, line: Line, rounding: Rounding) -> (Line, f64) {
    let ones = vec![1.0; w.len()];
    let g = Group::new(w, if h.iter().any(|h| *h > 0.0) { h } else { &ones }, spec);
    let mut best = Best { line, error: f64::INFINITY };
    let mut line = line;
    for _ in 0..FINAL_STEPS {
        let sums = g.sums(line);
        best.take(line, sums.error);
        if spec.zero != ZeroPoint::Real {
            break;
        }
        let next = rounding.of(Line::real(line.scale, g.offset(&sums, f64::from(line.scale)) as f32));
        if next == line || !next.is_sound() {
            break;
        }
        line = next;
    }
    (best.line, best.error)
}

/// The zero points that are tried: all of a short grid, else those around the best real one.
fn zeros(g: &Group<'_>, real: Line) -> std::ops::RangeInclusive<u8> {
    let top = g.top as u8;
    if top <= 4 {
        return 0..=top;
    }
    let near = round(-real.offset / real.scale, g.top) as u8;
    near.saturating_sub(1)..=near.saturating_add(1).min(top)
}

/// The scale with which the codes 0 ..= top reach from `lo` to `hi` around `zero`.
fn reach(lo: f32, hi: f32, zero: u8, top: f32) -> f32 {
    let zero = f32::from(zero);
    let above = if zero < top { hi.max(0.0) / (top - zero) } else { 0.0 };
    let below = if zero > 0.0 { (-lo).max(0.0) / zero } else { 0.0 };
    above.max(below)
}

struct Best {
    line: Line,
    error: f64,
}

impl Best {
    fn take(&mut self, line: Line, error: f64) {
        if error < self.error {
            *self = Self { line, error };
        }
    }

    /// Tries the best real line with its zero moved to the nearest code.
    fn zeros_near(&mut self, g: &Group<'_>, real: Line) {
        let zero = round(-real.offset / real.scale, g.top) as u8;
        g.alternate(Line::on_code(real.scale, zero), Some(zero), self);
    }
}

/// A group's weights with those of their squares.
struct Group<'a> {
    w: &'a [f32],
    h: &'a [f32],
    sum_h: f64,
    sum_hw: f64,
    top: f32,
    /// Codes are counted from here, so that little is lost in their sums.
    middle: f32,
}

/// Sums over a group, of codes counted from the middle.
struct Sums {
    hq: f64,
    hqq: f64,
    hqw: f64,
    error: f64,
}

impl<'a> Group<'a> {
    fn new(w: &'a [f32], h: &'a [f32], spec: Spec) -> Self {
        let sum_h = h.iter().map(|&h| f64::from(h)).sum();
        let sum_hw = w.iter().zip(h).map(|(&w, &h)| f64::from(w) * f64::from(h)).sum();
        let top = f32::from(spec.top());
        Self { w, h, sum_h, sum_hw, top, middle: (top / 2.0).floor() }
    }

    fn mean(&self) -> f32 {
        (self.sum_hw / self.sum_h) as f32
    }

    /// What the nearest codes of a line add up to.
    fn sums(&self, line: Line) -> Sums {
        let mut total = [0.0f64; 4];
        for (w, h) in self.w.chunks(RUN).zip(self.h.chunks(RUN)) {
            let mut lanes = [[0.0f32; LANES]; 4];
            let (w8, h8) = (w.chunks_exact(LANES), h.chunks_exact(LANES));
            let rest = w8.remainder().iter().zip(h8.remainder());
            for (w, h) in w8.zip(h8) {
                for i in 0..LANES {
                    let terms = self.terms(line, w[i], h[i]);
                    for (lanes, term) in lanes.iter_mut().zip(terms) {
                        lanes[i] += term;
                    }
                }
            }
            for (i, (&w, &h)) in rest.enumerate() {
                for (lanes, term) in lanes.iter_mut().zip(self.terms(line, w, h)) {
                    lanes[i] += term;
                }
            }
            for (total, lanes) in total.iter_mut().zip(lanes) {
                *total += lanes.iter().map(|&x| f64::from(x)).sum::<f64>();
            }
        }
        let [hq, hqq, hqw, steps] = total;
        Sums { hq, hqq, hqw, error: steps * f64::from(line.scale).powi(2) }
    }

    /// h q, h q^2, h q w and h times the square of the difference in steps.
    #[inline(always)]
    fn terms(&self, line: Line, w: f32, h: f32) -> [f32; 4] {
        let place = line.place(w);
        let code = round(place, self.top);
        let (q, miss) = (code - self.middle, place - code);
        let hq = h * q;
        [hq, hq * q, hq * w, h * miss * miss]
    }

    /// The best offset for the codes of these sums and a scale.
    fn offset(&self, sums: &Sums, scale: f64) -> f64 {
        (self.sum_hw - scale * sums.hq) / self.sum_h - scale * f64::from(self.middle)
    }

    /// The best line for the codes of these sums, with zero on a code where it is given.
    fn fit(&self, sums: &Sums, zero: Option<u8>) -> Line {
        match zero {
            Some(zero) => {
                let d = f64::from(self.middle) - f64::from(zero);
                let squares = sums.hqq + 2.0 * d * sums.hq + d * d * self.sum_h;
                Line::on_code(((sums.hqw + d * self.sum_hw) / squares) as f32, zero)
            }
            None => {
                let spread = self.sum_h * sums.hqq - sums.hq * sums.hq;
                let scale = (self.sum_h * sums.hqw - sums.hq * self.sum_hw) / spread;
                Line::real(scale as f32, self.offset(sums, scale) as f32)
            }
        }
    }

    /// Codes and fits in turn, from a start on; keeps the best.
    fn alternate(&self, start: Line, zero: Option<u8>, best: &mut Best) {
        let mut line = start;
        for _ in 0..STEPS {
            if !line.is_sound() {
                return;
            }
            let sums = self.sums(line);
            best.take(line, sums.error);
            let next = self.fit(&sums, zero);
            if next == line {
                return;
            }
            line = next;
        }
    }
}
