//! What a tensor's model is to be: two passes over its words.
//!
//! ```text
//! sample  --> floor                       magnitudes below it count as it does: zeros would spoil every mean
//! Means   --> Scales                      rows and columns against the whole, in quarters of an octave
//! Histogram (class, upper bits) --> Choice: how many bits are symbols, how wide classes are, frequencies
//! ```
//!
//! All sums are integers: their order does not matter. Of large tensors a part is counted ([`counted`]).

use std::ops::Range;
use std::sync::LazyLock;

use super::model::{MAX_CLASSES, SYMBOLS};
use super::{ESCAPE, Model, TOTAL};
use crate::Error;

/// How the words of a dtype are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Bits of the mantissa.
    pub mantissa: u32,
    /// Bits of exponent and mantissa.
    pub magnitude: u32,
}

impl Layout {
    /// BF16.
    pub const BF16: Self = Self { mantissa: 7, magnitude: 15 };
    /// IEEE half precision.
    pub const F16: Self = Self { mantissa: 10, magnitude: 15 };
    /// Eight bits, of which three are mantissa.
    pub const F8_E4M3: Self = Self { mantissa: 3, magnitude: 7 };
    /// Eight bits, of which two are mantissa.
    pub const F8_E5M2: Self = Self { mantissa: 2, magnitude: 7 };

    /// Bits that no symbol takes.
    fn finest(self) -> u32 {
        self.mantissa.saturating_sub(MOST_MANTISSA)
    }

    fn bins(self) -> usize {
        1 << (self.magnitude - self.finest())
    }

    /// The magnitude that lesser ones count as, by a sample of words: 64 times less than what is most frequent.
    #[must_use]
    pub fn floor(self, sample: &[u16]) -> u16 {
        let mut counts = [0u32; 1 << 8];
        for &word in sample {
            counts[usize::from((word & 0x7fff) >> self.mantissa) & 0xff] += 1;
        }
        let most = (1u16..).zip(&counts[1..]).max_by_key(|(_, count)| **count);
        most.map_or(0, |(exponent, _)| exponent.saturating_sub(6)) << self.mantissa
    }
}

/// Bits of the mantissa that symbols take at most.
const MOST_MANTISSA: u32 = 3;
/// Classes of a histogram.
const FINE: usize = 32;
/// A class that has less than this part of all elements is joined to its neighbour.
const LEAST_SHARE: u64 = 128;
/// Elements for each scale, at least, for scales to pay.
const ELEMENTS_A_SCALE: u64 = 32;
/// Bits that a frequency takes about, as it is stored.
const TABLE_BITS: f64 = 9.0;

/// Sums of magnitudes, row by row and column by column.
#[derive(Debug, Clone, Default)]
pub struct Means {
    floor: u16,
    ceiling: u16,
    first_row: u64,
    rows: Vec<u64>,
    cols: Vec<u64>,
}

/// Rows whose magnitudes are added up in 32 bits, before they go into 64.
const ROWS_IN_32_BITS: usize = 1 << 16;

impl Means {
    /// Of a matrix, before any of it was seen.
    #[must_use]
    pub fn of(layout: Layout, floor: u16, rows: usize, cols: usize) -> Self {
        let ceiling = floor.saturating_add(12 << layout.mantissa).min(0x7fff);
        Self { floor, ceiling, first_row: 0, rows: vec![0; rows], cols: vec![0; cols] }
    }

    /// Of elements `first..` of the same matrix.
    #[must_use]
    pub fn part(&self, first: u64, words: &[u16]) -> Self {
        let width = self.cols.len().max(1) as u64;
        let mut cols = vec![0u64; self.cols.len()];
        let mut sums = vec![0u32; self.cols.len()];
        let mut rows = Vec::new();
        let mut col = (first % width) as usize;
        let mut rest = words;
        while !rest.is_empty() {
            let (row, after) = rest.split_at((cols.len().max(1) - col).min(rest.len()));
            rest = after;
            rows.push(add_row(row, self.floor, self.ceiling, sums.get_mut(col..).unwrap_or_default()));
            col = 0;
            if rows.len() % ROWS_IN_32_BITS == 0 || rest.is_empty() {
                cols.iter_mut().zip(&mut sums).for_each(|(all, sum)| *all += u64::from(std::mem::take(sum)));
            }
        }
        Self { floor: self.floor, ceiling: self.ceiling, first_row: first / width, rows, cols }
    }

