//! A matrix on its grids as it is learned.
//!
//! ```text
//! place p, in steps of its group's grid      code q = nearest to p      weight = s (q - zero) + o
//!
//! a loss's derivative g by the weight:  p gets g s, as if q were p (straight through)
//!                                       s gets sum g (q - zero), o gets sum g: exact while codes stay
//! ```
//!
//! Places are learned instead of weights: then moving a scale moves no code, and one rate fits all matrices. What products
//! see are the scales and offsets that are stored, so nothing is lost when learning ends.
//! (After "EfficientQAT", Chen et al., 2024, which learns weights, steps and zero points of a block together.)
//!
//! Two other ways to learn less of a matrix: its grids alone, codes as error feedback chose them (learnable clipping, from the
//! searched grid on: the ends of a grid are its scale and offset; were weights held instead, as OmniQuant and ABQ-LLM do, the
//! first steps would undo what error feedback gained); and those with roundings by steps of signs, all of which come to half a
//! step of the grid (SignRound, Cheng et al., 2023, section 3).

use std::io::{Read, Write};

use llmpress_formats::Result;
use llmpress_formats::encoding::abq::{Packed, Zero};
use llmpress_learn::{Adam, Rate, Variable, read_values, write_values};
use rayon::prelude::*;

use crate::line::{Line, round};
use crate::on_grid::OnGrid;
use crate::rounding::Rounding;
use crate::{Grid, LearnedPart, Spec, ZeroPoint};

/// How fast what is learned of a matrix moves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rates {
    /// Places, in steps of the grid.
    pub(crate) places: f32,
    /// Scales and offsets: of the scale at the start.
    pub(crate) lines: f32,
}

/// Those of sub-layers and blocks.
const RATES: Rates = Rates { places: 0.006, lines: 0.001 };

impl Rates {
    /// Those of a whole model, of a matrix of so many columns: what all places of a row do together, moved by signs that go with what they
    /// multiply, grows with the columns. Measured on 256 of them.
    pub(crate) fn of_whole(cols: usize) -> Self {
        Self { places: 0.256 / cols.max(1) as f32, lines: 0.0003 }
    }
}
/// How far a scale may go, as a share of its start.
const SCALES: std::ops::RangeInclusive<f32> = 0.25..=4.0;
/// What a place may lie beyond the last codes.
const BEYOND: f32 = 0.49;
/// What roundings may move a place by.
const HALF: f32 = 0.5;

/// A matrix that is learned.
pub(crate) struct Latent {
    spec: Spec,
    rounding: Rounding,
    cols: usize,
    rows: Vec<Row>,
    /// By how much each weight is moved from its place by what the block learns beside; empty where that is nothing.
    shift: Vec<f32>,
    weights: Vec<f32>,
    part: LearnedPart,
    rates: Rates,
}

/// Codes and grids that a matrix had.
pub(crate) struct Snapshot {
    codes: Vec<u8>,
    /// Scales and offsets as they are stored, one after the other.
    lines: Vec<[f32; 2]>,
}

/// One row of it.
struct Row {
    places: Vec<f32>,
    /// Where places were at the start; empty where they may go anywhere.
    starts: Vec<f32>,
    /// Of places that go anywhere.
    by_place: Adam,
    groups: Vec<Group>,
    /// Of scales, then of offsets.
    by_line: Adam,
}

#[derive(Clone, Copy)]
struct Group {
    /// Before they are rounded to what is stored.
    scale: f32,
    offset: f32,
    /// The scale at the start.
    start: f32,
    line: Line,
}

