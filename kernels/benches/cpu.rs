//! Speed of the processor's kernels beside the limits of the processor, measured in turn: `cargo bench -p
//! llmpress-kernels`. Words on the command line select sections by their names.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    missing_docs,
    reason = "a benchmark may stop where it stands"
)]

mod limits;

use std::hint::black_box;
use std::thread;

use llmpress_entropy::fixed12::{
    Histogram, Strips, StripsRef, TILE_CODE_BYTES, TILE_COLS, TILE_ROWS, TILE_WEIGHTS, encode_strips,
};
use llmpress_kernels::cpu::abq::{Stored, Zero};
use llmpress_kernels::cpu::{
    Elements, PANEL, Sparse24, SparseCodes, dot_fixed12, dot_rows, dot_sparse_codes, dot_sparse_fixed12,
    dot_sparse24, exp, gelu_tanh_gate, multiply, rms_norm, silu_gate, softmax,
};

use limits::{fma_peak, rate, read};

/// Rounds that count.
const ROUNDS: usize = 11;
/// Weights that no cache holds.
const STREAMED: usize = 256 << 20;
/// Rows that are widened at once and multiplied with every panel.
const BLOCK: usize = 64;
/// Panels of a prefill of 512 tokens.
const PANELS: usize = 11;

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let sections: [(&str, fn()); 6] = [
        ("multiply", panels),
        ("attention", attention),
        ("dot", single_tokens),
        ("sparse24", two_in_four),
        ("widen", widening),
        ("elementwise", elementwise),
    ];
    for (name, section) in sections {
        if wanted.is_empty() || wanted.iter().any(|w| w == name) {
            println!("\n{name}");
            section();
        }
    }
}

/// Work a second that a round of the kernel and, right before it, one of the limit reach.
fn report(name: &str, unit: &str, mut limit: impl FnMut() -> f64, mut kernel: impl FnMut() -> f64) {
    let _ = (limit(), kernel());
    let rounds: Vec<[f64; 2]> = (0..ROUNDS).map(|_| [limit(), kernel()]).collect();
    let spread = |f: &dyn Fn(&[f64; 2]) -> f64| {
        let mut all: Vec<f64> = rounds.iter().map(f).collect();
        all.sort_by(f64::total_cmp);
        [all[0], all[ROUNDS / 2], all[ROUNDS - 1]]
    };
    let [low, middle, high] = spread(&|r| r[1]);
    let [_, of_limit, _] = spread(&|r| r[0]);
    let [_, share, _] = spread(&|r| r[1] / r[0]);
    println!(
        "  {name:34} {middle:7.2} {unit} ({low:.2} .. {high:.2}), {:3.0} % of {of_limit:.2}",
        share * 100.0
    );
}

fn panels() {
    for (rows, cols) in [(576, 576), (1536, 576), (576, 1536), (4864, 896), (896, 4864)] {
        let words: Vec<u16> = (0..rows * cols).map(|i| 0x3c00 + (i % 512) as u16).collect();
        let x = vec![0.25f32; cols * PANEL * PANELS];
        let mut out = vec![0.0f32; rows * PANEL * PANELS];
        let mut widened = vec![0.0f32; BLOCK * cols];
        let flops = 2 * rows * cols * PANEL * PANELS;
        report(&format!("{rows} x {cols}, bf16 x {PANELS} panels"), "GFLOP/s", fma_peak, || {
            rate(flops, || {
                for first in (0..rows).step_by(BLOCK) {
                    let count = BLOCK.min(rows - first);
                    let weights = &mut widened[..count * cols];
                    Elements::Bf16(black_box(&words)).widen(first * cols, weights);
                    for (x, out) in x.chunks_exact(cols * PANEL).zip(out.chunks_exact_mut(rows * PANEL)) {
                        multiply(weights, cols, x, PANEL, &mut out[first * PANEL..][..count * PANEL]);
                    }
                }
            })
        });
    }
    let (rows, cols) = (64, 896);
    let weights = vec![0.5f32; rows * cols];
    for width in [1, 2, 4, 8, 12, 16, 24, 32, 40, 44, 48] {
        let (x, mut out) = (vec![0.25f32; cols * width], vec![0.0f32; rows * width]);
        report(&format!("{rows} x {cols}, {width} tokens"), "GFLOP/s", fma_peak, || {
            rate(2 * 50 * rows * cols * width, || {
                for _ in 0..50 {
                    multiply(black_box(&weights), cols, &x, width, &mut out);
                }
            })
        });
    }
}

