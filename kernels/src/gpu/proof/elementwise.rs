//! Norms, gates, embeddings, the last steps of a token: the same bits as on the processor.

use half::f16;

use super::numbers::Numbers;
use super::{Bf16, Court, Result};
use crate::cpu::{self, Limits};
use crate::gpu::Buffer;
use crate::gpu::attention::Sequences;
use crate::gpu::block_sums::block_sums;
use crate::gpu::dense::Element;
use crate::gpu::embedding::{Gather, add_positions, embed, embed_fixed12};
use crate::gpu::fixed12::Matrix;
use crate::gpu::gate::{Activation, gate};
use crate::gpu::layer_norm::layer_norm;
use crate::gpu::reference::{self, block_sums as reference_sums, inverse_root, round, widen};
use crate::gpu::rms_norm::{add_rms_norm, rms_norm, rms_norm_rows, round_rows};
use crate::gpu::sampling::{
    DRAW_WORKSPACE_BYTES, Draw, advance, argmax, argmax_workspace_bytes, draw, soft_cap,
};

fn bf16(words: Vec<u16>) -> Vec<Bf16> {
    words.into_iter().map(Bf16).collect()
}

pub(super) fn prove(court: &mut Court<'_>) -> Result<()> {
    let mut numbers = Numbers::new(7);
    norms(court, &mut numbers)?;
    gates(court, &mut numbers)?;
    sums(court, &mut numbers)?;
    embeddings(court, &mut numbers)?;
    last_steps(court, &mut numbers)
}

fn sums(court: &mut Court<'_>, numbers: &mut Numbers) -> Result<()> {
    for (tokens, cols, block, odd) in
        [(1, 1usize, 1usize, 0), (3, 100, 16, 40), (5, 257, 32, 0), (2, 64, 100, 3), (40, 4096, 16, 0)]
    {
        let shape = format!("{tokens} x {cols} by {block}");
        let (stride, out_stride) = (cols + 3, cols.div_ceil(block).next_multiple_of(64));
        let x: Vec<u16> = numbers.floats(tokens * stride, odd).into_iter().map(round).collect();
        court.case("block_sums", &shape, |court| {
            let gpu = court.gpu;
            let (from, to) = (gpu.upload(&x)?, gpu.upload(&vec![u16::MAX; tokens * out_stride])?);
            block_sums(gpu, from.view(), stride, tokens, cols, block, to.view(), out_stride)?;
            let mut expected = Vec::with_capacity(tokens * out_stride);
            for row in x.chunks(stride) {
                expected.extend(reference_sums(&row[..cols], block));
                expected.resize(expected.len().next_multiple_of(out_stride), 0);
            }
            let found = bf16(to.view().read(tokens * out_stride)?);
            court.same("block_sums", &shape, &found, &bf16(expected));
            Ok(())
        })?;
    }
    Ok(())
}

fn norms(court: &mut Court<'_>, numbers: &mut Numbers) -> Result<()> {
    for (hidden, tokens, padding, odd) in [(1, 1, 0, 0), (257, 3, 7, 2), (600, 2, 40, 50), (4096, 5, 0, 0)] {
        let shape = format!("{tokens} x {hidden}");
        let (h, y) = (numbers.floats(tokens * hidden, odd), numbers.floats(tokens * hidden, odd));
        let weight = numbers.floats(hidden, 0);
        let ld = hidden + padding;
        court.case("rms_norm", &shape, |court| {
            let gpu = court.gpu;
            let (h_buffer, y_buffer, w) = (gpu.upload(&h)?, gpu.upload(&y)?, gpu.upload(&weight)?);
            let x = gpu.upload(&vec![u16::MAX; tokens * ld])?;
            rms_norm(gpu, h_buffer.view(), w.view(), hidden, tokens, 1e-5, x.view(), ld)?;
            add_rms_norm(gpu, y_buffer.view(), w.view(), hidden, tokens, 1e-6, h_buffer.view())?;
            let (mut normed, mut added) = (Vec::new(), Vec::new());
            for (h, y) in h.chunks(hidden).zip(y.chunks(hidden)) {
                let scale = inverse_root(h, 1e-5);
                normed.extend(h.iter().zip(&weight).map(|(x, w)| round(x * scale * w)));
                normed.extend(std::iter::repeat_n(0, padding));
                let scale = inverse_root(y, 1e-6);
                added.extend(h.iter().zip(y).zip(&weight).map(|((h, y), w)| h + y * scale * w));
            }
            let found = bf16(x.view().read(tokens * ld)?);
            court.same("rms_norm", &shape, &found, &bf16(normed));
            let found: Vec<f32> = h_buffer.view().read(tokens * hidden)?;
            court.same("add_rms_norm", &shape, &found, &added);
            Ok(())
        })?;
        court.case("layer_norm", &shape, |court| {
            let gpu = court.gpu;
            let (h_buffer, w, b) = (gpu.upload(&h)?, gpu.upload(&weight)?, gpu.upload(&y[..hidden])?);
            let padded = |row: Vec<f32>| row.into_iter().map(round).chain(std::iter::repeat_n(0, padding));
            for (name, bias) in [("layer_norm", Some(&y[..hidden])), ("layer_norm without a bias", None)] {
                let x = gpu.upload(&vec![u16::MAX; tokens * ld])?;
                let b = bias.map(|_| b.view());
                layer_norm(gpu, h_buffer.view(), w.view(), b, hidden, tokens, 1e-5, x.view(), ld)?;
                let rows = h.chunks(hidden).map(|h| reference::layer_norm(h, &weight, bias, 1e-5));
                let found = bf16(x.view().read(tokens * ld)?);
                court.same(name, &shape, &found, &bf16(rows.flat_map(padded).collect()));
            }
            let x = gpu.upload(&vec![u16::MAX; tokens * ld])?;
            round_rows(gpu, h_buffer.view(), hidden, tokens, x.view(), ld)?;
            let found = bf16(x.view().read(tokens * ld)?);
            let rounded = h.chunks(hidden).flat_map(|h| padded(h.to_vec())).collect();
            court.same("round_rows", &shape, &found, &bf16(rounded));
            Ok(())
        })?;
        court.case("rms_norm_rows", &shape, |court| {
            let gpu = court.gpu;
            // What comes after the first third of a row stays as it is.
            let (width, stride) = (hidden.div_ceil(3), hidden);
            let (rows, w) = (gpu.upload(&h)?, gpu.upload(&weight)?);
            rms_norm_rows(gpu, rows.view(), stride, w.view(), width, tokens, 1e-5)?;
            let mut expected = h.clone();
            for row in expected.chunks_mut(stride) {
                let scale = inverse_root(&row[..width], 1e-5);
                row[..width].iter_mut().zip(&weight).for_each(|(x, w)| *x = *x * scale * w);
            }
            court.same("rms_norm_rows", &shape, &rows.view().read::<f32>(tokens * hidden)?, &expected);
            Ok(())
        })?;
    }
    Ok(())
}

