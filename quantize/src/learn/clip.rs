//! A matrix of which the ends of its grids are learned, and, if wanted, which way each weight is rounded.
//!
//! ```text
//! weight w held      grid from lo to hi learned: scale = (hi - lo) / top      code q = nearest to (w - lo) / scale + v
//!
//! a loss's derivative g by the weight:  hi gets g (q - p) / top within the grid, p the place; g q / top beyond its ends
//!                                       lo the rest of it; v, of -1/2 to 1/2, goes by a step against the sign of g
//! ```
//!
//! (Learnable weight clipping of OmniQuant, Shao et al., 2023, section 3.2, and of ABQ-LLM, which start from the least and the
//! greatest weight; here the start is the searched grid. SignRound, Cheng et al., 2023, section 3: steps of signs, whose
//! sizes fall so that they come to half a step of the grid together.)

use llmpress_formats::Result;
use llmpress_formats::encoding::abq::Packed;
use llmpress_learn::{Adam, Rate, Variable};
use rayon::prelude::*;

use super::OnGrid;
use crate::latent::Latent;
use crate::line::{Line, round};
use crate::rounding::Rounding;
use crate::{Grid, Spec, ZeroPoint};

/// How fast ends move, as a share of their grid's range.
const ENDS: f32 = 0.002;
/// How far a scale may go, as a share of its start.
const SCALES: std::ops::RangeInclusive<f32> = 0.1..=4.0;
/// What roundings may move a place by.
const HALF: f32 = 0.5;

/// A matrix whose grids are learned.
pub(crate) struct Clipped {
    spec: Spec,
    rounding: Rounding,
    cols: usize,
    /// Before they are rounded, as they were given.
    held: Vec<f32>,
    shift: Vec<f32>,
    /// What rounding moves places by; empty where it is not learned.
    by_rounding: Vec<f32>,
    rows: Vec<Row>,
    weights: Vec<f32>,
}

struct Row {
    groups: Vec<Group>,
    /// Of upper ends, then of lower ends.
    adam: Adam,
}

#[derive(Clone, Copy)]
struct Group {
    /// The ends, before they are rounded to what is stored: values of the greatest code and of code 0.
    high: f32,
    low: f32,
    /// The scale at the start.
    start: f32,
    line: Line,
}

impl Clipped {
    /// From the places where error feedback left a matrix: its codes are the start's.
    pub(crate) fn new(start: &Latent, rounds: bool) -> Self {
        let (spec, rounding, cols) = start.layout();
        let held = start.unrounded();
        let top = f32::from(spec.top());
        let group = |line: &Line| {
            let (high, low) = (line.value(top), line.value(0.0));
            Group { high, low, start: line.scale, line: *line }
        };
        let rows: Vec<Row> = start
            .lines()
            .map(|lines| {
                let groups: Vec<Group> = lines.iter().map(group).collect();
                Row { adam: Adam::new(2 * groups.len()), groups }
            })
            .collect();
        let by_rounding = if rounds { vec![0.0; held.len()] } else { Vec::new() };
        let weights = vec![0.0; held.len()];
        let mut clipped = Self { spec, rounding, cols, held, shift: Vec::new(), by_rounding, rows, weights };
        clipped.weigh();
        clipped
    }

    /// Where a weight lies on its grid, with what moves it.
    #[inline(always)]
    fn place(&self, at: usize, line: &Line) -> f32 {
        let shift = self.shift.get(at).copied().unwrap_or(0.0);
        let by = self.by_rounding.get(at).copied().unwrap_or(0.0);
        line.place(self.held[at] + shift) + by
    }

    /// Places of a group of a row, one after the other.
    fn places<'a>(&'a self, row: usize, group: usize, line: &'a Line) -> impl Iterator<Item = f32> + 'a {
        let step = self.spec.abq.group_columns(self.cols);
        let columns = group * step..(group * step + step).min(self.cols);
        columns.map(move |column| self.place(row * self.cols + column, line))
    }