impl Latent {
    /// From what error feedback found, and the weights that were quantised: a place is where the weight lay, held within the
    /// reach of the code that was chosen for it.
    pub(crate) fn new(unit: &Packed<'_>, spec: Spec, weights: &[f32]) -> Self {
        let (cols, groups) = (unit.cols(), unit.groups());
        let step = spec.abq.group_columns(cols);
        let offsets = match unit.zero() {
            Zero::Real(offsets) => Some(offsets),
            Zero::Integer(_) | Zero::Symmetric => None,
        };
        let line = |at: usize| {
            let scale = unit.scale().get(at);
            match unit.zero() {
                Zero::Real(offsets) => Line::real(scale, offsets.get(at)),
                Zero::Integer(zeros) => Line::on_code(scale, zeros[at]),
                Zero::Symmetric => Line::on_code(scale, spec.abq.centre()),
            }
        };
        let rounding = Rounding {
            scales: unit.scale().dtype(),
            offsets: offsets.map_or(unit.scale().dtype(), |offsets| offsets.dtype()),
        };
        let part = spec.learn.map_or(LearnedPart::Places, |learn| learn.of);
        let row = |(row, weights): (usize, &[f32])| {
            let mut codes = vec![0; cols];
            unit.codes(row, &mut codes);
            let groups: Vec<Group> = (row * groups..(row + 1) * groups)
                .map(|at| {
                    let line = line(at);
                    Group { scale: line.scale, offset: line.offset, start: line.scale.abs(), line }
                })
                .collect();
            let places = weights.iter().zip(&codes).enumerate().map(|(k, (w, code))| {
                let code = f32::from(*code);
                let place = groups[k / step].line.place(*w).clamp(code - BEYOND, code + BEYOND);
                // NaN is no place.
                if place.is_finite() { place } else { code }
            });
            let places: Vec<f32> = places.collect();
            Row {
                by_place: Adam::new(if part == LearnedPart::Places { cols } else { 0 }),
                starts: if part == LearnedPart::Round { places.clone() } else { Vec::new() },
                places,
                by_line: Adam::new(2 * groups.len()),
                groups,
            }
        };
        let rows: Vec<Row> = weights.par_chunks_exact(cols).enumerate().map(row).collect();
        let weights = vec![0.0; weights.len()];
        let mut latent = Self { spec, rounding, cols, rows, shift: Vec::new(), weights, part, rates: RATES };
        latent.weigh();
        latent
    }

    /// With other rates.
    pub(crate) fn with(self, rates: Rates) -> Self {
        Self { rates, ..self }
    }

    /// What is learned, before it is rounded: places, their means, and of each row scales, offsets and the means of both.
    pub(crate) fn write(&self, to: &mut dyn Write) -> std::io::Result<()> {
        for row in &self.rows {
            let lines: Vec<f32> = row.groups.iter().flat_map(|group| [group.scale, group.offset]).collect();
            let means = [&row.by_place.first, &row.by_place.second, &row.by_line.first, &row.by_line.second];
            [&row.places, &lines].into_iter().chain(means).try_for_each(|values| write_values(values, to))?;
        }
        Ok(())
    }

    /// Takes up what [`Self::write`] wrote of the same start.
    pub(crate) fn read(&mut self, from: &mut dyn Read) -> std::io::Result<()> {
        let (rounding, real) = (self.rounding, self.spec.zero == ZeroPoint::Real);
        for row in &mut self.rows {
            let mut lines = vec![0.0; 2 * row.groups.len()];
            let (places, lines_of) = (&mut row.by_place, &mut row.by_line);
            let means = [&mut places.first, &mut places.second, &mut lines_of.first, &mut lines_of.second];
            let all = [&mut row.places, &mut lines].into_iter().chain(means);
            all.into_iter().try_for_each(|values| read_values(values, from))?;
            for (group, line) in row.groups.iter_mut().zip(lines.chunks_exact(2)) {
                (group.scale, group.offset) = (line[0], line[1]);
                group.line = rounding.of(match real {
                    true => Line::real(group.scale, group.offset),
                    false => Line::on_code(group.scale, group.line.zero as u8),
                });
            }
        }
        self.weigh();
        Ok(())
    }

    /// What it would be stored as now.
    pub(crate) fn snapshot(&self) -> Snapshot {
        let lines = self.rows.iter().flat_map(|row| &row.groups);
        Snapshot {
            codes: self.codes(),
            lines: lines.map(|group| [group.line.scale, group.line.offset]).collect(),
        }
    }

