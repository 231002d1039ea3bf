//! How far two checkpoints are from each other, tensor by tensor.
//!
//! ```text
//! a: read a piece --> values --+
//!                              +--> sums of a piece --> norms of a tensor --> total
//! b: read a piece --> values --+
//! ```
//!
//! Sums are taken in double precision, piece by piece in order: they do not depend on the threads.

use std::collections::BTreeSet;

use llmpress_formats::{Checkpoint, Dtype, Result, Tensor};
use rayon::prelude::*;
use serde::Serialize;

use crate::element::{count_differing, values};

/// Elements of a piece; 1 MiB of BF16.
const PIECE: u64 = 1 << 19;
/// Pieces whose sums are held at a time.
const BATCH: usize = 1024;
/// Elements that are turned into values at a time.
const CHUNK: usize = 1024;
const LANES: usize = 8;

/// What a comparison found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CheckpointDifference {
    /// Tensors of the same bits in both.
    pub identical: usize,
    /// Tensors that differ in their elements or in their dtype, the largest relative error first.
    pub different: Vec<TensorDifference>,
    /// Tensors whose elements cannot be compared, by name.
    pub incomparable: Vec<Incomparable>,
    /// Tensors that only A has.
    pub only_in_a: Vec<String>,
    /// Tensors that only B has.
    pub only_in_b: Vec<String>,
    /// All compared tensors taken together as one.
    pub total: Norms,
}

/// How a tensor differs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TensorDifference {
    /// The tensor.
    pub tensor: String,
    /// Its shape in both.
    pub shape: Vec<u64>,
    /// Its dtype in A.
    pub dtype_a: Dtype,
    /// Its dtype in B.
    pub dtype_b: Dtype,
    /// By how much.
    #[serde(flatten)]
    pub norms: Norms,
}

/// Differences of elements. Elements that are NaN or infinite in A or B are in no norm; a norm is absent where it
/// is not defined, or where the dtype has no values to subtract.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Norms {
    /// Elements compared.
    pub elements: u64,
    /// Elements whose bits differ; those whose values differ where the dtypes do.
    pub differing: u64,
    /// Elements that are NaN or infinite on one side and not the same on the other.
    pub non_finite_mismatches: u64,
    /// Largest |a - b|.
    pub max_abs: Option<f64>,
    /// Square root of the mean of (a - b)^2.
    pub rms: Option<f64>,
    /// Frobenius norms ||A - B|| / ||A||.
    pub relative: Option<f64>,
    /// Cosine of the angle between A and B.
    pub cosine: Option<f64>,
}

/// A tensor whose two forms have no elements to compare: their shapes differ, or their dtypes where not both
/// are floats.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Incomparable {
    /// The tensor.
    pub tensor: String,
    /// Its shape in A.
    pub shape_a: Vec<u64>,
    /// Its shape in B.
    pub shape_b: Vec<u64>,
    /// Its dtype in A.
    pub dtype_a: Dtype,
    /// Its dtype in B.
    pub dtype_b: Dtype,
}

impl CheckpointDifference {
    /// Whether both hold the same tensors with the same bits.
    pub fn is_identical(&self) -> bool {
        let Self { different, incomparable, only_in_a, only_in_b, .. } = self;
        different.is_empty() && incomparable.is_empty() && only_in_a.is_empty() && only_in_b.is_empty()
    }
}