fn attention() {
    let d = 64;
    for past in [64, 512, 4096] {
        let (cache, query) = (vec![0.5f32; past * d], vec![0.25f32; d * PANEL]);
        let mut scores = vec![0.0f32; past * PANEL];
        let mut out = vec![0.0f32; d * PANEL];
        let repeats = (1 << 15) / past;
        let flops = 2 * repeats * past * d * PANEL;
        report(&format!("keys, {past} tokens past"), "GFLOP/s", fma_peak, || {
            rate(flops, || {
                (0..repeats).for_each(|_| multiply(black_box(&cache), d, &query, PANEL, &mut scores));
            })
        });
        report(&format!("values, {past} tokens past"), "GFLOP/s", fma_peak, || {
            rate(flops, || {
                (0..repeats).for_each(|_| multiply(black_box(&cache), past, &scores, PANEL, &mut out))
            })
        });
    }
}

/// Calls of one product, of the rows that a caller gives a thread at once.
fn split(rows: usize, cols: usize, threads: usize, out: &mut [f32], f: impl Fn(usize, &mut [f32]) + Sync) {
    let task = ((128 << 10) / cols).next_multiple_of(TILE_ROWS);
    let part = rows.div_ceil(threads).next_multiple_of(task);
    thread::scope(|scope| {
        for (i, out) in out.chunks_mut(part).enumerate() {
            let f = &f;
            scope.spawn(move || {
                for (j, out) in out.chunks_mut(task).enumerate() {
                    f(i * part + j * task, out);
                }
            });
        }
    });
}