    /// Adds a part.
    pub fn add(&mut self, part: &Self) {
        self.cols.iter_mut().zip(&part.cols).for_each(|(all, sum)| *all += sum);
        let first = usize::try_from(part.first_row).unwrap_or(usize::MAX);
        let rows = self.rows.get_mut(first..).unwrap_or_default();
        rows.iter_mut().zip(&part.rows).for_each(|(all, sum)| *all += sum);
    }
}

/// Adds the magnitudes of a part of a row to its columns' sums; their sum.
fn add_row(row: &[u16], floor: u16, ceiling: u16, sums: &mut [u32]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if let Some(avx2) = super::avx2::Avx2::detect() {
        return avx2.add_row(row, floor, ceiling, sums);
    }
    add_row_anywhere(row, floor, ceiling, sums)
}

/// [`add_row`] in whatever instructions the caller is compiled for.
#[inline(always)]
pub(super) fn add_row_anywhere(row: &[u16], floor: u16, ceiling: u16, sums: &mut [u32]) -> u64 {
    // So many magnitudes of 15 bits fit 32.
    let parts = row.chunks(1 << 16).zip(sums.chunks_mut(1 << 16));
    let of_part = |(row, sums): (&[u16], &mut [u32])| {
        let mut total = 0u32;
        for (&word, sum) in row.iter().zip(sums) {
            let magnitude = u32::from((word & 0x7fff).max(floor).min(ceiling));
            *sum += magnitude;
            total += magnitude;
        }
        u64::from(total)
    };
    parts.map(of_part).sum()
}

/// How rows and columns compare with the whole, in quarters of an octave.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scales {
    /// Of rows.
    pub rows: Vec<i8>,
    /// Of columns.
    pub cols: Vec<i8>,
}

impl Scales {
    /// Whether a matrix of this size may gain by them.
    #[must_use]
    pub fn may_pay(rows: u64, cols: u64) -> bool {
        let elements = u128::from(rows) * u128::from(cols);
        rows > 1
            && cols > 1
            && (u128::from(rows) + u128::from(cols)) * u128::from(ELEMENTS_A_SCALE) <= elements
    }

    /// From sums.
    #[must_use]
    pub fn of(layout: Layout, means: &Means) -> Self {
        let total: u64 = means.rows.iter().sum();
        let (rows, cols) = (means.rows.len().max(1) as f64, means.cols.len().max(1) as f64);
        let whole = total as f64 / rows / cols;
        let quarter = f64::from(1u32 << layout.mantissa) / 4.0;
        let scale =
            |sum: u64, of: f64| ((sum as f64 / of - whole) / quarter).round().clamp(-48.0, 48.0) as i8;
        Self {
            rows: means.rows.iter().map(|&sum| scale(sum, cols)).collect(),
            cols: means.cols.iter().map(|&sum| scale(sum, rows)).collect(),
        }
    }
}

/// Elements that are looked at first: so many runs of so many.
const SAMPLE: (u64, u64) = (64, 256);

/// Which elements of a tensor are the sample of [`Layout::floor`].
pub fn sampled(elements: u64) -> impl Iterator<Item = Range<u64>> {
    let run = SAMPLE.1.min(elements);
    let runs = SAMPLE.0.min(elements.div_ceil(run.max(1)));
    (0..runs).map(move |number| {
        let first = (elements - run) / SAMPLE.0 * number;
        first..first + run
    })
}

/// Elements of a block that is counted or not, as a whole.
const BLOCK: u64 = 1 << 14;
/// One block in two is counted of tensors of the first many elements, one in four from the second on.
const SAMPLED: (u64, u64) = (1 << 18, 1 << 22);