/// Compares every tensor of `a` with the one of the same name in `b`. A tied tensor counts as the one it stands
/// for; one that is tied in both to the same is not counted again. `progress` is told the bytes of `a` as they
/// are read.
///
/// # Errors
/// A checkpoint cannot be read.
pub fn difference(
    a: &Checkpoint,
    b: &Checkpoint,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<CheckpointDifference> {
    let mut result = CheckpointDifference {
        identical: 0,
        different: Vec::new(),
        incomparable: Vec::new(),
        only_in_a: Vec::new(),
        only_in_b: Vec::new(),
        total: Sums::default().norms(0),
    };
    let mut pairs: Vec<Pair> = Vec::new();
    let names: BTreeSet<&String> =
        [a, b].into_iter().flat_map(|c| c.tensors().keys().chain(c.tied().keys())).collect();
    for name in names {
        if a.tied().contains_key(name) && a.tied().get(name) == b.tied().get(name) {
            continue;
        }
        match (a.tensor(name), b.tensor(name)) {
            (Ok(ta), Ok(tb)) if ta.shape == tb.shape && comparable(ta.dtype, tb.dtype) => {
                pairs.push(Pair::of(name, ta, tb));
            }
            (Ok(ta), Ok(tb)) => result.incomparable.push(Incomparable {
                tensor: name.clone(),
                shape_a: ta.shape.clone(),
                shape_b: tb.shape.clone(),
                dtype_a: ta.dtype,
                dtype_b: tb.dtype,
            }),
            (Ok(_), Err(_)) => result.only_in_a.push(name.clone()),
            (Err(_), _) => result.only_in_b.push(name.clone()),
        }
    }
    add_up(a, b, &mut pairs, progress)?;
    let mut total = Sums { valued: true, ..Sums::default() };
    for pair in &pairs {
        total.add(&pair.sums);
        if pair.sums.differing == 0 && pair.dtypes.0 == pair.dtypes.1 {
            result.identical += 1;
            continue;
        }
        result.different.push(pair.difference());
    }
    sort(&mut result.different);
    result.total = total.norms(pairs.iter().map(|pair| pair.elements).sum());
    Ok(result)
}

/// How far tensors of `b` are from those of `a`, which have their names, dtypes and shapes: the largest relative error
/// first, then all of them taken together as one.
pub(crate) fn norms_of(
    a: &Checkpoint,
    b: &Checkpoint,
    names: &[&String],
    progress: &(dyn Fn(u64) + Sync),
) -> Result<(Vec<TensorDifference>, Norms)> {
    let pairs = names.iter().map(|name| Ok(Pair::of(name, a.tensor(name)?, b.tensor(name)?)));
    let mut pairs: Vec<Pair> = pairs.collect::<Result<_>>()?;
    add_up(a, b, &mut pairs, progress)?;
    let mut total = Sums { valued: true, ..Sums::default() };
    pairs.iter().for_each(|pair| total.add(&pair.sums));
    let mut found: Vec<TensorDifference> = pairs.iter().map(Pair::difference).collect();
    sort(&mut found);
    Ok((found, total.norms(pairs.iter().map(|pair| pair.elements).sum())))
}

/// The largest relative error first.
fn sort(found: &mut [TensorDifference]) {
    // What has no relative error differs from zero, or has no values: first, not last.
    let relative = |d: &TensorDifference| d.norms.relative.unwrap_or(f64::INFINITY);
    found.sort_by(|x, y| relative(y).total_cmp(&relative(x)).then_with(|| x.tensor.cmp(&y.tensor)));
}

/// A tensor that both have.
struct Pair<'a> {
    name: &'a str,
    shape: &'a [u64],
    dtypes: (Dtype, Dtype),
    elements: u64,
    sums: Sums,
}

impl<'a> Pair<'a> {
    fn of(name: &'a str, a: &'a Tensor, b: &Tensor) -> Self {
        let dtypes = (a.dtype, b.dtype);
        // Some dtypes put two elements into a byte: their bytes are compared.
        let elements = a.bytes / width(a.dtype);
        Self { name, shape: &a.shape, dtypes, elements, sums: Sums::default() }
    }

    fn difference(&self) -> TensorDifference {
        TensorDifference {
            tensor: self.name.to_owned(),
            shape: self.shape.to_vec(),
            dtype_a: self.dtypes.0,
            dtype_b: self.dtypes.1,
            norms: self.sums.norms(self.elements),
        }
    }
}

fn add_up(a: &Checkpoint, b: &Checkpoint, pairs: &mut [Pair], progress: &(dyn Fn(u64) + Sync)) -> Result<()> {
    let jobs: Vec<(usize, u64)> =
        pairs.iter().enumerate().map(|(i, p)| (i, p.elements.div_ceil(PIECE))).collect();
    let mut jobs = jobs.into_iter().flat_map(|(pair, pieces)| (0..pieces).map(move |piece| (pair, piece)));
    loop {
        let batch: Vec<(usize, u64)> = jobs.by_ref().take(BATCH).collect();
        if batch.is_empty() {
            return Ok(());
        }
        let sums: Vec<Sums> = batch
            .par_iter()
            .map_init(<(Vec<u64>, Vec<u64>)>::default, |buffers, &(pair, piece)| {
                let pair = &pairs[pair];
                let start = piece * PIECE;
                let count = (pair.elements - start).min(PIECE);
                let left = read(a, pair.name, width(pair.dtypes.0), start, count, &mut buffers.0)?;
                let right = read(b, pair.name, width(pair.dtypes.1), start, count, &mut buffers.1)?;
                progress(left.len() as u64);
                Ok(Sums::of(pair.dtypes, left, right))
            })
            .collect::<Result<_>>()?;
        for ((pair, _), sums) in batch.iter().zip(&sums) {
            pairs[*pair].sums.add(sums);
        }
    }
}

