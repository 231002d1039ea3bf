//! Products with weights of 1 to 8 bits: with quantised activations the bits of the definition; with activations in BF16 near it,
//! and the same bits from every variant.

use super::numbers::Numbers;
use super::{Court, Result};
use crate::cpu::Elements;
use crate::cpu::abq::{Stored, Zero};
use crate::gpu::abq::{Matrix, Variant, Weights, integer, product_in, reference, variants};
use crate::gpu::product::{Product, Workspace};
use crate::gpu::reference::widen;

/// What the sums of a tensor core may be off by, as a share of the sum of the terms' sizes.
const PRECISION: f32 = 1e-5;

/// Rows, columns, tokens, bits, columns of a group, bits of activations.
const SHAPES: [(usize, usize, usize, u8, Option<usize>, u8); 17] = [
    (1, 8, 1, 1, None, 8),
    (39, 600, 5, 4, Some(128), 8),
    (150, 136, 3, 2, Some(32), 8),
    (17, 130, 19, 3, Some(96), 6),
    (33, 576, 2, 2, None, 8),
    (20, 600, 31, 5, Some(64), 5),
    (48, 256, 4, 4, Some(128), 4),
    (16, 1152, 9, 6, None, 6),
    (21, 320, 1, 7, Some(64), 3),
    (64, 384, 1, 8, Some(128), 8),
    (30, 260, 8, 1, Some(128), 1),
    (4096, 304, 3, 4, Some(32), 2),
    (16_384, 128, 7, 3, None, 7),
    (272, 4096, 64, 4, Some(128), 8),
    (4096, 4096, 1, 2, None, 8),
    (2048, 1024, 300, 4, Some(128), 8),
    (96, 14_336, 16, 8, None, 8),
];

/// A matrix of random codes.
struct Codes {
    words: Vec<u32>,
    scale: Vec<f32>,
    offset: Vec<f32>,
    zero: Vec<u8>,
}

impl Codes {
    fn new(numbers: &mut Numbers, rows: usize, cols: usize, bits: u8, group: Option<usize>) -> Self {
        let (across, groups) = (cols.div_ceil(32), group.map_or(1, |size| cols.div_ceil(size)));
        // What lies past the columns is zero.
        let kept = |word: usize| match cols - word % across * 32 {
            left @ ..32 => (1u32 << left) - 1,
            _ => u32::MAX,
        };
        let count = usize::from(bits) * rows * across;
        let words = (0..count).map(|word| (numbers.next() >> 20) as u32 & kept(word)).collect();
        Self {
            words,
            scale: (0..rows * groups).map(|_| 0.01 * numbers.float()).collect(),
            offset: (0..rows * groups).map(|_| 0.1 * numbers.float()).collect(),
            zero: (0..rows * groups).map(|_| (numbers.next() >> 30) as u8).collect(),
        }
    }
}

pub(super) fn prove(court: &mut Court<'_>) -> Result<()> {
    for (seed, (rows, cols, tokens, bits, group_size, activation_bits)) in SHAPES.into_iter().enumerate() {
        // Integers are made bit by bit there.
        if court.too_large(rows * cols * tokens * 4) {
            continue;
        }
        let mut numbers = Numbers::new(71 + seed as u64);
        let codes = Codes::new(&mut numbers, rows, cols, bits, group_size);
        let stored = Stored {
            rows,
            cols,
            bits,
            planes: bits,
            group_size,
            activation_bits: Some(activation_bits),
            words: &codes.words,
            scale: Elements::F32(&codes.scale),
            zero: match seed % 3 {
                0 => Zero::Real(Elements::F32(&codes.offset)),
                1 => Zero::Integer(&codes.zero),
                _ => Zero::Symmetric,
            },
        };
        let stride = cols.next_multiple_of(64);
        let mut x = vec![0u16; tokens * stride];
        for row in x.chunks_mut(stride) {
            row[..cols].copy_from_slice(&numbers.weights(cols, 0));
        }
        let groups = group_size.map_or("whole rows".to_owned(), |size| format!("groups of {size}"));
        let shape = format!("{rows} x {cols}, {tokens} tokens, w{bits}, {groups}");
        court.case("abq", &shape, |court| floats(court, &stored, &x, stride, tokens, &shape))?;
        let shape = format!("{shape}, a{activation_bits}");
        court.case("abq", &shape, |court| integers(court, &stored, &x, stride, tokens, &shape))?;
    }
    Ok(())
}

