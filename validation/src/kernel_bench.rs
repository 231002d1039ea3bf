//! Kernels of a GPU against its own limits and against cuBLAS, side by side in one run.
//!
//! ```text
//! a graph of launches over copies of a weight that exceed the cache together:   every launch finds it cold
//! time of a launch = time of the graph / launches;   median and range over replays
//! ```

mod abq;
mod cpu;
mod sparse24;

pub use cpu::{CpuKernelReport, CpuKernelRow, bench_cpu_kernels};
use llmpress_entropy::dfloat11;
use llmpress_kernels::gpu::cublas::{Cublas, Output};
use llmpress_kernels::gpu::dense::{self, row_stride};
use llmpress_kernels::gpu::dfloat11::{Components, Unit};
use llmpress_kernels::gpu::fixed12::Matrix;
use llmpress_kernels::gpu::product::{Product, Variant, Weights, Workspace, product_in, variants};
use llmpress_kernels::gpu::{Buffer, Error, Gpu, Graph, Result, ceiling};
use llmpress_numbers::Numbers;
use serde::{Deserialize, Serialize};

use crate::Rate;

/// A matrix to measure on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KernelShape {
    /// What it is in a model.
    pub name: String,
    /// Output features.
    pub n: usize,
    /// Input features: a multiple of 8.
    pub k: usize,
}

/// What is measured.
#[derive(Clone, Debug)]
pub struct KernelOptions {
    /// The matrices.
    pub shapes: Vec<KernelShape>,
    /// Numbers of tokens.
    pub tokens: Vec<usize>,
    /// Replays of each graph.
    pub runs: usize,
    /// Bytes that the copies of a weight take together at least: several times the cache.
    pub working_set: usize,
}

/// The limits of the device, measured in the same run: GB/s.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ceilings {
    /// Reading alone.
    pub read_gbps: Rate,
    /// Copying: bytes read and written.
    pub copy_gbps: Rate,
}

/// One kernel on one matrix.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KernelRow {
    /// The matrix.
    pub shape: String,
    /// Output and input features, and tokens (0: decoding alone).
    pub n: usize,
    /// Input features.
    pub k: usize,
    /// Tokens.
    pub m: usize,
    /// The kernel: `cublas` (writes BF16, as models run it), `cublas to f32` (writes F32, as ours do), `dense`, `fixed12`,
    /// `decode fixed12`, `decode dfloat11`; `sparse24` and `sparse24 fixed12`, which keep the larger two of four; `abq w4a16 g128` and the like, of which those with fewer than 16 bits of activations
    /// quantise them, too.
    pub kernel: String,
    /// The shape of block that was the fastest, where there are several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub block: Option<String>,
    /// All shapes of block that were tried, with the median microseconds of each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tried: Vec<(String, f64)>,
    /// Microseconds of a launch.
    pub microseconds: Rate,
    /// Bytes read and written by the median time, GB/s.
    pub gbps: f64,
    /// That as a share of the read ceiling.
    pub share_of_read_ceiling: f64,
    /// cuBLAS's median time, writing BF16, by this one's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub speed_against_cublas: Option<f64>,
    /// Whether the result was right.
    pub correct: bool,
}

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KernelReport {
    /// The limits.
    pub ceilings: Ceilings,
    /// Why cuBLAS was not measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_cublas: Option<String>,
    /// The kernels.
    pub rows: Vec<KernelRow>,
}

/// Weights like a trained model's: a normal distribution of standard deviation 0.02, in BF16.
fn weights(count: usize, seed: u64) -> Vec<u16> {
    let mut numbers = Numbers::new(seed);
    (0..count)
        .map(|_| {
            // The sum of twelve uniform numbers has variance 1.
            let normal = (0..12).map(|_| numbers.share()).sum::<f32>() - 6.0;
            half::bf16::from_f32(normal * 0.02).to_bits()
        })
        .collect()
}

/// Replays a graph of `launches` launches; seconds of one launch.
fn time(gpu: &Gpu, graph: &mut dyn Graph, launches: usize, runs: usize) -> Result<Rate> {
    for _ in 0..2 {
        graph.replay()?;
    }
    gpu.synchronize()?;
    let mut rounds = Vec::with_capacity(runs);
    for _ in 0..runs.max(1) {
        rounds.push(gpu.backend().timed(&mut || graph.replay())? / launches as f64);
    }
    Ok(Rate::of(rounds))
}

/// Runs launches once, which loads and sets up what a recording may not, and records them.
fn recorded(gpu: &Gpu, work: impl Fn() -> Result<()>) -> Result<Box<dyn Graph>> {
    work()?;
    gpu.synchronize()?;
    gpu.capture(work)
}