/// Elements `start .. start + count` in a buffer that is aligned for every decoder.
fn read<'a>(
    checkpoint: &Checkpoint,
    name: &str,
    width: u64,
    start: u64,
    count: u64,
    buffer: &'a mut Vec<u64>,
) -> Result<&'a [u8]> {
    let bytes = (count * width) as usize;
    buffer.resize(buffer.len().max(bytes.div_ceil(8)), 0);
    let piece = &mut bytemuck::cast_slice_mut::<u64, u8>(buffer)[..bytes];
    checkpoint.read(name, start * width, piece)?;
    Ok(piece)
}

fn comparable(a: Dtype, b: Dtype) -> bool {
    let float = |dtype| matches!(dtype, Dtype::F16 | Dtype::BF16 | Dtype::F32 | Dtype::F64);
    a == b || (float(a) && float(b))
}

/// Bytes of an element; 1 where an element is less.
fn width(dtype: Dtype) -> u64 {
    u64::from(dtype.bits()).div_ceil(8)
}

/// What is known of a range of elements.
#[derive(Debug, Clone, Default)]
struct Sums {
    differing: u64,
    non_finite_mismatches: u64,
    /// Elements in the norms.
    finite: u64,
    /// Whether the dtype has values.
    valued: bool,
    max_abs: f64,
    aa: f64,
    bb: f64,
    ab: f64,
    /// Of (a - b)^2.
    squares: f64,
}

impl Sums {
    /// Of two pieces of the same number of elements.
    fn of(dtypes: (Dtype, Dtype), a: &[u8], b: &[u8]) -> Self {
        let mut sums = Self::default();
        let same_dtype = dtypes.0 == dtypes.1;
        let same_bytes = same_dtype && a == b;
        if same_dtype && !same_bytes {
            sums.differing = count_differing(width(dtypes.0) as usize, a, b);
        }
        let (mut x, mut y) = ([0.0; CHUNK], [0.0; CHUNK]);
        let chunks = |bytes: u64| bytes as usize * CHUNK;
        for (a, b) in a.chunks(chunks(width(dtypes.0))).zip(b.chunks(chunks(width(dtypes.1)))) {
            let count = a.len() / width(dtypes.0) as usize;
            let (x, y) = (&mut x[..count], &mut y[..count]);
            sums.valued = values(dtypes.0, a, x);
            if !sums.valued {
                return sums;
            }
            if same_bytes {
                y.copy_from_slice(x);
            } else {
                values(dtypes.1, b, y);
            }
            sums.add_values(x, y, !same_dtype);
        }
        sums
    }

    fn add_values(&mut self, x: &[f64], y: &[f64], count_differing: bool) {
        let same = |x: f64, y: f64| x == y || (x.is_nan() && y.is_nan());
        let (mut finite, mut max_abs) = ([0u64; LANES], [0f64; LANES]);
        let [mut aa, mut bb, mut ab, mut squares] = [[0f64; LANES]; 4];
        for (x, y) in x.chunks(LANES).zip(y.chunks(LANES)) {
            for (i, (&x, &y)) in x.iter().zip(y).enumerate() {
                let both = x.is_finite() & y.is_finite();
                let (x, y) = if both { (x, y) } else { (0.0, 0.0) };
                let d = x - y;
                finite[i] += u64::from(both);
                max_abs[i] = max_abs[i].max(d.abs());
                aa[i] += x * x;
                bb[i] += y * y;
                ab[i] += x * y;
                squares[i] += d * d;
            }
        }
        let finite: u64 = finite.iter().sum();
        if count_differing || finite < x.len() as u64 {
            for (&x, &y) in x.iter().zip(y).filter(|&(&x, &y)| !same(x, y)) {
                self.differing += u64::from(count_differing);
                self.non_finite_mismatches += u64::from(!(x.is_finite() && y.is_finite()));
            }
        }
        self.finite += finite;
        self.max_abs = max_abs.into_iter().fold(self.max_abs, f64::max);
        self.aa += aa.iter().sum::<f64>();
        self.bb += bb.iter().sum::<f64>();
        self.ab += ab.iter().sum::<f64>();
        self.squares += squares.iter().sum::<f64>();
    }

    fn add(&mut self, other: &Self) {
        self.differing += other.differing;
        self.non_finite_mismatches += other.non_finite_mismatches;
        self.finite += other.finite;
        self.valued |= other.valued;
        self.max_abs = self.max_abs.max(other.max_abs);
        self.aa += other.aa;
        self.bb += other.bb;
        self.ab += other.ab;
        self.squares += other.squares;
    }