/// The sum of the sizes of a product's terms.
fn sizes(stored: &Stored<'_>, x: &[u16], stride: usize, tokens: usize) -> Vec<f32> {
    let group = stored.group_size.unwrap_or(stored.cols);
    let groups = stored.cols.div_ceil(group);
    let mut sizes = Vec::with_capacity(tokens * stored.rows);
    for token in x.chunks(stride).take(tokens) {
        for n in 0..stored.rows {
            let term = |k: usize| {
                let at = n * groups + k / group;
                let centre = f32::from(1u8 << (stored.bits - 1));
                let code = reference::code(stored, n, k) as f32;
                let scale = stored.scale.get(at).abs();
                let offset = match stored.zero {
                    Zero::Symmetric => 0.0,
                    Zero::Integer(zero) => scale * (centre - f32::from(zero[at])).abs(),
                    Zero::Real(offset) => scale * centre + offset.get(at).abs(),
                };
                (scale * (code - centre).abs() + offset) * widen(token[k]).abs()
            };
            sizes.push((0..stored.cols).map(term).sum::<f32>());
        }
    }
    sizes
}

fn floats(
    court: &mut Court<'_>,
    stored: &Stored<'_>,
    x: &[u16],
    stride: usize,
    tokens: usize,
    shape: &str,
) -> Result<()> {
    let gpu = court.gpu;
    let expected = reference::product(stored, x, stride, tokens)?;
    let allowed: Vec<f32> =
        sizes(stored, x, stride, tokens).into_iter().map(|size| PRECISION * size).collect();
    let matrix = Matrix::upload(gpu, stored)?;
    let (weights, x) = (Weights::all(&matrix), gpu.upload(x)?);
    // All there are where that is quick, else those that would be picked from.
    let quick = stored.rows * stored.cols * tokens < 1 << 20;
    let all = if quick { Variant::all(gpu, weights) } else { variants(gpu, weights, tokens) };
    let mut first: Option<Vec<f32>> = None;
    for variant in all {
        let kernel = format!("abq {variant}");
        court.case(&kernel, shape, |court| {
            let workspace = Workspace::new(gpu, variant.workspace_bytes(weights, tokens))?;
            let y = gpu.upload(&vec![f32::NAN; tokens * stored.rows])?;
            let operands = Product {
                x: x.view(),
                stride,
                tokens,
                y: y.view(),
                y_stride: stored.rows,
                bias: None,
                adds: false,
                workspace: Some(&workspace),
            };
            product_in(gpu, weights, &operands, variant)?;
            let found: Vec<f32> = y.view().read(tokens * stored.rows)?;
            match &first {
                None => court.near(&kernel, shape, &found, &expected, &allowed),
                Some(first) => court.same(&kernel, &format!("{shape}, as the first"), &found, first),
            }
            first.get_or_insert(found);
            Ok(())
        })?;
    }
    Ok(())
}

fn integers(
    court: &mut Court<'_>,
    stored: &Stored<'_>,
    x: &[u16],
    stride: usize,
    tokens: usize,
    shape: &str,
) -> Result<()> {
    let gpu = court.gpu;
    let wide: Vec<f32> = x.chunks(stride).flat_map(|x| x[..stored.cols].iter().map(|x| widen(*x))).collect();
    let expected = reference::integer_product(stored, &wide, u32::from(stored.activation_bits.unwrap_or(8)))?;
    let matrix = integer::Matrix::upload(gpu, stored)?;
    let (weights, x) = (integer::Weights::all(&matrix), gpu.upload(x)?);
    let quick = stored.rows * stored.cols * tokens < 1 << 18;
    let all =
        if quick { integer::Variant::all(gpu, weights) } else { integer::variants(gpu, weights, tokens) };
    for variant in all {
        let kernel = format!("abq {variant}");
        court.case(&kernel, shape, |court| {
            let workspace = Workspace::new(gpu, variant.workspace_bytes(weights, tokens))?;
            let y = gpu.upload(&vec![f32::NAN; tokens * stored.rows])?;
            let operands = Product {
                x: x.view(),
                stride,
                tokens,
                y: y.view(),
                y_stride: stored.rows,
                bias: None,
                adds: false,
                workspace: Some(&workspace),
            };
            integer::product_in(gpu, weights, &operands, &integer::Quantising::default(), variant)?;
            let found: Vec<f32> = y.view().read(tokens * stored.rows)?;
            court.same(&kernel, shape, &found, &expected);
            Ok(())
        })?;
    }
    Ok(())
}
