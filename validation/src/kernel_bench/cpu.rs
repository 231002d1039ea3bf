//! The processor's products of few bits beside its own of BF16, on one thread.
//!
//! ```text
//! round: all copies of BF16, all copies of the kernel, ...      medians of the rounds; copies exceed the cache together
//! ```
//!
//! Seconds are those that the thread had on its core, so that other programs disturb less.

mod sparse24;

use std::cell::RefCell;
use std::hint::black_box;

use llmpress_kernels::cpu::abq::{Inputs, Matrix, quantise};
use llmpress_kernels::cpu::pages::{Room, sum};
use llmpress_kernels::cpu::{Elements, dot_rows, multiply};
use serde::{Deserialize, Serialize};

use super::abq::Codes;
use super::sparse24::Kept;
use super::{KernelOptions, KernelShape, rate_of, weights};
use crate::Rate;

/// What is measured: a name, bits of weights, columns of a group, bits of activations.
const SETTINGS: [(&str, u8, Option<usize>, Option<u8>); 6] = [
    ("abq w4a16 g128", 4, Some(128), None),
    ("abq w2a8 g128", 2, Some(128), Some(8)),
    ("abq w4a8 g128", 4, Some(128), Some(8)),
    ("abq w4a4 g128", 4, Some(128), Some(4)),
    ("abq w8a8 g64", 8, Some(64), Some(8)),
    ("abq w8a16 g64", 8, Some(64), None),
];

/// Elements of a product that are checked.
const CHECKED: usize = 50;
/// Rows of BF16 that are widened at once for several tokens.
const WIDENED: usize = 64;
/// Most copies of a matrix.
const MOST_COPIES: usize = 256;

/// One kernel on one matrix.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CpuKernelRow {
    /// The matrix.
    pub shape: String,
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
    /// Tokens.
    pub m: usize,
    /// The kernel: `bf16`, or `abq w4a8 g128` and the like. Preparing the activations is part of it. `sparse24` and the like keep two
    /// of four, whose values are BF16 or as named.
    pub kernel: String,
    /// Microseconds of a product.
    pub microseconds: Rate,
    /// Bytes of weights by the median time, GB/s.
    pub gbps: f64,
    /// That as a share of what reading alone reaches.
    pub share_of_read_ceiling: f64,
    /// The median time of BF16 in the same rounds by this one's.
    pub speed_against_bf16: f64,
    /// Whether the result was right.
    pub correct: bool,
}

/// What was measured on the processor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CpuKernelReport {
    /// The instructions that the kernels use.
    pub instructions: String,
    /// Reading alone, one thread, from memory as the matrices lie in: GB/s.
    pub read_gbps: Rate,
    /// The kernels.
    pub rows: Vec<CpuKernelRow>,
}

/// Measures the products of the calling thread.
pub fn bench_cpu_kernels(options: &KernelOptions, say: &mut dyn FnMut(&str)) -> CpuKernelReport {
    say("ceilings");
    let read_gbps = read_ceiling(options);
    let mut rows = Vec::new();
    for shape in &options.shapes {
        say(&format!("{} {} x {}", shape.name, shape.n, shape.k));
        let bench = Bench { options, shape, read: read_gbps.median };
        let dense = Dense::new(shape, options.working_set);
        for &tokens in &options.tokens {
            let x = activations(shape.k * tokens);
            rows.extend(SETTINGS.map(|setting| bench.codes(setting, &dense, &x, tokens)));
            for (name, make) in sparse24::Matrix::KERNELS {
                let of_shape =
                    || Kept::of(&dense.words[..shape.n * shape.k], shape.n, shape.k).and_then(make);
                let matrices = fill(of_shape, options.working_set);
                if !matrices.is_empty() {
                    let seen = |token| token_of(&x, tokens, token);
                    rows.push(bench.measure(name, &matrices, &dense, &x, tokens, seen));
                }
            }
        }
    }
    let instructions = llmpress_kernels::cpu::instruction_set().to_owned();
    CpuKernelReport { instructions, read_gbps, rows: with_dense(rows) }
}

/// A kernel's row, and that of BF16 in its rounds.
type Pair = (CpuKernelRow, CpuKernelRow);

/// The rows, with one of BF16 before those of each matrix and number of tokens: that of the first kernel's rounds.
fn with_dense(pairs: Vec<Pair>) -> Vec<CpuKernelRow> {
    let mut rows: Vec<CpuKernelRow> = Vec::new();
    for (row, dense) in pairs {
        if !rows.iter().any(|r| (&r.shape, r.n, r.k, r.m) == (&row.shape, row.n, row.k, row.m)) {
            rows.push(dense);
        }
        rows.push(row);
    }
    rows
}

/// GB/s of reading memory in order.
fn read_ceiling(options: &KernelOptions) -> Rate {
    let words: Vec<u64> = (0..options.working_set.div_ceil(8) as u64).collect();
    let words = Room::of(&words);
    let seconds = rounds(options.runs, || _ = black_box(sum(black_box(&words))));
    rate_of(Rate::of(seconds), |seconds| words.len() as f64 * 8.0 / seconds / 1e9)
}

