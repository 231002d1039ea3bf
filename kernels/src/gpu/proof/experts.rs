//! Experts: choices and groups to the bit, products as those of each expert by itself.

use half::f16;

use super::numbers::Numbers;
use super::{Court, Result};
use crate::gpu::dense::{self, Element};
use crate::gpu::experts::{
    ExpertProduct, ExpertWeights, Plan, Routing, Width, combine, group, product, route,
};
use crate::gpu::fixed12::{Encoded, ExpertMatrix, ExpertPile};
use crate::gpu::{Buffer, Gpu, reference};

/// What the sums of a tensor core may be off by, as a share of the sum of the terms' sizes.
const PRECISION: f32 = 1e-5;

/// Experts, choices of a token, tokens, rows, columns.
const SHAPES: [(usize, usize, usize, usize, usize); 5] = [
    (4, 2, 1, 20, 72),
    (8, 2, 37, 40, 136),
    (3, 3, 70, 17, 64),
    (128, 8, 1, 1536, 2048),
    (8, 2, 512, 512, 1024),
];

pub(super) fn prove(court: &mut Court<'_>) -> Result<()> {
    for (seed, (experts, top_k, tokens, rows, cols)) in SHAPES.into_iter().enumerate() {
        if court.too_large(3 * tokens * top_k * rows * cols) {
            continue;
        }
        let routing = Routing { experts, top_k, normalise: seed % 2 == 0 };
        let shape = format!("{tokens} tokens, {top_k} of {experts} experts of {rows} x {cols}");
        court
            .case("experts", &shape, |court| one(court, routing, tokens, rows, cols, &shape, seed as u64))?;
    }
    Ok(())
}

fn one(
    court: &mut Court<'_>,
    routing: Routing,
    tokens: usize,
    rows: usize,
    cols: usize,
    shape: &str,
    seed: u64,
) -> Result<()> {
    let gpu = court.gpu;
    let mut numbers = Numbers::new(400 + seed);
    let logits = numbers.floats(tokens * routing.experts, 0);
    let buffers = routing.bytes(tokens).into_iter().map(|bytes| gpu.allocate(bytes));
    let buffers: Vec<Buffer> = buffers.collect::<Result<_>>()?;
    let plan = Plan {
        chosen: buffers[0].view(),
        weights: buffers[1].view(),
        slots: buffers[2].view(),
        jobs: buffers[3].view(),
        counts: buffers[4].view(),
    };
    route(gpu, routing, gpu.upload(&logits)?.view(), tokens, &plan)?;
    let expected: Vec<(usize, f32)> = logits
        .chunks(routing.experts)
        .flat_map(|row| reference::route(row, routing.top_k, routing.normalise))
        .collect();
    let chosen: Vec<u32> = expected.iter().map(|(expert, _)| *expert as u32).collect();
    let shares: Vec<f32> = expected.iter().map(|(_, weight)| *weight).collect();
    let slots = routing.slots(tokens);
    court.same("route_tokens", shape, &plan.chosen.read::<u32>(slots)?, &chosen);
    court.same("route_tokens", &format!("weights, {shape}"), &plan.weights.read::<f32>(slots)?, &shares);
    let mut order: Vec<u32> = (0..slots as u32).collect();
    order.sort_by_key(|slot| chosen[*slot as usize]);

    let (x_rows, stride) = (numbers.weights(tokens * cols, 0), cols.next_multiple_of(64));
    let mut x = vec![0u16; tokens * stride];
    x.chunks_mut(stride).zip(x_rows.chunks(cols)).for_each(|(to, from)| to[..cols].copy_from_slice(from));
    let words: Vec<Vec<u16>> = (0..routing.experts).map(|_| numbers.weights(rows * cols, 5)).collect();
    let x_buffer = gpu.upload(&x)?;
    for (name, kind) in
        [("bf16", Kind::Bf16), ("fixed12", Kind::Fixed12), ("f16", Kind::F16), ("f32", Kind::F32)]
    {
        let table = Table::new(gpu, kind, rows, cols, &words)?;
        let weights = table.weights(rows, cols);
        let mut first: Option<Vec<f32>> = None;
        for width in Width::ALL {
            group(gpu, routing, tokens, width, &plan)?;
            court.same(
                "group_tokens",
                &format!("{width:?}, {shape}"),
                &plan.slots.read::<u32>(slots)?,
                &order,
            );
            if !weights.fits(gpu, width) {
                continue;
            }
            let y = gpu.allocate(4 * slots * rows)?;
            let operands = ExpertProduct {
                x: x_buffer.view(),
                stride,
                by_slot: false,
                tokens,
                y: y.view(),
                y_stride: rows,
            };
            product(gpu, routing, weights, &operands, width, &plan)?;
            let found: Vec<f32> = y.view().read(slots * rows)?;
            let kernel = format!("experts {name} {width:?}");
            match &first {
                Some(first) => court.same(&kernel, &format!("{shape}, as the first"), &found, first),
                None => {
                    let each = |slot: usize, sizes: bool| {
                        let x = &x[slot / routing.top_k * stride..][..stride];
                        kind.reference(&words[chosen[slot] as usize], rows, cols, x, sizes)
                    };
                    let expected: Vec<f32> = (0..slots).flat_map(|slot| each(slot, false)).collect();
                    let sizes = (0..slots).flat_map(|slot| each(slot, true));
                    let allowed: Vec<f32> = sizes.map(|size| PRECISION * size).collect();
                    court.near(&kernel, shape, &found, &expected, &allowed);
                    first = Some(found);
                }
            }
        }
        let Some(y) = first else { continue };
        let h = numbers.floats(tokens * rows, 0);
        let (y_buffer, h_buffer) = (gpu.upload(&y)?, gpu.upload(&h)?);
        combine(gpu, routing, y_buffer.view(), rows, tokens, &plan, h_buffer.view())?;
        let sum = |at: usize| {
            let (token, i) = (at / rows, at % rows);
            let slots = token * routing.top_k..(token + 1) * routing.top_k;
            h[at] + slots.fold(0.0, |sum, slot| sum + shares[slot] * y[slot * rows + i])
        };
        let expected: Vec<f32> = (0..h.len()).map(sum).collect();
        court.same("combine_experts", shape, &h_buffer.view().read::<f32>(h.len())?, &expected);
    }
    Ok(())
}

