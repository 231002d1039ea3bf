//! Products with weights of a few bits: the same codes as often as the working set asks.

use llmpress_kernels::cpu::Elements;
use llmpress_kernels::cpu::abq::{Stored, Zero};
use llmpress_kernels::gpu::abq::{self, integer, reference};
use llmpress_kernels::gpu::product::{Product, Workspace};
use llmpress_kernels::gpu::{Gpu, Result};

use super::{Bench, F32_PRECISION, KernelShape, recorded, time};

/// What is measured: a name, bits of weights, columns of a group, bits of activations.
const SETTINGS: [(&str, u8, Option<usize>, Option<u8>); 5] = [
    ("abq w4a16 g128", 4, Some(128), None),
    ("abq w2a16 g128", 2, Some(128), None),
    ("abq w2a8", 2, None, Some(8)),
    ("abq w4a8", 4, None, Some(8)),
    ("abq w4a4", 4, None, Some(4)),
];

/// Elements of a product that are checked.
const CHECKED: usize = 100;

/// A random matrix with real zeros.
pub(super) struct Codes {
    n: usize,
    k: usize,
    bits: u8,
    group_size: Option<usize>,
    activation_bits: Option<u8>,
    words: Vec<u32>,
    scale: Vec<u16>,
    offset: Vec<u16>,
}