/// Which of elements `first..end` of a tensor of `elements` are counted: all of them of a tensor of less than 256 Ki elements, else a
/// block of 16 Ki in two, of 4 Mi and more in four.
pub fn counted(elements: u64, first: u64, end: u64) -> impl Iterator<Item = Range<u64>> {
    let (half, quarter) = SAMPLED;
    let (block, step) = match elements {
        _ if elements < half => (u64::MAX, 1),
        _ if elements < quarter => (BLOCK, 2),
        _ => (BLOCK, 4),
    };
    (first / block..end.div_ceil(block))
        .filter(move |number| number % step == 0)
        .map(move |number| first.max(number * block)..end.min(number.saturating_add(1).saturating_mul(block)))
}

/// How often each upper part of a magnitude occurs in each fine class.
#[derive(Debug, Clone)]
pub struct Histogram {
    layout: Layout,
    counts: Vec<u64>,
}

impl Histogram {
    /// An empty one.
    #[must_use]
    pub fn new(layout: Layout) -> Self {
        Self { layout, counts: vec![0; FINE * layout.bins()] }
    }

    /// Counts elements `first..` of the matrix; of `scales` without rows all are of one class.
    pub fn add(&mut self, scales: &Scales, first: u64, words: &[u16]) {
        let (bins, finest) = (self.layout.bins(), self.layout.finest());
        let bin = |word: u16| usize::from((word & 0x7fff) >> finest) & (bins - 1);
        if scales.rows.is_empty() || scales.cols.is_empty() {
            let counts = self.counts.get_mut(FINE / 2 * bins..).unwrap_or_default();
            words.iter().for_each(|&word| counts[bin(word)] += 1);
            return;
        }
        let width = scales.cols.len();
        let (mut row, mut col) = ((first / width as u64) as usize, (first % width as u64) as usize);
        let mut rest = words;
        let mut classes = Vec::new();
        while !rest.is_empty() {
            let (now, after) = rest.split_at((width - col).min(rest.len()));
            rest = after;
            let scale = scales.rows.get(row).copied().unwrap_or(0) + FINE as i8 / 2;
            classes.clear();
            let cols = scales.cols.get(col..col + now.len()).unwrap_or_default();
            super::classes_of_row(scale, cols, 0, FINE as i8 - 1, &mut classes);
            for (&word, &class) in now.iter().zip(&classes) {
                self.counts[usize::from(class) * bins + bin(word)] += 1;
            }
            (row, col) = (row + 1, 0);
        }
    }

    /// Adds another one.
    pub fn merge(&mut self, other: &Self) {
        self.counts.iter_mut().zip(&other.counts).for_each(|(all, count)| *all += count);
    }

    /// The model that is expected to come to least, with the scales that it wants: none where it has one class.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a histogram of nothing.
    pub fn choose(&self, scales: &Scales) -> Result<Choice, Error> {
        if self.counts.iter().all(|&count| count == 0) {
            return Err(Error::Invalid("a histogram of nothing".to_owned()));
        }
        let used = self.used();
        let side = entropy_of(&scales.rows) + entropy_of(&scales.cols);
        let mut best: Option<(f64, Plan)> = None;
        for shift in [0, 1, 2, FINE.ilog2()] {
            let merged = self.merged(&used, shift);
            for taken in 0..=self.layout.mantissa.min(MOST_MANTISSA) {
                let plan = Plan::of(&merged, self.layout, taken);
                let bits = plan.bits + if plan.classes.len() > 1 { side } else { 0.0 };
                if best.as_ref().is_none_or(|(least, _)| bits < *least) {
                    best = Some((bits, plan));
                }
            }
        }
        let (bits, plan) = best.ok_or_else(|| Error::Invalid("a histogram of nothing".to_owned()))?;
        let frequencies = plan.classes.iter().map(frequencies).collect();
        let model = Model::new(plan.low, plan.base, plan.shift, frequencies)?;
        let scales = if plan.classes.len() == 1 {
            Scales::default()
        } else {
            let offset = FINE as i16 / 2 - ((plan.first as i16) << plan.shift);
            let moved = |&row: &i8| (i16::from(row) + offset).clamp(-100, 100) as i8;
            Scales { rows: scales.rows.iter().map(moved).collect(), cols: scales.cols.clone() }
        };
        Ok(Choice { model, scales, expected_bits: bits })
    }