    /// Back to the codes and grids of a snapshot: places are held within the reach of their codes, means are forgotten.
    pub(crate) fn go_back(&mut self, snapshot: &Snapshot) {
        let (rounding, real) = (self.rounding, self.spec.zero == ZeroPoint::Real);
        let mut lines = snapshot.lines.iter();
        for (row, codes) in self.rows.iter_mut().zip(snapshot.codes.chunks_exact(self.cols)) {
            for (place, code) in row.places.iter_mut().zip(codes) {
                let code = f32::from(*code);
                *place = place.clamp(code - BEYOND, code + BEYOND);
            }
            for (group, [scale, offset]) in row.groups.iter_mut().zip(&mut lines) {
                (group.scale, group.offset) = (*scale, *offset);
                group.line = rounding.of(match real {
                    true => Line::real(*scale, *offset),
                    false => Line::on_code(*scale, group.line.zero as u8),
                });
            }
            for adam in [&mut row.by_place, &mut row.by_line] {
                adam.first.fill(0.0);
                adam.second.fill(0.0);
            }
        }
        self.weigh();
    }

    /// A snapshot of as much room, to be read into.
    pub(crate) fn room(&self) -> Snapshot {
        let groups = self.rows.iter().map(|row| row.groups.len()).sum();
        Snapshot { codes: vec![0; self.weights.len()], lines: vec![[0.0; 2]; groups] }
    }

    /// What is stored of a snapshot of it.
    pub(crate) fn pack(&self, snapshot: &Snapshot) -> Result<Packed<'static>> {
        let real = self.spec.zero == ZeroPoint::Real;
        let now = self.rows.iter().flat_map(|row| &row.groups);
        let lines = now.zip(&snapshot.lines).map(|(group, [scale, offset])| match real {
            true => Line::real(*scale, *offset),
            false => Line::on_code(*scale, group.line.zero as u8),
        });
        let grid = Grid::of_lines(self.spec, self.rows.len(), self.cols, lines.collect(), self.rounding);
        grid.pack(&snapshot.codes)
    }

    fn codes(&self) -> Vec<u8> {
        let (step, top) = (self.spec.abq.group_columns(self.cols), f32::from(self.spec.top()));
        let mut codes = Vec::with_capacity(self.weights.len());
        for (at, row) in self.rows.iter().enumerate() {
            for (group_at, (places, group)) in row.places.chunks(step).zip(&row.groups).enumerate() {
                let shift = self.shift_of(at, group_at * step..group_at * step + places.len());
                let shift = shift.iter().copied().chain(std::iter::repeat(0.0));
                let shifted = places.iter().zip(shift).map(|(place, by)| place + by / group.line.scale);
                codes.extend(shifted.map(|place| round(place, top) as u8));
            }
        }
        codes
    }

    /// Weights of places and lines.
    fn weigh(&mut self) {
        let (step, top) = (self.spec.abq.group_columns(self.cols), f32::from(self.spec.top()));
        let (cols, shift) = (self.cols, &self.shift);
        let rows = self.weights.par_chunks_exact_mut(cols).zip(&self.rows).enumerate();
        rows.for_each(|(at, (weights, row))| {
            let shift = shift.get(at * cols..(at + 1) * cols).unwrap_or_default();
            let groups = weights.chunks_mut(step).zip(row.places.chunks(step)).zip(&row.groups);
            for (at, ((weights, places), group)) in groups.enumerate() {
                let shift = shift.get(at * step..at * step + places.len()).unwrap_or_default();
                let line = group.line;
                weights.iter_mut().zip(places).for_each(|(w, place)| *w = line.value(round(*place, top)));
                for ((w, place), shift) in weights.iter_mut().zip(places).zip(shift) {
                    *w = line.value(round(place + shift / line.scale, top));
                }
            }
        });
    }

    /// What the block moves the weights of some columns of a row by.
    fn shift_of(&self, row: usize, columns: std::ops::Range<usize>) -> &[f32] {
        let at = row * self.cols;
        self.shift.get(at + columns.start..at + columns.end).unwrap_or_default()
    }
}