fn rate_of(rate: Rate, to: impl Fn(f64) -> f64) -> Rate {
    // A longer time is a lower rate.
    let (a, b) = (to(rate.min), to(rate.max));
    Rate { median: to(rate.median), min: a.min(b), max: a.max(b) }
}

fn ceilings(gpu: &Gpu, options: &KernelOptions) -> Result<Ceilings> {
    let bytes = options.working_set.next_multiple_of(16);
    let (from, to) = (gpu.allocate(bytes)?, gpu.allocate(bytes)?);
    let sums = gpu.allocate(4 * ceiling::blocks(gpu) as usize)?;
    let mut read = recorded(gpu, || ceiling::read_all(gpu, from.view(), sums.view()))?;
    let mut copy = recorded(gpu, || from.view().copy_to(to.view()))?;
    let gbps = |bytes: usize| move |seconds: f64| bytes as f64 / seconds / 1e9;
    Ok(Ceilings {
        read_gbps: rate_of(time(gpu, &mut *read, 1, options.runs)?, gbps(bytes)),
        copy_gbps: rate_of(time(gpu, &mut *copy, 1, options.runs)?, gbps(2 * bytes)),
    })
}

/// The same weights as often as the working set asks, in each encoding.
struct Copies {
    words: Vec<u16>,
    dense: Vec<Buffer>,
    fixed12: Vec<Matrix>,
    units: Vec<Unit>,
    abq: Vec<abq::Measured>,
    sparse24: Option<sparse24::Copies>,
}

impl Copies {
    fn new(gpu: &Gpu, shape: &KernelShape, options: &KernelOptions) -> Result<Self> {
        let count = shape.n * shape.k;
        let words = weights(count, count as u64);
        // The smallest encoding sets the number.
        let copies = options.working_set.div_ceil((count * 4 / 3).max(1)).clamp(1, 64);
        let invalid = |what: String| Error::Invalid(format!("{} x {}: {what}", shape.n, shape.k));
        let encoded = dfloat11::encode(&words).map_err(|e| invalid(e.to_string()))?;
        let positions: Vec<u32> = bytemuck::pod_collect_to_vec(&encoded.output_positions);
        let components = Components {
            luts: &encoded.luts,
            encoded_exponent: &encoded.encoded_exponent,
            sign_mantissa: &encoded.sign_mantissa,
            output_positions: &positions,
            gaps: &encoded.gaps,
        };
        Ok(Self {
            dense: (0..copies)
                .map(|_| dense::upload(gpu, shape.n, shape.k, &words))
                .collect::<Result<_>>()?,
            fixed12: (0..copies)
                .map(|_| Matrix::encode(gpu, shape.n, shape.k, &words))
                .collect::<Result<_>>()?,
            units: (0..copies).map(|_| Unit::upload(gpu, &components)).collect::<Result<_>>()?,
            abq: abq::copies(gpu, shape, options.working_set)?,
            sparse24: sparse24::Copies::new(gpu, &words, shape, options.working_set)?,
            words,
        })
    }
}

/// Measures the kernels. `say` is told what comes next.
///
/// # Errors
/// Not so much memory; the driver's own.
pub fn bench_kernels(
    gpu: &Gpu,
    cublas: Result<Cublas>,
    options: &KernelOptions,
    say: &mut dyn FnMut(&str),
) -> Result<KernelReport> {
    say("ceilings");
    let ceilings = ceilings(gpu, options)?;
    let (cublas, no_cublas) = match cublas {
        Ok(mut cublas) => {
            cublas.take_workspace(gpu)?;
            (Some(cublas), None)
        }
        Err(error) => (None, Some(error.to_string())),
    };
    let mut bench = Bench { gpu, options, cublas, ceilings, rows: Vec::new() };
    for shape in &options.shapes {
        say(&format!("{} {} x {}", shape.name, shape.n, shape.k));
        let copies = Copies::new(gpu, shape, options)?;
        bench.decoders(shape, &copies)?;
        for &tokens in &options.tokens {
            bench.products(shape, &copies, tokens)?;
        }
    }
    Ok(KernelReport { ceilings, no_cublas, rows: bench.rows })
}

struct Bench<'a> {
    gpu: &'a Gpu,
    options: &'a KernelOptions,
    cublas: Option<Cublas>,
    ceilings: Ceilings,
    rows: Vec<KernelRow>,
}