/// How the weights of a proof lie.
#[derive(Clone, Copy)]
enum Kind {
    Bf16,
    F16,
    F32,
    Fixed12,
}

/// The weight that a word stands for: what BF16 has no room for in the lower bits of some.
fn wide(word: u16) -> f32 {
    reference::widen(word) * 1.003_906_2
}

impl Kind {
    fn reference(self, words: &[u16], rows: usize, cols: usize, x: &[u16], sizes: bool) -> Vec<f32> {
        let (words, x): (Vec<u16>, Vec<u16>) = if sizes {
            let size = |word: &u16| word & 0x7fff;
            (words.iter().map(size).collect(), x.iter().map(size).collect())
        } else {
            (words.to_vec(), x.to_vec())
        };
        let stride = x.len();
        match self {
            Self::Bf16 | Self::Fixed12 => reference::product(&words, rows, cols, &x, stride, 1),
            Self::F16 => {
                let cut = |word| reference::pieces::<2>(f16::from_f32(wide(word)).to_f32());
                reference::product_of_pieces(&words, cut, rows, cols, &x, stride, 1)
            }
            Self::F32 => {
                let cut = |word| reference::pieces::<3>(wide(word));
                reference::product_of_pieces(&words, cut, rows, cols, &x, stride, 1)
            }
        }
    }
}

/// The weights of all experts on the device.
enum Table {
    Plain(Buffer, Element, Buffer),
    Fixed12(ExpertMatrix),
}

impl Table {
    fn new(gpu: &Gpu, kind: Kind, rows: usize, cols: usize, words: &[Vec<u16>]) -> Result<Self> {
        // The last expert's first: where each one's begin is up to a table.
        let size = (rows * dense::row_stride(cols)) as u64;
        let firsts: Vec<u64> = (0..words.len() as u64).rev().map(|place| place * size).collect();
        let all = || words.iter().rev().flatten();
        let plain =
            |buffer, element| -> Result<Self> { Ok(Self::Plain(buffer, element, gpu.upload(&firsts)?)) };
        let rows_of_all = rows * words.len();
        match kind {
            Kind::Bf16 => {
                let words: Vec<u16> = all().copied().collect();
                plain(dense::upload(gpu, rows_of_all, cols, &words)?, Element::Bf16)
            }
            Kind::F16 => {
                let words: Vec<u16> = all().map(|word| f16::from_f32(wide(*word)).to_bits()).collect();
                plain(dense::upload(gpu, rows_of_all, cols, &words)?, Element::F16)
            }
            Kind::F32 => {
                let numbers: Vec<f32> = all().map(|word| wide(*word)).collect();
                plain(dense::upload(gpu, rows_of_all, cols, &numbers)?, Element::F32)
            }
            Kind::Fixed12 => {
                let mut pile = ExpertPile::new(gpu, words.len(), rows, cols)?;
                for words in words {
                    // In two parts where the first ends with a strip.
                    let above = if rows > 16 { rows / 2 / 16 * 16 } else { 0 };
                    let (top, rest) = words.split_at(above * cols);
                    if above > 0 {
                        pile.add(&Encoded::new(above, cols, top)?.part())?;
                    }
                    pile.add(&Encoded::new(rows - above, cols, rest)?.part())?;
                }
                Ok(Self::Fixed12(pile.finish(gpu)?))
            }
        }
    }

    fn weights(&self, rows: usize, cols: usize) -> ExpertWeights<'_> {
        match self {
            Self::Plain(words, element, firsts) => ExpertWeights::Dense {
                words: words.view(),
                element: *element,
                firsts: firsts.view(),
                rows,
                cols,
                whole: rows,
            },
            Self::Fixed12(matrix) => ExpertWeights::Fixed12 { matrix, whole: rows },
        }
    }
}