impl Codes {
    pub(super) fn new(
        n: usize,
        k: usize,
        bits: u8,
        group_size: Option<usize>,
        activation_bits: Option<u8>,
    ) -> Self {
        let mut state = (n * k) as u64 * 2 + 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state >> 20
        };
        let (across, groups) = (k.div_ceil(32), group_size.map_or(1, |size| k.div_ceil(size)));
        let words = (0..usize::from(bits) * n * across).map(|word| {
            let left = k - word % across * 32;
            next() as u32 & if left < 32 { (1 << left) - 1 } else { u32::MAX }
        });
        let words = words.collect();
        // Such as weights of deviation 0.02 have.
        let step = 0.1 / f32::from(1u8 << (bits - 1));
        let mut near = |x: f32| half::f16::from_f32(x * (1.0 + (next() % 100) as f32 / 1000.0)).to_bits();
        let scale = (0..n * groups).map(|_| near(step)).collect();
        let offset = (0..n * groups).map(|_| near(-0.1)).collect();
        Self { n, k, bits, group_size, activation_bits, words, scale, offset }
    }

    pub(super) fn stored(&self) -> Stored<'_> {
        Stored {
            rows: self.n,
            cols: self.k,
            bits: self.bits,
            planes: self.bits,
            group_size: self.group_size,
            activation_bits: self.activation_bits,
            words: &self.words,
            scale: Elements::F16(&self.scale),
            zero: Zero::Real(Elements::F16(&self.offset)),
        }
    }

    /// The row by itself.
    fn row(&self, n: usize) -> (Vec<u32>, Vec<u16>, Vec<u16>) {
        let (across, groups) = (self.k.div_ceil(32), self.scale.len() / self.n);
        let of_plane = |plane: usize| self.words[(plane * self.n + n) * across..][..across].iter().copied();
        let words = (0..usize::from(self.bits)).flat_map(of_plane).collect();
        let of = |values: &[u16]| values[n * groups..][..groups].to_vec();
        (words, of(&self.scale), of(&self.offset))
    }

    /// Whether some elements of `y` are right: to the bit where integers are multiplied.
    fn right(&self, x: &[u16], stride: usize, tokens: usize, y: &[f32]) -> Result<bool> {
        for i in 0..CHECKED {
            let (token, n) = (i * 31 % tokens.max(1), i * 7919 % self.n.max(1));
            let (words, scale, offset) = self.row(n);
            let stored = Stored {
                rows: 1,
                words: &words,
                scale: Elements::F16(&scale),
                zero: Zero::Real(Elements::F16(&offset)),
                ..self.stored()
            };
            let wide: Vec<f32> =
                x[token * stride..][..self.k].iter().map(|x| half::bf16::from_bits(*x).to_f32()).collect();
            let found = y[token * self.n + n];
            if let Some(bits) = self.activation_bits {
                if reference::integer_product(&stored, &wide, u32::from(bits))? != [found] {
                    return Ok(false);
                }
                continue;
            }
            let group = self.group_size.unwrap_or(self.k);
            let (mut sum, mut size) = (0.0f64, 0.0f64);
            for (k, x) in wide.iter().enumerate() {
                let half = |word: u16| f64::from(half::f16::from_bits(word).to_f32());
                let code = f64::from(reference::code(&stored, 0, k));
                let (scale, offset) = (half(scale[k / group]), half(offset[k / group]));
                sum += (scale * code + offset) * f64::from(*x);
                size += (scale * code + offset.abs()) * f64::from(x.abs());
            }
            if (f64::from(found) - sum).abs() > F32_PRECISION * size {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// A matrix on the device, as often as it takes.
enum Copies {
    Floats(Vec<abq::Matrix>),
    Integers(Vec<integer::Matrix>),
}

/// Copies of a setting.
pub(super) struct Measured {
    name: &'static str,
    codes: Codes,
    copies: Copies,
}

/// All settings of a shape.
pub(super) fn copies(gpu: &Gpu, shape: &KernelShape, working_set: usize) -> Result<Vec<Measured>> {
    let one = |(name, bits, group_size, activation_bits): (&'static str, u8, Option<usize>, Option<u8>)| {
        let codes = Codes::new(shape.n, shape.k, bits, group_size, activation_bits);
        let more = |bytes: usize| 1..working_set.div_ceil(bytes.max(1)).clamp(1, 64);
        let copies = if activation_bits.is_some() {
            let mut copies = vec![integer::Matrix::upload(gpu, &codes.stored())?];
            for _ in more(copies[0].bytes()) {
                copies.push(copies[0].duplicate(gpu)?);
            }
            Copies::Integers(copies)
        } else {
            let mut copies = vec![abq::Matrix::upload(gpu, &codes.stored())?];
            for _ in more(copies[0].bytes()) {
                copies.push(copies[0].duplicate(gpu)?);
            }
            Copies::Floats(copies)
        };
        Ok(Measured { name, codes, copies })
    };
    SETTINGS.into_iter().map(one).collect()
}

/// What products are measured with besides the weights.
pub(super) struct Inputs<'a> {
    pub(super) x: &'a [u16],
    pub(super) operands: Product<'a>,
}

impl Bench<'_> {
    /// Every setting by every variant that suits; quantising counts.
    pub(super) fn abq_products(
        &mut self,
        shape: &KernelShape,
        all: &[Measured],
        inputs: &Inputs<'_>,
    ) -> Result<()> {
        for measured in all {
            let gpu = self.gpu;
            let (tokens, n, k) = (inputs.operands.tokens, shape.n, shape.k);
            let (bytes, launches, needed): (usize, Vec<Launches<'_>>, usize) = match &measured.copies {
                Copies::Floats(copies) => {
                    let weights = abq::Weights::all(&copies[0]);
                    let variants = abq::variants(gpu, weights, tokens);
                    let most = variants.iter().map(|v| v.workspace_bytes(weights, tokens)).max();
                    let all = variants.into_iter().map(|v| Launches::Floats(copies, v)).collect();
                    (weights.bytes(), all, most.unwrap_or(0))
                }
                Copies::Integers(copies) => {
                    let weights = integer::Weights::all(&copies[0]);
                    let variants = integer::variants(gpu, weights, tokens);
                    let most = variants.iter().map(|v| v.workspace_bytes(weights, tokens)).max();
                    let all = variants.into_iter().map(|v| Launches::Integers(copies, v)).collect();
                    (weights.bytes(), all, most.unwrap_or(0))
                }
            };
            let workspace = Workspace::new(gpu, needed)?;
            let operands = Product { workspace: Some(&workspace), ..inputs.operands };
            let (mut best, mut tried, mut correct) = (None, Vec::new(), true);
            let mut first: Option<Vec<u32>> = None;
            for launches in &launches {
                let mut graph = recorded(gpu, || launches.run(gpu, &operands))?;
                let seconds = time(gpu, &mut *graph, launches.count(), self.options.runs)?;
                let found: Vec<f32> = operands.y.read(tokens * n)?;
                // The same bits from every variant.
                let bits: Vec<u32> = found.iter().map(|x| x.to_bits()).collect();
                if first.is_none() {
                    correct &= measured.codes.right(inputs.x, operands.stride, tokens, &found)?;
                }
                correct &= *first.get_or_insert_with(|| bits.clone()) == bits;
                tried.push((launches.block(), seconds.median * 1e6));
                if best.as_ref().is_none_or(|(rate, _): &(crate::Rate, String)| seconds.median < rate.median)
                {
                    best = Some((seconds, launches.block()));
                }
            }
            if let Some((seconds, block)) = best {
                let moved = 2 * tokens * k + 4 * tokens * n;
                self.row(shape, tokens, measured.name, seconds, bytes + moved, correct);
                if let Some(row) = self.rows.last_mut() {
                    (row.block, row.tried) = (Some(block), tried);
                }
            }
        }
        Ok(())
    }
}

/// A launch for each copy.
enum Launches<'a> {
    Floats(&'a [abq::Matrix], abq::Variant),
    Integers(&'a [integer::Matrix], integer::Variant),
}

impl Launches<'_> {
    fn run(&self, gpu: &Gpu, operands: &Product<'_>) -> Result<()> {
        match self {
            Self::Floats(copies, variant) => copies
                .iter()
                .try_for_each(|matrix| abq::product_in(gpu, abq::Weights::all(matrix), operands, *variant)),
            Self::Integers(copies, variant) => copies.iter().try_for_each(|matrix| {
                let quantising = integer::Quantising::default();
                integer::product_in(gpu, integer::Weights::all(matrix), operands, &quantising, *variant)
            }),
        }
    }

    fn count(&self) -> usize {
        match self {
            Self::Floats(copies, _) => copies.len(),
            Self::Integers(copies, _) => copies.len(),
        }
    }

    fn block(&self) -> String {
        match self {
            Self::Floats(_, variant) => variant.to_string(),
            Self::Integers(_, variant) => variant.to_string(),
        }
    }
}