    /// Classes joined `1 << shift` at a time, those with little at either end joined to their neighbours.
    fn merged(&self, bins: &Range<usize>, shift: u32) -> Merged {
        let all = self.layout.bins();
        let mut classes: Vec<Vec<u64>> = self
            .counts
            .chunks(all << shift)
            .map(|fine| {
                let mut joined = vec![0; LOWEST + bins.len()];
                for one in fine.chunks(all) {
                    let used = one.get(..LOWEST).unwrap_or_default().iter();
                    let used = used.chain(one.get(bins.clone()).unwrap_or_default());
                    joined.iter_mut().zip(used).for_each(|(all, n)| *all += n);
                }
                joined
            })
            .collect();
        let sum = |class: &Vec<u64>| class.iter().sum::<u64>();
        let total: u64 = classes.iter().map(sum).sum();
        let mut first = 0;
        while classes.len() > 1 {
            let (front, back) = (classes.first().map_or(0, sum), classes.last().map_or(0, sum));
            if front.min(back).saturating_mul(LEAST_SHARE) >= total && classes.len() <= MAX_CLASSES {
                break;
            }
            let gone = if front <= back { classes.remove(0) } else { classes.pop().unwrap_or_default() };
            first += usize::from(front <= back);
            let neighbour = if front <= back { classes.first_mut() } else { classes.last_mut() };
            if let Some(neighbour) = neighbour {
                neighbour.iter_mut().zip(&gone).for_each(|(all, n)| *all += n);
            }
        }
        Merged { shift, first, from: bins.start, classes }
    }

    /// The bins above the lowest ones that anything is counted in.
    fn used(&self) -> Range<usize> {
        let mut counted = vec![0u64; self.layout.bins()];
        for class in self.counts.chunks(counted.len()) {
            counted.iter_mut().zip(class).for_each(|(all, count)| *all |= count);
        }
        let used = |bin: &usize| counted.get(*bin).is_some_and(|&count| count > 0);
        let Some(first) = (LOWEST..counted.len()).find(used) else { return LOWEST..LOWEST };
        let last = (first..counted.len()).rev().find(used).unwrap_or(first);
        first / LOWEST * LOWEST..(last + 1).next_multiple_of(LOWEST)
    }
}

/// The lowest bins are kept apart: zeros are among them, and what lies between them and the others is empty.
const LOWEST: usize = 1 << MOST_MANTISSA;

/// A histogram of fewer classes.
struct Merged {
    shift: u32,
    /// The number of the first class, of those before any was joined to its neighbour.
    first: usize,
    /// The bin that follows the lowest ones.
    from: usize,
    /// For each class its lowest bins and those that are used.
    classes: Vec<Vec<u64>>,
}

/// What was chosen.
#[derive(Debug, Clone)]
pub struct Choice {
    /// The model.
    pub model: Model,
    /// Scales as the model's classes want them.
    pub scales: Scales,
    /// Bits that the elements, the frequencies and the scales are expected to take.
    pub expected_bits: f64,
}