    fn norms(&self, elements: u64) -> Norms {
        let known = |value: f64| (self.valued && value.is_finite()).then_some(value);
        let relative = if self.squares == 0.0 { 0.0 } else { (self.squares / self.aa).sqrt() };
        let cosine = self.ab / (self.aa.sqrt() * self.bb.sqrt());
        Norms {
            elements,
            differing: self.differing,
            non_finite_mismatches: self.non_finite_mismatches,
            max_abs: known(self.max_abs),
            rms: known((self.squares / self.finite.max(1) as f64).sqrt()),
            relative: known(relative),
            cosine: known(cosine).map(|c| c.clamp(-1.0, 1.0)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn f32s(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    fn norms(a: &[f32], b: &[f32]) -> Norms {
        Sums::of((Dtype::F32, Dtype::F32), &f32s(a), &f32s(b)).norms(a.len() as u64)
    }

    #[test]
    fn norms_are_those_of_the_definitions() {
        let n = norms(&[3.0, 4.0, 0.0], &[3.0, 0.0, 0.0]);
        assert_eq!((n.elements, n.differing, n.non_finite_mismatches), (3, 1, 0));
        assert_eq!((n.max_abs, n.relative, n.cosine), (Some(4.0), Some(0.8), Some(0.6)));
        assert_eq!(n.rms, Some((16.0f64 / 3.0).sqrt()));
        // More elements than a chunk, and no multiple of the lanes.
        let a: Vec<f32> = (0..3001).map(|i| (i % 7) as f32).collect();
        let b: Vec<f32> = a.iter().map(|x| x + 0.5).collect();
        let n = norms(&a, &b);
        assert_eq!((n.differing, n.max_abs, n.rms), (3001, Some(0.5), Some(0.5)));
        let aa: f64 = a.iter().map(|x| f64::from(x * x)).sum();
        assert!((n.relative.unwrap() - (3001.0 * 0.25 / aa).sqrt()).abs() < 1e-15);
    }

    #[test]
    fn zero_has_no_relative_error_nor_angle() {
        let n = norms(&[0.0, -0.0], &[0.0, 0.0]);
        assert_eq!((n.differing, n.max_abs, n.relative, n.cosine), (1, Some(0.0), Some(0.0), None));
        let n = norms(&[0.0], &[2.0]);
        assert_eq!((n.max_abs, n.relative, n.cosine), (Some(2.0), None, None));
    }

    #[test]
    fn nan_and_infinity_are_counted_and_never_in_a_norm() {
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        let n = norms(&[nan, nan, 1.0, inf, inf, inf, 1.0], &[nan, 1.0, nan, inf, -inf, 1.0, 2.0]);
        assert_eq!((n.differing, n.non_finite_mismatches), (5, 4));
        assert_eq!((n.max_abs, n.rms, n.relative), (Some(1.0), Some(1.0), Some(1.0)));
        // Too large for the square.
        let huge = |v: f64| v.to_le_bytes().to_vec();
        let sums = Sums::of((Dtype::F64, Dtype::F64), &huge(1e300), &huge(-1e300));
        assert_eq!(
            (sums.norms(1).relative, sums.norms(1).rms, sums.norms(1).max_abs),
            (None, None, Some(2e300))
        );
    }

    #[test]
    fn floats_of_different_dtypes_are_compared_by_value() {
        let words = [0x3f80u16, 0xc000, 0x7fc0, 0x8000].map(u16::to_le_bytes).concat();
        let wide = |last: f32| f32s(&[1.0, -2.0, f32::NAN, last]);
        let equal = Sums::of((Dtype::BF16, Dtype::F32), &words, &wide(0.0));
        assert_eq!((equal.differing, equal.non_finite_mismatches), (0, 0));
        let other = Sums::of((Dtype::BF16, Dtype::F32), &words, &wide(1e-3));
        assert_eq!(other.differing, 1);
        let half = [0x3c00u16, 0xc000, 0x7e00, 0x8000].map(u16::to_le_bytes).concat();
        assert_eq!(Sums::of((Dtype::F16, Dtype::F32), &half, &wide(0.0)).differing, 0);
    }

    #[test]
    fn dtypes_without_values_are_compared_by_bits() {
        let n = Sums::of((Dtype::F8_E4M3, Dtype::F8_E4M3), &[1, 2, 3], &[1, 9, 9]).norms(3);
        assert_eq!((n.differing, n.max_abs, n.relative, n.cosine), (2, None, None, None));
    }
}