    fn weigh(&mut self) {
        let mut weights = std::mem::take(&mut self.weights);
        let (step, top) = (self.spec.abq.group_columns(self.cols), f32::from(self.spec.top()));
        weights.par_chunks_exact_mut(self.cols).enumerate().for_each(|(at, weights)| {
            for (group_at, weights) in weights.chunks_mut(step).enumerate() {
                let line = &self.rows[at].groups[group_at].line;
                let places = self.places(at, group_at, line);
                weights.iter_mut().zip(places).for_each(|(w, place)| *w = line.value(round(place, top)));
            }
        });
        self.weights = weights;
    }
}

/// What the ends of a grid get of the derivatives of its weights. Beyond an end a weight is that end.
fn by_ends(places: impl Iterator<Item = f32>, gradient: &[f32], top: f32) -> (f32, f32) {
    places.zip(gradient).fold((0.0, 0.0), |(high, low), (place, g)| {
        let code = round(place, top);
        let inside = place >= -HALF && place <= top + HALF;
        // w = lo + scale q; within, q follows the place.
        let by_scale = if inside { code - place } else { code };
        let by_low = if inside { 0.0 } else { 1.0 };
        let share = g * by_scale / top.max(1.0);
        (high + share, low + g * by_low - share)
    })
}

impl Variable for Clipped {
    fn weights(&self) -> &[f32] {
        &self.weights
    }

    fn step(&mut self, gradient: &[f32], rate: &Rate) {
        let (cols, step) = (self.cols, self.spec.abq.group_columns(self.cols));
        let (top, rounding, zero) = (f32::from(self.spec.top()), self.rounding, self.spec.zero);
        let mut rows = std::mem::take(&mut self.rows);
        rows.par_iter_mut().zip(gradient.par_chunks_exact(cols)).enumerate().for_each(
            |(row_at, (row, gradient))| {
                let count = row.groups.len();
                for (at, (group, gradient)) in row.groups.iter_mut().zip(gradient.chunks(step)).enumerate() {
                    let (by_high, by_low) = by_ends(self.places(row_at, at, &group.line), gradient, top);
                    let range = (group.start * top.max(1.0)).abs();
                    let mut down = |at: usize, g: f32| {
                        ENDS * range * rate.step(&mut row.adam.first[at], &mut row.adam.second[at], g)
                    };
                    let (high, low, line) = match zero {
                        ZeroPoint::Real => {
                            let (high, low) =
                                (group.high - down(at, by_high), group.low - down(count + at, by_low));
                            (high, low, Line::real((high - low) / top.max(1.0), low))
                        }
                        // Both ends move away from zero together.
                        ZeroPoint::Integer | ZeroPoint::Symmetric => {
                            let along = group.high / range * by_high + group.low / range * by_low;
                            let by = down(at, along) / range;
                            let (high, low) = (group.high * (1.0 - by), group.low * (1.0 - by));
                            let scale = (high - low) / top.max(1.0);
                            (high, low, Line::on_code(scale, group.line.zero as u8))
                        }
                    };
                    let line = rounding.of(line);
                    if line.is_sound() && SCALES.contains(&(line.scale / group.start)) {
                        (group.high, group.low, group.line) = (high, low, line);
                    }
                }
            },
        );
        self.rows = rows;
        let groups = |at: usize| at / step;
        let by = rate.share * rate.each();
        let rows = &self.rows;
        self.by_rounding
            .par_chunks_exact_mut(cols)
            .zip(gradient.par_chunks_exact(cols))
            .enumerate()
            .for_each(|(row, (all, gradient))| {
                for (column, (v, g)) in all.iter_mut().zip(gradient).enumerate() {
                    let g = g * rows[row].groups[groups(column)].line.scale;
                    if g != 0.0 {
                        *v = (*v - by * g.signum()).clamp(-HALF, HALF);
                    }
                }
            });
        self.weigh();
    }
}

impl OnGrid for Clipped {
    fn unrounded(&self) -> Vec<f32> {
        self.held.clone()
    }

    fn shift(&mut self, by: Vec<f32>) {
        self.shift = by;
        self.weigh();
    }