impl Choice {
    /// For a matrix in memory.
    ///
    /// # Errors
    /// [`Error::Invalid`] where there are no words, or not as many as the matrix has elements.
    pub fn of(layout: Layout, rows: usize, cols: usize, words: &[u16]) -> Result<Self, Error> {
        if rows.checked_mul(cols) != Some(words.len()) {
            return Err(Error::Invalid(format!("{} words for {rows} x {cols}", words.len())));
        }
        let elements = words.len() as u64;
        let at = |range: Range<u64>| words.get(range.start as usize..range.end as usize).unwrap_or_default();
        let mut scales = Scales::default();
        if Scales::may_pay(rows as u64, cols as u64) {
            let mut sample = Vec::new();
            sampled(elements).for_each(|range| sample.extend_from_slice(at(range)));
            let none = Means::of(layout, layout.floor(&sample), rows, cols);
            let mut means = none.clone();
            means.add(&none.part(0, words));
            scales = Scales::of(layout, &means);
        }
        let mut histogram = Histogram::new(layout);
        for range in counted(elements, 0, elements) {
            histogram.add(&scales, range.start, at(range));
        }
        histogram.choose(&scales)
    }
}

/// A model in the making: symbols' counts by class.
struct Plan {
    low: u32,
    base: u16,
    shift: u32,
    first: usize,
    classes: Vec<[u64; SYMBOLS]>,
    bits: f64,
}

impl Plan {
    /// Of symbols that take so many bits of the mantissa.
    fn of(merged: &Merged, layout: Layout, taken: u32) -> Self {
        let low = layout.mantissa - taken;
        let fold = low - layout.finest();
        let folded: Vec<Vec<u64>> = merged
            .classes
            .iter()
            .map(|bins| bins.chunks(1 << fold).map(|bins| bins.iter().sum()).collect())
            .collect();
        let (lowest, from) = (LOWEST >> fold, merged.from >> fold);
        let part_of = |at: usize| if at < lowest { at } else { from + (at - lowest) };
        let base = base_of(&folded, part_of);
        let mut bits = 0.0;
        let mut total = 0;
        let classes = folded
            .iter()
            .map(|parts| {
                let mut symbols = [0u64; SYMBOLS];
                let n: u64 = parts.iter().sum();
                total += n;
                for (at, &count) in parts.iter().enumerate().filter(|(_, count)| **count > 0) {
                    let symbol = match (part_of(at), part_of(at).wrapping_sub(usize::from(base))) {
                        (0, _) => 0,
                        (_, symbol @ 1..=254) => symbol,
                        _ => usize::from(ESCAPE),
                    };
                    // What is rarer than that would cost others more than its escapes do.
                    let rare = count.saturating_mul(u64::from(TOTAL) * 16) < n;
                    symbols[if rare { usize::from(ESCAPE) } else { symbol }] += count;
                }
                // Whatever comes can be encoded, also where a part of the elements was counted.
                symbols[usize::from(ESCAPE)] = symbols[usize::from(ESCAPE)].max(1);
                bits += cost(&symbols);
                symbols
            })
            .collect();
        bits += total as f64 * f64::from(low + 1);
        Self { low, base, shift: merged.shift, first: merged.first, classes, bits }
    }
}

/// The base from which 254 parts hold most; of equal ones the first.
fn base_of(folded: &[Vec<u64>], part_of: impl Fn(usize) -> usize) -> u16 {
    let count = folded.first().map_or(0, Vec::len);
    let sums: Vec<(usize, u64)> = (0..count)
        .map(|at| (part_of(at), folded.iter().filter_map(|class| class.get(at)).sum()))
        .filter(|&(part, sum)| part > 0 && sum > 0)
        .collect();
    let (mut most, mut best) = (0, 0);
    // Whatever window is best, one that begins with a part that occurs holds as much.
    let (mut sum, mut end) = (0, 0);
    for (start, &(first, here)) in sums.iter().enumerate() {
        while let Some(&(_, more)) = sums.get(end).filter(|(part, _)| *part < first + 254) {
            sum += more;
            end += 1;
        }
        if sum > most {
            (most, best) = (sum, first - 1);
        }
        debug_assert!(start < end);
        sum -= here;
    }
    best as u16
}

/// Bits of a class's symbols, its escapes and its table.
pub(super) fn cost(symbols: &[u64; SYMBOLS]) -> f64 {
    let n: u64 = symbols.iter().sum();
    let of_all = log2(n);
    let used = symbols.iter().filter(|&&count| count > 0);
    let bits: f64 = used.map(|&count| count as f64 * (of_all - log2(count)) + TABLE_BITS).sum();
    bits + symbols[usize::from(ESCAPE)] as f64 * 16.0
}