impl Snapshot {
    pub(crate) fn write(&self, to: &mut dyn Write) -> std::io::Result<()> {
        to.write_all(&self.codes)?;
        write_values(self.lines.as_flattened(), to)
    }

    pub(crate) fn read(&mut self, from: &mut dyn Read) -> std::io::Result<()> {
        from.read_exact(&mut self.codes)?;
        read_values(self.lines.as_flattened_mut(), from)
    }
}

impl OnGrid for Latent {
    fn unrounded(&self) -> Vec<f32> {
        let step = self.spec.abq.group_columns(self.cols);
        let of_row = |row: &Row| -> Vec<f32> {
            let groups = row.places.chunks(step).zip(&row.groups);
            groups.flat_map(|(places, group)| places.iter().map(|place| group.line.value(*place))).collect()
        };
        self.rows.iter().flat_map(of_row).collect()
    }

    fn shift(&mut self, by: Vec<f32>) {
        self.shift = by;
        self.weigh();
    }

    fn pass(&self, gradient: &mut [f32]) {
        let (step, top) = (self.spec.abq.group_columns(self.cols), f32::from(self.spec.top()));
        let rows = gradient.par_chunks_exact_mut(self.cols).zip(&self.rows).enumerate();
        rows.for_each(|(at, (gradient, row))| {
            let groups = gradient.chunks_mut(step).zip(row.places.chunks(step)).zip(&row.groups);
            for (group_at, ((gradient, places), group)) in groups.enumerate() {
                let shift = self.shift_of(at, group_at * step..group_at * step + places.len());
                for ((g, place), shift) in gradient.iter_mut().zip(places).zip(shift) {
                    let place = place + shift / group.line.scale;
                    if place < -0.5 || place > top + 0.5 {
                        *g = 0.0;
                    }
                }
            }
        });
    }

    fn finish(self: Box<Self>) -> Result<(Packed<'static>, Vec<f32>)> {
        let codes = self.codes();
        let lines = self.rows.iter().flat_map(|row| row.groups.iter().map(|group| group.line)).collect();
        let grid = Grid::of_lines(self.spec, self.rows.len(), self.cols, lines, self.rounding);
        Ok((grid.pack(&codes)?, self.weights))
    }
}

impl Variable for Latent {
    fn weights(&self) -> &[f32] {
        &self.weights
    }