    fn pass(&self, gradient: &mut [f32]) {
        let (step, top) = (self.spec.abq.group_columns(self.cols), f32::from(self.spec.top()));
        gradient.par_chunks_exact_mut(self.cols).enumerate().for_each(|(row, gradient)| {
            for (at, gradient) in gradient.chunks_mut(step).enumerate() {
                let line = &self.rows[row].groups[at].line;
                for (g, place) in gradient.iter_mut().zip(self.places(row, at, line)) {
                    if place < -HALF || place > top + HALF {
                        *g = 0.0;
                    }
                }
            }
        });
    }

    fn finish(self: Box<Self>) -> Result<(Packed<'static>, Vec<f32>)> {
        let top = f32::from(self.spec.top());
        let mut codes = Vec::with_capacity(self.weights.len());
        for (row, groups) in self.rows.iter().enumerate() {
            for (at, group) in groups.groups.iter().enumerate() {
                codes.extend(self.places(row, at, &group.line).map(|place| round(place, top) as u8));
            }
        }
        let lines = self.rows.iter().flat_map(|row| row.groups.iter().map(|group| group.line)).collect();
        let grid = Grid::of_lines(self.spec, self.rows.len(), self.cols, lines, self.rounding);
        Ok((grid.pack(&codes)?, self.weights))
    }
}

#[cfg(test)]
mod tests {
    use llmpress_formats::encoding::abq::Abq;