fn gates(court: &mut Court<'_>, numbers: &mut Numbers) -> Result<()> {
    for (name, activation, reference) in [
        ("silu_gate", Activation::Silu, cpu::silu_gate as fn(&[f32], &mut [f32])),
        ("gelu_tanh_gate", Activation::GeluTanh, cpu::gelu_tanh_gate),
    ] {
        for (inner, tokens, padding) in [(1, 1, 0), (1030, 2, 58), (14_336, 3, 0)] {
            let shape = format!("{tokens} x {inner}");
            let input = numbers.floats(tokens * 2 * inner, 20);
            let (stride, ld) = (2 * inner, inner + padding);
            court.case(name, &shape, |court| {
                let gpu = court.gpu;
                let buffer = gpu.upload(&input)?;
                let up = buffer.slice(4 * inner..buffer.bytes())?;
                let x = gpu.upload(&vec![u16::MAX; tokens * ld])?;
                gate(gpu, activation, buffer.view(), Some(up), inner, stride, tokens, x.view(), ld)?;
                let mut expected = Vec::new();
                for row in input.chunks(stride) {
                    let mut values = row[inner..].to_vec();
                    reference(&row[..inner], &mut values);
                    expected.extend(values.into_iter().map(round));
                    expected.extend(std::iter::repeat_n(0, padding));
                }
                let found = bf16(x.view().read(tokens * ld)?);
                court.same(name, &shape, &found, &bf16(expected));
                gate(gpu, activation, buffer.view(), None, inner, stride, tokens, x.view(), ld)?;
                let mut expected = Vec::new();
                for row in input.chunks(stride) {
                    let mut values = vec![1.0; inner];
                    reference(&row[..inner], &mut values);
                    expected.extend(values.into_iter().map(round));
                    expected.extend(std::iter::repeat_n(0, padding));
                }
                let found = bf16(x.view().read(tokens * ld)?);
                court.same(name, &format!("{shape}, ungated"), &found, &bf16(expected));
                Ok(())
            })?;
        }
    }
    Ok(())
}