/// Bits of these scales by their own frequencies.
fn entropy_of(scales: &[i8]) -> f64 {
    let mut counts = [0u64; 256];
    scales.iter().for_each(|&scale| counts[usize::from(scale as u8)] += 1);
    let n = scales.len() as u64;
    counts.iter().filter(|&&count| count > 0).map(|&count| count as f64 * (log2(n) - log2(count))).sum()
}

/// Frequencies for counts: none is 0 that occurs, and they sum to 4096.
pub(super) fn frequencies(symbols: &[u64; SYMBOLS]) -> [u16; SYMBOLS] {
    let n: u64 = symbols.iter().sum();
    let mut all = [0u16; SYMBOLS];
    if n == 0 {
        return all;
    }
    for (frequency, &count) in all.iter_mut().zip(symbols).filter(|(_, count)| **count > 0) {
        let share = u128::from(count) * u128::from(TOTAL) / u128::from(n);
        *frequency = share.max(1) as u16;
    }
    let mut sum: u32 = all.iter().map(|&f| u32::from(f)).sum();
    let up = sum < TOTAL;
    // What a slot more gains, or one less loses, for each symbol; of equal ones the first goes.
    let value = |frequency: u16, count: u64| {
        let (from, to) = if up { (frequency, frequency + 1) } else { (frequency, frequency.max(2) - 1) };
        let may = if up { frequency > 0 } else { frequency > 1 };
        let gain = count as f64 * (log2(u64::from(to)) - log2(u64::from(from)));
        if may { gain } else { f64::NEG_INFINITY }
    };
    let mut values: Vec<f64> = all.iter().zip(symbols).map(|(&f, &count)| value(f, count)).collect();
    while sum != TOTAL {
        let better = |best: usize, at: usize| if values[at] > values[best] { at } else { best };
        let best = (0..SYMBOLS).fold(0, better);
        (all[best], sum) = if up { (all[best] + 1, sum + 1) } else { (all[best] - 1, sum - 1) };
        values[best] = value(all[best], symbols[best]);
    }
    all
}

/// The binary logarithm, the same on every machine: as libraries differ in the last bit, choices by them would.
fn log2(n: u64) -> f64 {
    // Most counts are small, and small matrices have hardly more elements than counts.
    static SMALL: LazyLock<Vec<f64>> = LazyLock::new(|| (0..1 << 12).map(log2_by_series).collect());
    let small = usize::try_from(n).ok().and_then(|n| SMALL.get(n));
    small.copied().unwrap_or_else(|| log2_by_series(n))
}