    fn step(&mut self, gradient: &[f32], rate: &Rate) {
        let (step, top) = (self.spec.abq.group_columns(self.cols), f32::from(self.spec.top()));
        let (rounding, real, part) = (self.rounding, self.spec.zero == ZeroPoint::Real, self.part);
        let rates = self.rates;
        let (cols, shift) = (self.cols, &self.shift);
        let rows = self.rows.par_iter_mut().zip(gradient.par_chunks_exact(cols)).enumerate().with_min_len(8);
        rows.for_each(|(row_at, (row, gradient))| {
            let count = row.groups.len();
            for (at, group) in row.groups.iter_mut().enumerate() {
                let columns = at * step..(at * step + step).min(gradient.len());
                let gradient = &gradient[columns.clone()];
                let places = &mut row.places[columns.clone()];
                let line = group.line;
                let moved = row_at * cols + columns.start..row_at * cols + columns.end;
                let shift = shift.get(moved).unwrap_or_default();
                let (by_scale, by_offset) = by_line((places, shift), gradient, line, top);
                match part {
                    LearnedPart::Places => {
                        let first = &mut row.by_place.first[columns.clone()];
                        let second = &mut row.by_place.second[columns];
                        let all = places.iter_mut().zip(gradient).zip(first).zip(second);
                        for (((place, g), first), second) in all {
                            let down = rates.places * rate.step(first, second, g * line.scale);
                            *place = (*place - down).max(-BEYOND).min(top + BEYOND);
                        }
                    }
                    LearnedPart::Round => {
                        let by = rate.share * rate.each();
                        for ((place, start), g) in places.iter_mut().zip(&row.starts[columns]).zip(gradient) {
                            let g = g * line.scale;
                            if g != 0.0 {
                                *place = (*place - by * g.signum()).clamp(start - HALF, start + HALF);
                            }
                        }
                    }
                    LearnedPart::Clip => {}
                }
                let means = |adam: &mut Adam, at: usize, g: f32| {
                    rates.lines * group.start * rate.step(&mut adam.first[at], &mut adam.second[at], g)
                };
                let scale = group.scale - means(&mut row.by_line, at, by_scale);
                let offset = match real {
                    true => group.offset - means(&mut row.by_line, count + at, by_offset),
                    false => group.offset,
                };
                let next = rounding.of(match real {
                    true => Line::real(scale, offset),
                    false => Line::on_code(scale, line.zero as u8),
                });
                // A sign never changes: the share is of the start's own.
                let share = scale.abs() / group.start * (scale.signum() * line.scale.signum());
                if next.is_sound() && SCALES.contains(&share) {
                    (group.scale, group.offset, group.line) = (scale, offset, next);
                }
            }
        });
        self.weigh();
    }
}

/// The derivatives by scale and offset of a group, codes held, from those by its weights. Places are moved by `shift`, if that
/// is anything.
fn by_line((places, shift): (&[f32], &[f32]), gradient: &[f32], line: Line, top: f32) -> (f32, f32) {
    let sum = |terms: &mut dyn Iterator<Item = (f32, f32)>| {
        terms.fold((0.0, 0.0), |(scale, offset), (place, g)| {
            (scale + g * (round(place, top) - line.zero), offset + g)
        })
    };
    let terms = places.iter().zip(gradient);
    if shift.is_empty() {
        return sum(&mut terms.map(|(place, g)| (*place, *g)));
    }
    sum(&mut terms.zip(shift).map(|((place, g), by)| (place + by / line.scale, *g)))
}

/// A matrix that stays as it is beside those that are learned.
pub(crate) struct Still(pub(crate) Vec<f32>);

impl Variable for Still {
    fn weights(&self) -> &[f32] {
        &self.0
    }

    fn step(&mut self, _gradient: &[f32], _rate: &Rate) {}
}

#[cfg(test)]
mod tests {
    use llmpress_formats::encoding::abq::Abq;