    use super::*;
    use crate::Rung;

    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..count).map(|_| next() + next()).collect()
    }

    fn spec(bits: u8, zero: ZeroPoint, balanced: bool) -> Spec {
        let abq = Abq { group_size: Some(32), balanced, ..Abq::new(bits) };
        Spec { abq, zero, rung: Rung::Gptq, learn: None }
    }

    /// Of codes that are not all the nearest ones, as feedback chooses some.
    fn start(spec: Spec, weights: &[f32], cols: usize) -> (Packed<'static>, Latent) {
        let grid = Grid::search(weights, cols, spec, None).unwrap();
        let nearest = grid.nearest(weights);
        let codes: Vec<u8> = nearest
            .iter()
            .enumerate()
            .map(|(i, c)| if i % 5 == 0 { (c + 1).min(spec.top()) } else { *c })
            .collect();
        let unit = grid.pack(&codes).unwrap();
        let latent = Latent::new(&unit, spec, weights);
        (unit, latent)
    }

    const ALL: [(u8, ZeroPoint, bool); 5] = [
        (3, ZeroPoint::Real, false),
        (3, ZeroPoint::Integer, false),
        (4, ZeroPoint::Symmetric, false),
        (2, ZeroPoint::Real, true),
        (1, ZeroPoint::Symmetric, true),
    ];

    #[test]
    fn clipping_and_rounding_start_where_error_feedback_ended() {
        let (rows, cols) = (5, 70);
        let weights = numbers(rows * cols, 1);
        for (bits, zero, balanced) in ALL {
            for rounds in [false, true] {
                let (unit, latent) = start(spec(bits, zero, balanced), &weights, cols);
                let clipped = Clipped::new(&latent, rounds);
                assert_eq!(clipped.weights(), latent.weights(), "{bits} {zero:?}");
                let (same, _) = Box::new(clipped).finish().unwrap();
                assert!(same == unit, "{bits} {zero:?}");
            }
        }
    }

    #[test]
    fn derivatives_by_ends_are_those_of_differences_as_if_rounding_were_a_constant() {
        let weights = numbers(200, 2);
        let gradient = numbers(200, 3);
        let top = 7.0;
        let (high, low) = (0.6f32, -0.5f32);
        let line = |high: f32, low: f32| Line::real((high - low) / top, low);
        let at = line(high, low);
        let places: Vec<f32> = weights.iter().map(|w| at.place(*w)).collect();
        let beyond = places.iter().filter(|p| **p < -HALF || **p > top + HALF).count();
        assert!(beyond > 5 && beyond < 100, "{beyond}");
        let (by_high, by_low) = by_ends(places.iter().copied(), &gradient, top);
        let loss = |line: Line| -> f64 {
            let terms = weights.iter().zip(&places).zip(&gradient);
            let sum = terms.map(|((w, was), g)| {
                let code = round(*was, top);
                // Within, what rounding added at the start; beyond, the code itself.
                let inside = *was >= -HALF && *was <= top + HALF;
                let code = if inside { line.place(*w) + (code - was) } else { code };
                f64::from(line.value(code)) * f64::from(*g)
            });
            sum.sum()
        };
        let h = 1.0 / 128.0;
        let found = (loss(line(high + h, low)) - loss(line(high - h, low))) / f64::from(2.0 * h);
        assert!((found - f64::from(by_high)).abs() < 1e-3, "{found} {by_high}");
        let found = (loss(line(high, low + h)) - loss(line(high, low - h))) / f64::from(2.0 * h);
        assert!((found - f64::from(by_low)).abs() < 1e-3, "{found} {by_low}");
    }

    #[test]
    fn ends_and_roundings_move_towards_other_weights_and_stay_on_the_grid() {
        let (rows, cols, steps) = (4, 64, 300);
        let weights = numbers(rows * cols, 4);
        let goal: Vec<f32> =
            weights.iter().zip(numbers(rows * cols, 5)).map(|(w, by)| 0.7 * w + 0.1 * by).collect();
        for (bits, zero, balanced) in ALL {
            let mut errors = Vec::new();
            for rounds in [false, true] {
                let (_, latent) = start(spec(bits, zero, balanced), &weights, cols);
                let mut clipped = Clipped::new(&latent, rounds);
                let far = |w: &[f32]| w.iter().zip(&goal).map(|(w, g)| f64::from(w - g).powi(2)).sum::<f64>();
                let before = far(clipped.weights());
                for step in 0..steps {
                    let gradient: Vec<f32> =
                        clipped.weights().iter().zip(&goal).map(|(w, g)| w - g).collect();
                    clipped.step(&gradient, &Rate::at(step, steps));
                }
                let after = far(clipped.weights());
                assert!(after < before, "{bits} {zero:?} {rounds}: {before} {after}");
                errors.push(after);
                let held: Vec<f32> = clipped.weights().to_vec();
                let (unit, values) = Box::new(clipped).finish().unwrap();
                assert_eq!(values, held);
                let mut row = vec![0.0; cols];
                for (at, values) in values.chunks_exact(cols).enumerate() {
                    unit.decode_row(at, &mut row).unwrap();
                    assert_eq!(row, values, "{bits} {zero:?}");
                }
            }
            // Roundings are more freedom; with three values to a grid ends do it all.
            assert!(bits == 1 || errors[1] < errors[0], "{bits} {zero:?}: {errors:?}");
        }
    }

    #[test]
    fn weights_that_are_shifted_move_and_pass_derivatives_within_their_grid_alone() {
        let (rows, cols) = (3, 40);
        let weights = numbers(rows * cols, 6);
        for (bits, zero, balanced) in ALL {
            let (_, latent) = start(spec(bits, zero, balanced), &weights, cols);
            let clipped = Clipped::new(&latent, true);
            for mut matrix in [Box::new(latent) as Box<dyn OnGrid>, Box::new(clipped)] {
                let before = matrix.weights().to_vec();
                matrix.shift(vec![0.0; rows * cols]);
                assert_eq!(matrix.weights(), before);
                let mut far = vec![0.0; rows * cols];
                far[0] = 1e3;
                far[1] = -1e3;
                matrix.shift(far);
                let mut gradient = vec![1.0; rows * cols];
                matrix.pass(&mut gradient);
                assert!(gradient[0] == 0.0 && gradient[1] == 0.0 && gradient.iter().sum::<f32>() > 100.0);
                let now = matrix.weights();
                let (high, low) = if now[0] > now[1] { (now[0], now[1]) } else { (now[1], now[0]) };
                assert!(before[..32].iter().all(|w| *w <= high && *w >= low), "{bits} {zero:?}");
                assert_eq!(matrix.weights()[2..], before[2..]);
            }
        }
    }
}