struct Bench<'a> {
    options: &'a KernelOptions,
    shape: &'a KernelShape,
    read: f64,
}

/// A product that is measured.
trait Kernel {
    /// Bytes of the weights.
    fn bytes(&self) -> usize;

    /// A row's weights.
    fn row(&self, row: usize) -> Vec<f32>;

    /// Makes it; whether the matrix is a right one.
    fn multiply(&self, x: &[f32], tokens: usize, widened: &mut Vec<f32>, out: &mut [f32]) -> bool;
}

/// Codes, with what they make of activations.
struct OfCodes {
    matrix: Matrix,
    inputs: RefCell<Inputs>,
}

impl Kernel for OfCodes {
    fn bytes(&self) -> usize {
        self.matrix.bytes()
    }

    fn row(&self, row: usize) -> Vec<f32> {
        let mut out = vec![0.0; self.matrix.cols()];
        self.matrix.row(row, &mut out);
        out
    }

    fn multiply(&self, x: &[f32], tokens: usize, _widened: &mut Vec<f32>, out: &mut [f32]) -> bool {
        let inputs = &mut *self.inputs.borrow_mut();
        let prepared = self.matrix.prepare(black_box(x), tokens, inputs).is_ok();
        if prepared {
            self.matrix.multiply(0..self.matrix.rows(), inputs, black_box(out));
        }
        prepared
    }
}

/// As many copies as fill the working set; none where there is no such kernel of the shape.
fn fill<K: Kernel>(make: impl Fn() -> Option<K>, working_set: usize) -> Vec<K> {
    let Some(first) = make() else { return Vec::new() };
    let more = copies(first.bytes(), working_set) - 1;
    std::iter::once(first).chain((0..more).filter_map(|_| make())).collect()
}

impl Bench<'_> {
    fn codes(
        &self,
        (name, bits, group, activation): (&str, u8, Option<usize>, Option<u8>),
        dense: &Dense,
        x: &[f32],
        tokens: usize,
    ) -> Pair {
        let codes = Codes::new(self.shape.n, self.shape.k, bits, group, activation);
        // The sizes are made for the shape: there is nothing to refuse.
        let make =
            || Some(OfCodes { matrix: Matrix::new(&codes.stored()).ok()?, inputs: RefCell::default() });
        let copies = fill(make, self.options.working_set);
        self.measure(name, &copies, dense, x, tokens, |token| seen(activation, x, tokens, token))
    }

    /// Measures copies of a matrix. `seen`: a token's activations as they are multiplied.
    fn measure<K: Kernel>(
        &self,
        name: &str,
        copies: &[K],
        dense: &Dense,
        x: &[f32],
        tokens: usize,
        seen: impl Fn(usize) -> Vec<f32>,
    ) -> Pair {
        let mut out = vec![0.0; self.shape.n * tokens];
        let (mut seconds, mut of_dense) = (Vec::new(), Vec::new());
        let (mut widened, mut correct) = (Vec::new(), true);
        for _ in 0..self.options.runs.max(1) {
            of_dense.extend(
                rounds(1, || dense.multiply_all(x, tokens, &mut widened, &mut out)).map_of(dense.copies),
            );
            let one = rounds(1, || {
                for matrix in copies {
                    correct &= matrix.multiply(x, tokens, &mut widened, &mut out);
                }
            });
            seconds.extend(one.map_of(copies.len()));
        }
        let first = copies.first();
        correct &= first.is_some_and(|first| near(self.shape.n, tokens, |n| first.row(n), seen, &out));
        let bytes = first.map_or(0, K::bytes);
        dense.multiply_all(x, tokens, &mut widened, &mut out);
        let dense_correct = dense.right(x, tokens, &out);
        let (time, dense_time) = (Rate::of(seconds), Rate::of(of_dense));
        let against = dense_time.median / time.median;
        (
            self.row(name, tokens, time, bytes, against, correct),
            self.row("bf16", tokens, dense_time, dense.bytes(), 1.0, dense_correct),
        )
    }

    fn row(
        &self,
        kernel: &str,
        m: usize,
        seconds: Rate,
        bytes: usize,
        against: f64,
        correct: bool,
    ) -> CpuKernelRow {
        let gbps = bytes as f64 / seconds.median / 1e9;
        CpuKernelRow {
            shape: self.shape.name.clone(),
            n: self.shape.n,
            k: self.shape.k,
            m,
            kernel: kernel.to_owned(),
            microseconds: Rate {
                median: seconds.median * 1e6,
                min: seconds.min * 1e6,
                max: seconds.max * 1e6,
            },
            gbps,
            share_of_read_ceiling: gbps / self.read,
            speed_against_bf16: against,
            correct,
        }
    }
}

/// Seconds on the core, round by round.
fn rounds(count: usize, mut work: impl FnMut()) -> Vec<f64> {
    let now = || {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
    };
    (0..count.max(1))
        .map(|_| {
            let start = now();
            work();
            now() - start
        })
        .collect()
}