impl Bench<'_> {
    fn row(
        &mut self,
        shape: &KernelShape,
        m: usize,
        kernel: &str,
        seconds: Rate,
        bytes: usize,
        correct: bool,
    ) {
        let gbps = bytes as f64 / seconds.median / 1e9;
        self.rows.push(KernelRow {
            shape: shape.name.clone(),
            n: shape.n,
            k: shape.k,
            m,
            kernel: kernel.to_owned(),
            block: None,
            tried: Vec::new(),
            microseconds: rate_of(seconds, |s| s * 1e6),
            gbps,
            share_of_read_ceiling: gbps / self.ceilings.read_gbps.median,
            speed_against_cublas: None,
            correct,
        });
    }

    fn decoders(&mut self, shape: &KernelShape, copies: &Copies) -> Result<()> {
        let gpu = self.gpu;
        let bytes = 2 * shape.n * shape.k;
        // As many outputs as copies: what is written must not stay in the cache either.
        let outputs = copies.dense.iter().map(|_| gpu.allocate(bytes)).collect::<Result<Vec<_>>>()?;
        let right = |output: &Buffer| Ok(output.view().read::<u16>(copies.words.len())? == copies.words);
        let mut graph = recorded(gpu, || {
            copies.units.iter().zip(&outputs).try_for_each(|(unit, out)| unit.decode(gpu, out.view()))
        })?;
        let seconds = time(gpu, &mut *graph, outputs.len(), self.options.runs)?;
        let read = copies.units.first().map_or(0, Unit::bytes);
        let correct = outputs.iter().map(right).collect::<Result<Vec<_>>>()?.into_iter().all(|right| right);
        self.row(shape, 0, "decode dfloat11", seconds, read + bytes, correct);
        for output in &outputs {
            output.view().write(&vec![0u16; copies.words.len()])?;
        }
        let mut graph = recorded(gpu, || {
            copies.fixed12.iter().zip(&outputs).try_for_each(|(matrix, out)| matrix.decode(gpu, out.view()))
        })?;
        let seconds = time(gpu, &mut *graph, outputs.len(), self.options.runs)?;
        let read = copies.fixed12.first().map_or(0, Matrix::bytes);
        let correct = outputs.iter().map(right).collect::<Result<Vec<_>>>()?.into_iter().all(|right| right);
        self.row(shape, 0, "decode fixed12", seconds, read + bytes, correct);
        Ok(())
    }

    fn products(&mut self, shape: &KernelShape, copies: &Copies, tokens: usize) -> Result<()> {
        let gpu = self.gpu;
        let KernelShape { n, k, .. } = *shape;
        let stride = k.next_multiple_of(64);
        let mut x = vec![0u16; tokens * stride];
        for (row, values) in x.chunks_mut(stride).zip(weights(tokens * k, 3).chunks(k)) {
            row[..k].copy_from_slice(values);
        }
        let x_buffer = gpu.upload(&x)?;
        let y = gpu.allocate(4 * tokens * n)?;
        let reference = Sample::new(&copies.words, n, k, &x, stride, tokens);
        let dense: Vec<Weights<'_>> = copies.dense.iter().map(|b| Weights::dense(b.view(), n, k)).collect();
        let encoded: Vec<Weights<'_>> = copies.fixed12.iter().map(Weights::fixed12).collect();
        let needed = dense.iter().chain(&encoded).map(|w| w.workspace_bytes(gpu, tokens)).max().unwrap_or(0);
        let workspace = Workspace::new(gpu, needed)?;
        let operands = Product {
            x: x_buffer.view(),
            stride,
            tokens,
            y: y.view(),
            y_stride: n,
            bias: None,
            adds: false,
            workspace: Some(&workspace),
        };
        let mut cublas_seconds = None;
        if let Some(cublas) = &self.cublas {
            let mut measured = Vec::new();
            for output in [Output::Bf16, Output::F32] {
                let run = |words: &Buffer| {
                    let (w, x) = (words.view(), x_buffer.view());
                    cublas.product(w, x, y.view(), output, n, row_stride(k), tokens, stride)
                };
                let mut graph = recorded(gpu, || copies.dense.iter().try_for_each(run))?;
                let seconds = time(gpu, &mut *graph, copies.dense.len(), self.options.runs)?;
                let (found, precision): (Vec<f32>, f64) = match output {
                    Output::F32 => (y.view().read(tokens * n)?, F32_PRECISION),
                    Output::Bf16 => {
                        let words: Vec<u16> = y.view().read(tokens * n)?;
                        (
                            words.into_iter().map(|w| half::bf16::from_bits(w).to_f32()).collect(),
                            BF16_PRECISION,
                        )
                    }
                };
                measured.push((output, seconds, reference.near(&found, precision)));
            }
            for (output, seconds, correct) in measured {
                let (name, each) = match output {
                    Output::Bf16 => ("cublas", 2),
                    Output::F32 => ("cublas to f32", 4),
                };
                if output == Output::Bf16 {
                    cublas_seconds = Some(seconds.median);
                }
                let moved = 2 * tokens * k + each * tokens * n;
                self.row(shape, tokens, name, seconds, 2 * n * k + moved, correct);
            }
        }
        let mut first = None;
        for (kernel, weights) in [("dense", dense), ("fixed12", encoded)] {
            self.variants(shape, kernel, &weights, &operands, &reference, &mut first)?;
        }
        let operands = Product { workspace: None, ..operands };
        if let Some(copies) = &copies.sparse24 {
            self.sparse_products(shape, copies, (&x, stride), operands)?;
        }
        self.abq_products(shape, &copies.abq, &abq::Inputs { x: &x, operands })?;
        if let Some(cublas) = cublas_seconds {
            for row in self.rows.iter_mut().filter(|row| (row.n, row.k, row.m) == (n, k, tokens)) {
                row.speed_against_cublas = Some(cublas * 1e6 / row.microseconds.median);
            }
        }
        Ok(())
    }
}