    use super::*;
    use crate::{Learn, Rung};

    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..count).map(|_| next() + next()).collect()
    }

    fn spec(bits: u8, zero: ZeroPoint) -> Spec {
        let abq = Abq { group_size: Some(32), ..Abq::new(bits) };
        Spec { abq, zero, rung: Rung::Gptq, learn: None }
    }

    fn latent(spec: Spec, weights: &[f32], cols: usize) -> (Latent, Vec<f32>) {
        let grid = Grid::search(weights, cols, spec, None).unwrap();
        let codes = grid.nearest(weights);
        (Latent::new(&grid.pack(&codes).unwrap(), spec, weights), grid.values(&codes))
    }

    #[test]
    fn learning_starts_where_error_feedback_ended() {
        let (rows, cols) = (5, 70);
        let weights = numbers(rows * cols, 1);
        for zero in [ZeroPoint::Real, ZeroPoint::Integer, ZeroPoint::Symmetric] {
            let spec = spec(2, zero);
            let grid = Grid::search(&weights, cols, spec, None).unwrap();
            // Codes that are not the nearest ones, as feedback chooses some.
            let codes: Vec<u8> = grid
                .nearest(&weights)
                .iter()
                .enumerate()
                .map(|(i, c)| (c + u8::from(i % 3 == 0)) % 4)
                .collect();
            let unit = grid.pack(&codes).unwrap();
            let latent = Latent::new(&unit, spec, &weights);
            assert_eq!(latent.weights(), grid.values(&codes), "{zero:?}");
            let (same, values) = Box::new(latent).finish().unwrap();
            assert!(same == unit && values == grid.values(&codes), "{zero:?}");
        }
    }

    #[test]
    fn derivatives_by_scale_and_offset_are_those_of_differences() {
        let (places, gradient) =
            (numbers(40, 2).iter().map(|p| 3.0 * p + 1.5).collect::<Vec<f32>>(), numbers(40, 3));
        let top = 3.0;
        for line in [Line::real(0.25, -0.5), Line::on_code(0.25, 2)] {
            let loss = |line: Line| -> f64 {
                let terms = places.iter().zip(&gradient);
                terms.map(|(p, g)| f64::from(line.value(round(*p, top))) * f64::from(*g)).sum()
            };
            let (by_scale, by_offset) = by_line((&places, &[]), &gradient, line, top);
            let h = 1.0 / 64.0;
            let moved = |ds: f32, dz: f32| match line.zero {
                0.0 => Line::real(line.scale + ds, line.offset + dz),
                zero => Line::on_code(line.scale + ds, zero as u8),
            };
            let found = (loss(moved(h, 0.0)) - loss(moved(-h, 0.0))) / f64::from(2.0 * h);
            assert!((found - f64::from(by_scale)).abs() < 1e-4, "{found} {by_scale}");
            if line.zero == 0.0 {
                let found = (loss(moved(0.0, h)) - loss(moved(0.0, -h))) / f64::from(2.0 * h);
                assert!((found - f64::from(by_offset)).abs() < 1e-4, "{found} {by_offset}");
            }
        }
    }

    #[test]
    fn every_variable_moves_towards_other_weights_and_stays_on_its_grid() {
        let (rows, cols, steps) = (4, 64, 900);
        let (weights, goal) = (numbers(rows * cols, 4), numbers(rows * cols, 5));
        for (zero, part) in
            [ZeroPoint::Real, ZeroPoint::Integer, ZeroPoint::Symmetric].into_iter().flat_map(|zero| {
                [LearnedPart::Places, LearnedPart::Clip, LearnedPart::Round].map(|of| (zero, of))
            })
        {
            let learn = Learn { of: part, ..Learn::default() };
            let spec = Spec { learn: Some(learn), ..spec(3, zero) };
            let (mut latent, start) = latent(spec, &weights, cols);
            let far = |w: &[f32]| w.iter().zip(&goal).map(|(w, g)| (w - g) * (w - g)).sum::<f32>();
            let (places, groups) = (latent.rows[0].places.clone(), latent.rows[0].groups.clone());
            for step in 0..steps {
                let gradient: Vec<f32> = latent.weights().iter().zip(&goal).map(|(w, g)| w - g).collect();
                latent.step(&gradient, &Rate::at(step, steps));
            }
            let left = far(latent.weights()) / far(&start);
            let most = if part == LearnedPart::Places { 0.5 } else { 0.98 };
            assert!(left < most, "{zero:?} {part:?}: {left}");
            // One at the end of its reach may stay.
            let moved: Vec<f32> =
                latent.rows[0].places.iter().zip(&places).map(|(a, b)| (a - b).abs()).collect();
            let count = moved.iter().filter(|by| **by > 0.0).count();
            match part {
                LearnedPart::Places => assert!(10 * count >= 9 * cols, "{zero:?}: {count}"),
                LearnedPart::Clip => assert_eq!(count, 0, "{zero:?}"),
                // As many steps as there are come to half a step of the grid.
                LearnedPart::Round => {
                    let farthest = moved.iter().fold(0f32, |a, b| a.max(*b));
                    assert!(
                        10 * count >= 9 * cols && farthest > 0.4 && farthest < 0.501,
                        "{zero:?}: {farthest}"
                    );
                }
            }
            for (now, was) in latent.rows[0].groups.iter().zip(&groups) {
                assert!(now.scale != was.scale && (now.offset != was.offset) == (zero == ZeroPoint::Real));
            }
            let (unit, values) = Box::new(latent).finish().unwrap();
            let mut row = vec![0.0; cols];
            for (at, values) in values.chunks_exact(cols).enumerate() {
                unit.decode_row(at, &mut row).unwrap();
                assert_eq!(row, values, "{zero:?}");
            }
        }
    }

    #[test]
    fn going_back_leaves_the_codes_and_grids_that_were_there_and_a_state_leaves_all() {
        let (rows, cols) = (4, 70);
        let (weights, goal) = (numbers(rows * cols, 7), numbers(rows * cols, 8));
        for zero in [ZeroPoint::Real, ZeroPoint::Integer, ZeroPoint::Symmetric] {
            let (mut latent, start) = latent(spec(2, zero), &weights, cols);
            let down = |latent: &mut Latent, steps: std::ops::Range<u32>| {
                for step in steps {
                    let away = latent.weights().iter().zip(&goal).map(|(w, g)| w - g).collect::<Vec<f32>>();
                    latent.step(&away, &Rate::at(step, 400));
                }
            };
            down(&mut latent, 0..150);
            let (then, snapshot) = (latent.weights().to_vec(), latent.snapshot());
            assert!(then != start, "{zero:?}");
            let mut bytes = Vec::new();
            latent.write(&mut bytes).unwrap();
            snapshot.write(&mut bytes).unwrap();
            down(&mut latent, 150..300);
            let later = latent.weights().to_vec();
            assert!(later != then, "{zero:?}");
            latent.go_back(&snapshot);
            assert_eq!(latent.weights(), then, "{zero:?}");
            let unit = latent.pack(&latent.snapshot()).unwrap();
            let mut row = vec![0.0; cols];
            unit.decode_row(1, &mut row).unwrap();
            assert_eq!(row, then[cols..2 * cols], "{zero:?}");
            // As written, it goes on as it went.
            let (mut again, _) = self::latent(spec(2, zero), &weights, cols);
            let (mut room, from) = (again.room(), &mut &bytes[..]);
            again.read(from).unwrap();
            room.read(from).unwrap();
            assert!(from.is_empty() && room.codes == snapshot.codes && room.lines == snapshot.lines);
            down(&mut again, 150..300);
            assert_eq!(again.weights(), later, "{zero:?}");
        }
    }

    #[test]
    fn weights_that_are_shifted_move_and_pass_derivatives_within_their_grid_alone() {
        let (rows, cols) = (3, 40);
        let weights = numbers(rows * cols, 6);
        for zero in [ZeroPoint::Real, ZeroPoint::Integer, ZeroPoint::Symmetric] {
            let (mut latent, before) = latent(spec(3, zero), &weights, cols);
            let unrounded = latent.unrounded();
            // Within half a step, of which each grid has seven.
            assert!(unrounded.iter().zip(&before).all(|(u, w)| (u - w).abs() < 2.0 / 7.0));
            latent.shift(vec![0.0; rows * cols]);
            assert_eq!(latent.weights(), before);
            let mut far = vec![0.0; rows * cols];
            (far[0], far[1]) = (1e3, -1e3);
            latent.shift(far);
            let mut gradient = vec![1.0; rows * cols];
            latent.pass(&mut gradient);
            assert!(gradient[..2] == [0.0, 0.0] && gradient[2..].iter().all(|g| *g == 1.0));
            let now = latent.weights().to_vec();
            let (high, low) = if now[0] > now[1] { (now[0], now[1]) } else { (now[1], now[0]) };
            assert!(before[..32].iter().all(|w| *w <= high && *w >= low) && now[2..] == before[2..]);
            let (unit, values) = Box::new(latent).finish().unwrap();
            let mut row = vec![0.0; cols];
            unit.decode_row(0, &mut row).unwrap();
            assert!(values == now && row == now[..cols], "{zero:?}");
        }
    }
}