fn embeddings(court: &mut Court<'_>, numbers: &mut Numbers) -> Result<()> {
    for (vocab, hidden, odd) in [(40, 8, 0), (45, 200, 60), (1000, 576, 3)] {
        let shape = format!("{vocab} x {hidden}");
        let words = numbers.weights(vocab * hidden, odd);
        // One is beyond the vocabulary: it reads the last row.
        let ids = [0u32, vocab as u32 - 1, 3, 3, vocab as u32 + 5];
        let row = |id: &u32| (*id as usize).min(vocab - 1) * hidden;
        let expected: Vec<f32> = ids
            .iter()
            .flat_map(|id| &words[row(id)..row(id) + hidden])
            .map(|word| widen(*word) * 3.3)
            .collect();
        court.case("embed", &shape, |court| {
            let gpu = court.gpu;
            let (table, id_buffer) = (gpu.upload(&words)?, gpu.upload(&ids)?);
            let matrix = Matrix::encode(gpu, vocab, hidden, &words)?;
            let h = gpu.allocate(4 * expected.len())?;
            let gather = Gather { ids: id_buffer.view(), tokens: ids.len(), scale: 3.3, h: h.view() };
            let mut plain = |name: &str, table: &Buffer, element, expected: &[f32]| {
                embed(gpu, table.view(), element, vocab, hidden, &gather)?;
                let found: Vec<f32> = h.view().read(expected.len())?;
                court.same(name, &shape, &found, expected);
                h.view().write(&vec![0u8; h.bytes()])
            };
            plain("embed_bf16", &table, Element::Bf16, &expected)?;
            // Any word is a number of half precision too.
            let half =
                |id: &u32| words[row(id)..row(id) + hidden].iter().map(|w| f16::from_bits(*w).to_f32() * 3.3);
            plain("embed_f16", &table, Element::F16, &ids.iter().flat_map(half).collect::<Vec<_>>())?;
            let wide: Vec<f32> = words.iter().map(|word| widen(*word) * 1.01).collect();
            let single = |id: &u32| wide[row(id)..row(id) + hidden].iter().map(|x| x * 3.3);
            plain(
                "embed_f32",
                &gpu.upload(&wide)?,
                Element::F32,
                &ids.iter().flat_map(single).collect::<Vec<_>>(),
            )?;
            embed_fixed12(gpu, &matrix, &gather)?;
            let found: Vec<f32> = h.view().read(expected.len())?;
            court.same("embed_fixed12", &shape, &found, &expected);
            // Two sequences of two tokens; the second one's last is beyond the table.
            let (rows, starts) = (30, [7u32, 29]);
            let (learned, of_sequences) = (gpu.upload(&wide[..rows * hidden])?, gpu.upload(&starts)?);
            let (positions, places) = (of_sequences.view(), of_sequences.view());
            let sequences = Sequences { count: 2, each: 2, positions, places };
            add_positions(gpu, learned.view(), rows, hidden, sequences, h.view())?;
            let found: Vec<f32> = h.view().read(4 * hidden)?;
            let at = [7, 8, 29, 29].into_iter().flat_map(|at| &wide[at * hidden..(at + 1) * hidden]);
            let expected: Vec<f32> = expected.iter().zip(at).map(|(x, p)| x + p).collect();
            court.same("add_positions", &shape, &found, &expected);
            Ok(())
        })?;
    }
    Ok(())
}

fn last_steps(court: &mut Court<'_>, numbers: &mut Numbers) -> Result<()> {
    for (vocab, odd) in [(1, 0), (37, 100), (4096, 10), (128_256, 1)] {
        let shape = format!("{vocab} logits");
        let logits = numbers.floats(vocab, odd);
        let random = numbers.next();
        court.case("argmax", &shape, |court| {
            let gpu = court.gpu;
            let (buffer, id) = (gpu.upload(&logits)?, gpu.upload(&[u32::MAX])?);
            let parts = gpu.allocate(argmax_workspace_bytes(1, vocab))?;
            argmax(gpu, buffer.view(), 1, vocab, parts.view(), id.view())?;
            let best = (0..vocab).reduce(|a, b| if logits[b] > logits[a] { b } else { a }).unwrap_or(0);
            let found: Vec<u32> = id.view().read(1)?;
            court.same("argmax", &shape, &found, &[best as u32]);
            advance(gpu, id.view(), 1, 5)?;
            let found: Vec<u32> = id.view().read(1)?;
            court.same("advance", &shape, &found, &[best as u32 + 5]);
            let random_buffer = gpu.upload(&[random])?;
            let workspace = gpu.upload(&vec![u8::MAX; DRAW_WORKSPACE_BYTES])?;
            for limits in [
                Limits { temperature: 1.0, top_k: 0, top_p: 1.0 },
                Limits { temperature: 0.7, top_k: 40, top_p: 0.9 },
                Limits { temperature: 2.0, top_k: 0, top_p: 0.5 },
            ] {
                let operands = Draw {
                    logits: buffer.view(),
                    vocab,
                    limits,
                    random: random_buffer.view(),
                    workspace: workspace.view(),
                    ids: id.view(),
                };
                draw(gpu, &operands)?;
                let found: Vec<u32> = id.view().read(1)?;
                let shape = format!("{shape}, {limits:?}");
                court.same("draw", &shape, &found, &[cpu::draw(&logits, limits, random)]);
            }
            soft_cap(gpu, buffer.view(), vocab, 30.0)?;
            let expected: Vec<f32> = logits.iter().map(|l| reference::soft_capped(*l, 30.0)).collect();
            let found: Vec<f32> = buffer.view().read(vocab)?;
            court.same("soft_cap", &shape, &found, &expected);
            Ok(())
        })?;
    }
    Ok(())
}