impl Bench<'_> {
    /// A row of the fastest way to make a product; each is tried. `first`: the bits of those before, which are the same from every variant
    /// and every encoding.
    fn variants(
        &mut self,
        shape: &KernelShape,
        kernel: &str,
        weights: &[Weights<'_>],
        operands: &Product<'_>,
        reference: &Sample,
        first: &mut Option<Vec<u32>>,
    ) -> Result<()> {
        let (gpu, tokens) = (self.gpu, operands.tokens);
        let mut best: Option<(Rate, Variant)> = None;
        let (mut tried, mut correct) = (Vec::new(), true);
        for variant in weights.first().map_or_else(Vec::new, |w| variants(gpu, *w, tokens)) {
            let launches = || weights.iter().try_for_each(|w| product_in(gpu, *w, operands, variant));
            let mut graph = recorded(gpu, launches)?;
            let seconds = time(gpu, &mut *graph, weights.len(), self.options.runs)?;
            let found: Vec<f32> = operands.y.read(tokens * shape.n)?;
            correct &= reference.near(&found, F32_PRECISION);
            let bits: Vec<u32> = found.iter().map(|x| x.to_bits()).collect();
            correct &= *first.get_or_insert_with(|| bits.clone()) == bits;
            tried.push((variant.to_string(), seconds.median * 1e6));
            if best.is_none_or(|(rate, _)| seconds.median < rate.median) {
                best = Some((seconds, variant));
            }
        }
        if let Some((seconds, variant)) = best {
            let read = weights.first().map_or(0, Weights::bytes);
            let moved = 2 * tokens * shape.k + 4 * tokens * shape.n;
            self.row(shape, tokens, kernel, seconds, read + moved, correct);
            if let Some(row) = self.rows.last_mut() {
                row.block = Some(variant.to_string());
                row.tried = tried;
            }
        }
        Ok(())
    }
}

/// What sums in F32 may be off by, as a share of the sum of the terms' sizes.
const F32_PRECISION: f64 = 1e-5;
/// The same, where the result is rounded to BF16 besides.
const BF16_PRECISION: f64 = 1.1e-5;

/// Some elements of a product in double precision.
struct Sample {
    elements: Vec<(usize, f64, f64)>,
}

impl Sample {
    fn new(words: &[u16], n: usize, k: usize, x: &[u16], stride: usize, tokens: usize) -> Self {
        let wide = |word: u16| f64::from(half::bf16::from_bits(word).to_f32());
        let elements = (0..200)
            .map(|i| {
                let (token, row) = (i * 31 % tokens.max(1), i * 7919 % n.max(1));
                let terms = (0..k).map(|j| wide(words[row * k + j]) * wide(x[token * stride + j]));
                let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), t| (sum + t, size + t.abs()));
                (token * n + row, sum, size)
            })
            .collect();
        Self { elements }
    }

    /// Whether a product is right but for the rounding of its sums.
    fn near(&self, y: &[f32], precision: f64) -> bool {
        self.elements.iter().all(|&(at, sum, size)| {
            let rounding = if precision == BF16_PRECISION { sum.abs() / 256.0 } else { 0.0 };
            (f64::from(y[at]) - sum).abs() <= precision * size + rounding
        })
    }
}