fn log2_by_series(n: u64) -> f64 {
    if n == 0 {
        return 0.0;
    }
    let whole = n.ilog2();
    let mantissa = n as f64 / (1u64 << whole) as f64;
    // ln(m) = 2 artanh((m - 1) / (m + 1)), of at most a third.
    let t = (mantissa - 1.0) / (mantissa + 1.0);
    let square = t * t;
    let series = (0..6).rev().fold(0.0, |sum, k| sum * square + 1.0 / f64::from(2 * k + 1));
    f64::from(whole) + 2.0 * t * series * std::f64::consts::LOG2_E
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logarithms_are_right_to_a_millionth() {
        for n in (1..5000).chain([u64::MAX, u64::MAX / 3, 1 << 40]) {
            assert!((log2(n) - (n as f64).log2()).abs() < 1e-6, "{n}");
        }
        assert_eq!(log2(0), 0.0);
    }

    proptest::proptest! {
        #[test]
        fn sums_of_rows_and_columns_are_those_of_one_word_after_the_other(
            words in proptest::collection::vec(proptest::prelude::any::<u16>(), 0..700),
            width in 1usize..100,
            col in 0usize..100,
            floor in 0u16..=0x7fff,
        ) {
            let (rows, first) = (words.len() / width + 2, col % width);
            let none = Means::of(Layout::BF16, floor, rows, width);
            let mut found = none.clone();
            found.add(&none.part(first as u64, &words));
            let (mut of_rows, mut of_cols) = (vec![0u64; rows], vec![0u64; width]);
            for (at, &word) in (first..).zip(&words) {
                let magnitude = u64::from((word & 0x7fff).clamp(none.floor, none.ceiling));
                of_rows[at / width] += magnitude;
                of_cols[at % width] += magnitude;
            }
            proptest::prop_assert_eq!((found.rows, found.cols), (of_rows, of_cols));
            let mut sums = vec![0; words.len()];
            let total = add_row_anywhere(&words, none.floor, none.ceiling, &mut sums);
            let mut fast = vec![0; words.len()];
            proptest::prop_assert_eq!(add_row(&words, none.floor, none.ceiling, &mut fast), total);
            proptest::prop_assert_eq!(fast, sums);
        }
    }

    #[test]
    fn sums_of_large_magnitudes_do_not_overflow() {
        let words = vec![0xffff; (1 << 17) + 3];
        let largest = Means { floor: 0, ceiling: 0x7fff, first_row: 0, rows: Vec::new(), cols: vec![0] };
        let one_column = largest.part(0, &words);
        assert_eq!(one_column.cols, [0x7fff * words.len() as u64]);
        let one_row = Means { cols: vec![0; words.len()], ..largest }.part(0, &words);
        assert_eq!(one_row.rows, [0x7fff * words.len() as u64]);
    }

    #[test]
    fn what_is_counted_does_not_depend_on_how_a_tensor_is_cut() {
        let (half, quarter) = SAMPLED;
        for elements in [1, 5000, half - 1, half, half + 12_345, quarter - 1, quarter, quarter + 12_345] {
            let count = |step: usize| -> Vec<u64> {
                let cuts = (0..elements).step_by(step).map(|at| at..(at + step as u64).min(elements));
                let ranges = cuts.flat_map(|cut| counted(elements, cut.start, cut.end));
                ranges.flat_map(|range| [range.start, range.end]).collect()
            };
            // Neighbours are joined, so that only what is covered counts.
            let joined = |mut ends: Vec<u64>| {
                let mut at = 1;
                while at + 1 < ends.len() {
                    if ends[at] == ends[at + 1] {
                        ends.drain(at..at + 2);
                    } else {
                        at += 2;
                    }
                }
                ends
            };
            let whole = joined(count(elements as usize));
            assert!(whole == joined(count(99_991)) && whole == joined(count(1 << 18)), "{elements}");
            let covered: u64 = whole.chunks(2).map(|ends| ends[1] - ends[0]).sum();
            let least =
                if elements < half { elements } else { elements / if elements < quarter { 2 } else { 4 } };
            assert!(covered >= least, "{covered} of {elements}");
        }
        assert!(sampled(0).next().is_none());
        assert!([1, 255, 256, 257, 17_000, 1 << 30].into_iter().all(|n| sampled(n).all(|run| run.end <= n)));
    }

    #[test]
    fn frequencies_sum_to_4096_and_none_that_occurs_is_lost() {
        let mut symbols = [0; SYMBOLS];
        for (i, symbol) in symbols.iter_mut().enumerate() {
            *symbol = if i % 3 == 0 { 0 } else { 1 + (i as u64).pow(4) };
        }
        for counts in [symbols, [1; SYMBOLS], [u64::MAX / 256; SYMBOLS]] {
            let frequencies = frequencies(&counts);
            assert_eq!(frequencies.iter().map(|&f| u32::from(f)).sum::<u32>(), TOTAL);
            assert!(frequencies.iter().zip(&counts).all(|(&f, &count)| count == 0 || f > 0));
        }
        let mut one = [0; SYMBOLS];
        one[7] = 5;
        assert_eq!(frequencies(&one)[7], TOTAL as u16);
    }
}