fn single_tokens() {
    // Exponents as trained weights have them.
    let words: Vec<u16> = (0..STREAMED as u64)
        .map(|i| {
            let r = (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let r = (r ^ r >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let step = (r << 16 | 1 << 50).leading_zeros() as u16;
            (r >> 48) as u16 & 0x807f | (124 - step) << 7
        })
        .collect();
    for threads in [1, 2] {
        println!(" {threads} threads, 10^9 weights/s");
        let bytes: &[u8] = bytemuck::cast_slice(&words);
        for cols in [576, 896, 4864] {
            let rows = STREAMED / cols;
            let (x, mut out) = (vec![0.01f32; cols], vec![0.0f32; rows]);
            let name = format!("bf16, {cols} columns");
            report(
                &name,
                "Gw/s",
                || read(bytes, threads) / 2.0,
                || {
                    rate(rows * cols, || {
                        split(rows, cols, threads, &mut out, |first, out| {
                            dot_rows(Elements::Bf16(&words[first * cols..]), cols, &x, out);
                        });
                    })
                },
            );
        }
        let cols = 1024;
        let (x, mut out) = (vec![0.01f32; cols], vec![0.0f32; STREAMED / cols]);
        report(
            "f16",
            "Gw/s",
            || read(bytes, threads) / 2.0,
            || {
                rate(STREAMED, || {
                    split(STREAMED / cols, cols, threads, &mut out, |first, out| {
                        dot_rows(Elements::F16(&words[first * cols..]), cols, &x, out);
                    });
                })
            },
        );
        let single: &[f32] = bytemuck::cast_slice(&words);
        report(
            "f32",
            "Gw/s",
            || read(bytes, threads) / 4.0,
            || {
                rate(STREAMED / 2, || {
                    split(
                        STREAMED / 2 / cols,
                        cols,
                        threads,
                        &mut out[..STREAMED / 2 / cols],
                        |first, out| {
                            dot_rows(Elements::F32(&single[first * cols..]), cols, &x, out);
                        },
                    );
                })
            },
        );
        for (name, one_in) in [("no escapes", usize::MAX), ("0.3 % escapes", 333), ("5 % escapes", 20)] {
            for cols in [576, 896, 4864] {
                fixed12(&format!("fixed12, {cols} columns, {name}"), &words, one_in, cols, threads);
            }
        }
    }
}

fn fixed12(name: &str, words: &[u16], one_in: usize, cols: usize, threads: usize) {
    let rows = STREAMED / cols / TILE_ROWS * TILE_ROWS;
    let mut escaped = words[..rows * cols].to_vec();
    for (i, word) in escaped.iter_mut().enumerate() {
        if one_in < usize::MAX && (i as u64).wrapping_mul(0xd134_2543_de82_ef95).is_multiple_of(one_in as u64)
        {
            *word = 0;
        }
    }
    let mut histogram = Histogram::new();
    histogram.add(&escaped);
    let base = histogram.best_window().base;
    let mut encoded = Strips::default();
    encode_strips(base, cols, &escaped, &mut encoded).expect("whole rows");
    let mut offsets = vec![0u32];
    offsets.extend(encoded.escape_counts.iter().scan(0, |sum, n| {
        *sum += n;
        Some(*sum)
    }));
    let (x, mut out) = (vec![0.01f32; cols], vec![0.0f32; rows]);
    let bytes = bytemuck::cast_slice(words);
    let stored = 1.5 + encoded.escape_positions.len() as f64 * 3.0 / (rows * cols) as f64;
    let across = cols.div_ceil(TILE_COLS);
    report(
        name,
        "Gw/s",
        || read(bytes, threads) / stored,
        || {
            rate(rows * cols, || {
                split(rows, cols, threads, &mut out, |first, out| {
                    let tiles = first / TILE_ROWS * across..(first + out.len()).div_ceil(TILE_ROWS) * across;
                    let escapes = offsets[tiles.start] as usize..offsets[tiles.end] as usize;
                    let strips = StripsRef {
                        sign_mantissa: &encoded.sign_mantissa
                            [tiles.start * TILE_WEIGHTS..tiles.end * TILE_WEIGHTS],
                        codes: &encoded.codes[tiles.start * TILE_CODE_BYTES..tiles.end * TILE_CODE_BYTES],
                        escape_offsets: &offsets[tiles.start..=tiles.end],
                        escape_positions: &encoded.escape_positions[escapes.clone()],
                        escape_exponents: &encoded.escape_exponents[escapes],
                    };
                    dot_fixed12(base, &strips, &x, out).expect("valid strips");
                });
            })
        },
    );
}

/// Two of four kept, one thread: values in BF16, in twelve bits, and as codes.
fn two_in_four() {
    for cols in [576, 1536, 4096] {
        let rows = STREAMED / 2 / cols / TILE_ROWS * TILE_ROWS;
        let mut state = 1u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state >> 33
        };
        let words: Vec<u16> =
            (0..rows * cols / 2).map(|_| next() as u16 & 0x807f | (118 + (next() % 7) as u16) << 7).collect();
        let nibbles = [4u8, 8, 12, 9, 13, 14];
        let positions: Vec<u8> = (0..rows * cols / 8)
            .map(|_| nibbles[(next() % 6) as usize] | nibbles[(next() % 6) as usize] << 4)
            .collect();
        let (x, mut out) = (vec![0.01f32; cols], vec![0.0f32; rows]);
        let bytes: &[u8] = bytemuck::cast_slice(&words);
        let of_row = cols / 8;
        report(
            &format!("bf16, {cols} columns"),
            "Gw/s",
            || read(bytes, 1) / 1.125,
            || {
                rate(rows * cols, || {
                    split(rows, cols, 1, &mut out, |first, out| {
                        let values = Elements::Bf16(&words[first * cols / 2..][..out.len() * cols / 2]);
                        let positions = &positions[first * of_row..][..out.len() * of_row];
                        let sparse = Sparse24::new(values, positions, out.len(), cols).expect("sizes");
                        dot_sparse24(&sparse, &x, out).expect("positions");
                    });
                })
            },
        );
        let mut strips = Strips::default();
        encode_strips(117, cols / 2, &words, &mut strips).expect("whole rows");
        let mut offsets = vec![0u32];
        offsets.extend(strips.escape_counts.iter().scan(0, |sum, n| {
            *sum += n;
            Some(*sum)
        }));
        let across = (cols / 2).div_ceil(TILE_COLS);
        report(
            &format!("fixed12, {cols} columns"),
            "Gw/s",
            || read(bytes, 1) / 0.875,
            || {
                rate(rows * cols, || {
                    split(rows, cols, 1, &mut out, |first, out| {
                        let tiles =
                            first / TILE_ROWS * across..(first + out.len()).div_ceil(TILE_ROWS) * across;
                        let escapes = offsets[tiles.start] as usize..offsets[tiles.end] as usize;
                        let strips = StripsRef {
                            sign_mantissa: &strips.sign_mantissa
                                [tiles.start * TILE_WEIGHTS..tiles.end * TILE_WEIGHTS],
                            codes: &strips.codes[tiles.start * TILE_CODE_BYTES..tiles.end * TILE_CODE_BYTES],
                            escape_offsets: &offsets[tiles.start..=tiles.end],
                            escape_positions: &strips.escape_positions[escapes.clone()],
                            escape_exponents: &strips.escape_exponents[escapes],
                        };
                        let positions = &positions[first * of_row..][..out.len() * of_row];
                        dot_sparse_fixed12(117, &strips, positions, &x, out).expect("valid strips");
                    });
                })
            },
        );
        for bits in [2u8, 3, 4, 8] {
            let kept = cols / 2;
            let planes = vec![0x5a5a_1234u32; usize::from(bits) * rows * kept.div_ceil(32)];
            let scale = vec![0x2800u16; rows * kept.div_ceil(64)];
            let stored = Stored {
                rows,
                cols: kept,
                bits,
                planes: bits,
                group_size: Some(64),
                activation_bits: None,
                words: &planes,
                scale: Elements::F16(&scale),
                zero: Zero::Symmetric,
            };
            let codes = SparseCodes::new(&stored, &positions, cols).expect("sizes");
            let each = codes.bytes() as f64 / (rows * cols) as f64;
            report(
                &format!("w{bits} g64, {cols} columns"),
                "Gw/s",
                || read(bytes, 1) / each,
                || {
                    rate(rows * cols, || {
                        split(rows, cols, 1, &mut out, |first, out| {
                            dot_sparse_codes(&codes, first..first + out.len(), &x, out);
                        });
                    })
                },
            );
        }
    }
}

fn widening() {
    let words: Vec<u16> = (0..STREAMED).map(|i| (i % 0x7000) as u16).collect();
    let bytes = bytemuck::cast_slice(&words);
    for (name, elements) in [("bf16", Elements::Bf16(&words)), ("f16", Elements::F16(&words))] {
        for (cache, values) in [("first", 2 << 10), ("second", 64 << 10)] {
            let mut out = vec![0.0f32; values];
            report(
                &format!("{name} to the {cache} cache"),
                "Gw/s",
                || read(bytes, 1) / 2.0,
                || {
                    rate(STREAMED, || {
                        for first in (0..STREAMED).step_by(values) {
                            black_box(elements).widen(first, black_box(&mut out));
                        }
                    })
                },
            );
        }
    }
}

fn elementwise() {
    // As many values as a prefill's gates have, in parts of one panel; the limit is a copy of them.
    let part = 4864 * PANEL;
    let count = 24_000_000 / part * part;
    let gate: Vec<f32> = (0..part).map(|i| (i % 1000) as f32 / 100.0 - 5.0).collect();
    let mut up = vec![0.5f32; part];
    let mut to = vec![0.0f32; part];
    let mut copy = || {
        rate(count, || {
            for _ in 0..count / part {
                to.copy_from_slice(black_box(&gate));
                black_box(&mut to);
            }
        })
    };
    let mut each = |name: &str, f: &mut dyn FnMut(&mut [f32])| {
        report(name, "10^9/s", &mut copy, || {
            rate(count, || {
                for _ in 0..count / part {
                    up.fill(0.5);
                    f(black_box(&mut up));
                }
            })
        });
    };
    each("silu_gate", &mut |up| silu_gate(&gate, up));
    each("gelu_tanh_gate", &mut |up| gelu_tanh_gate(&gate, up));
    each("softmax, 48 columns", &mut |up| softmax(up, PANEL));
    each("softmax, 1 column", &mut |up| softmax(up, 1));
    let weight = vec![1.0f32; 576 * PANEL];
    each("rms_norm, 576 x 48", &mut |up| {
        for (x, out) in gate.chunks_exact(576 * PANEL).zip(up.chunks_exact_mut(576 * PANEL)) {
            rms_norm(x, &weight[..576], 1e-5, PANEL, out);
        }
    });
    each("rms_norm, 576 x 1", &mut |up| {
        for (x, out) in gate.chunks_exact(576).zip(up.chunks_exact_mut(576)) {
            rms_norm(x, &weight[..576], 1e-5, 1, out);
        }
    });
    each("exp, one at a time", &mut |up| up.iter_mut().for_each(|x| *x = exp(*x)));
}