/// Seconds of one among so many.
trait MapOf {
    fn map_of(self, count: usize) -> Self;
}

impl MapOf for Vec<f64> {
    fn map_of(self, count: usize) -> Self {
        self.into_iter().map(|seconds| seconds / count.max(1) as f64).collect()
    }
}

/// How many copies of so many bytes fill the working set.
fn copies(bytes: usize, working_set: usize) -> usize {
    working_set.div_ceil(bytes.max(1)).clamp(1, MOST_COPIES)
}

fn activations(count: usize) -> Vec<f32> {
    (0..count).map(|i| (i.wrapping_mul(2_654_435_761) % 2001) as f32 / 1000.0 - 1.0).collect()
}

/// A matrix in BF16, in ordinary pages, as mapped files lie.
struct Dense {
    n: usize,
    k: usize,
    copies: usize,
    words: Vec<u16>,
}

impl Dense {
    fn new(shape: &KernelShape, working_set: usize) -> Self {
        let one = weights(shape.n * shape.k, 1);
        let copies = copies(2 * one.len(), working_set);
        Self { n: shape.n, k: shape.k, copies, words: one.repeat(copies) }
    }

    fn bytes(&self) -> usize {
        2 * self.n * self.k
    }

    /// By every copy, one after the other.
    fn multiply_all(&self, x: &[f32], tokens: usize, widened: &mut Vec<f32>, out: &mut [f32]) {
        for words in self.words.chunks_exact((self.n * self.k).max(1)) {
            if tokens == 1 {
                dot_rows(Elements::Bf16(words), self.k, black_box(x), black_box(out));
                continue;
            }
            for (words, out) in words.chunks(WIDENED * self.k).zip(out.chunks_mut(WIDENED * tokens)) {
                widened.resize(words.len(), 0.0);
                Elements::Bf16(words).widen(0, widened);
                multiply(widened, self.k, black_box(x), tokens, black_box(out));
            }
        }
    }

    fn right(&self, x: &[f32], tokens: usize, out: &[f32]) -> bool {
        let row = |n: usize| -> Vec<f32> {
            let words = &self.words[n * self.k..][..self.k];
            words.iter().map(|word| half::bf16::from_bits(*word).to_f32()).collect()
        };
        near(self.n, tokens, row, |token| token_of(x, tokens, token), out)
    }
}

/// A token's activations, quantised where that is asked for.
fn seen(activation: Option<u8>, x: &[f32], tokens: usize, token: usize) -> Vec<f32> {
    let values = token_of(x, tokens, token);
    let Some(bits) = activation else { return values };
    let mut codes = vec![0; values.len()];
    let Ok(grid) = quantise(&values, bits, &mut codes) else { return values };
    codes.iter().map(|code| grid.step * f32::from(i16::from(*code) - i16::from(grid.zero))).collect()
}

fn token_of(x: &[f32], tokens: usize, token: usize) -> Vec<f32> {
    x.iter().skip(token).step_by(tokens).copied().collect()
}

fn near(
    rows: usize,
    tokens: usize,
    row: impl Fn(usize) -> Vec<f32>,
    seen: impl Fn(usize) -> Vec<f32>,
    out: &[f32],
) -> bool {
    (0..CHECKED.min(rows * tokens)).all(|i| {
        let (token, n) = (i * 31 % tokens, i * 7919 % rows);
        let (mut sum, mut size) = (0.0f64, 0.0f64);
        for (w, x) in row(n).into_iter().zip(seen(token)) {
            sum += f64::from(w) * f64::from(x);
            size += (f64::from(w) * f64::from(x)).abs();
        }
        // Offsets and scaled codes are added apart: their sizes are several times those of the weights.
        (f64::from(out[n * tokens + token]) - sum).abs() <= 1e-4 * size + 1e-20
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_wrong_result_is_found() {
        let (n, k, tokens) = (40, 96, 3);
        let x = activations(k * tokens);
        for (_, bits, group, activation) in SETTINGS {
            let codes = Codes::new(n, k, bits, group, activation);
            let matrix = Matrix::new(&codes.stored()).unwrap();
            found_wrong(&OfCodes { matrix, inputs: RefCell::default() }, activation, &x, tokens, n);
        }
        for (_, make) in sparse24::Matrix::KERNELS {
            let kept = Kept::of(&weights(n * k, 1), n, k).unwrap();
            found_wrong(&make(kept).unwrap(), None, &x, tokens, n);
        }
    }

    fn found_wrong(kernel: &impl Kernel, activation: Option<u8>, x: &[f32], tokens: usize, n: usize) {
        let mut out = vec![0.0; n * tokens];
        assert!(kernel.multiply(x, tokens, &mut Vec::new(), &mut out));
        let right =
            |out: &[f32]| near(n, tokens, |n| kernel.row(n), |token| seen(activation, x, tokens, token), out);
        assert!(right(&out));
        out.iter_mut().for_each(|y| *y *= 1.001);
        assert!(!right(&out));
    }
}
