//! Measures every lossless method on a checkpoint's own tensors, side by side, on one thread.
//!
//! ```text
//! round 1: copy, zstd, planes, fixed12, dfloat11, peers | round 2: ... | medians
//! ```
//!
//! All methods take turns in every round, so that a drift of the machine's speed touches all alike. What
//! a method decodes is compared with its input in every round.

use std::io::{Seek, Write};
use std::process::Command;
use std::time::Instant;

use llmpress_entropy::{dfloat11, fixed12, planes};
use llmpress_formats::encoding;
use llmpress_formats::{Checkpoint, Dtype, Error as FormatError};
use serde::{Deserialize, Serialize};

use crate::{Error, Method, Plan, Recipe, Result};

/// What to measure.
#[derive(Debug, Clone)]
pub struct Options {
    /// At most so many bytes of tensors, from the first blocks on.
    pub sample_bytes: u64,
    /// Rounds.
    pub runs: usize,
    /// Commands that measure something else on the same bytes.
    pub peers: Vec<String>,
}

/// Gigabytes (10^9) of original tensors per second.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Speed {
    /// The median of all rounds.
    pub median: f64,
    /// The slowest round.
    pub min: f64,
    /// The fastest round.
    pub max: f64,
}

/// A method's figures.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// The method.
    pub method: String,
    /// Encoded size as a share of the original's.
    pub share: f64,
    /// Speed of encoding.
    pub encode: Speed,
    /// Speed of decoding.
    pub decode: Speed,
}

/// All figures.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Bytes measured on.
    pub sample_bytes: u64,
    /// Their dtype.
    pub dtype: &'static str,
    /// Rounds.
    pub runs: usize,
    /// One row a method.
    pub rows: Vec<Row>,
}

/// A unit of the sample: matrices of one dtype, joined.
struct Unit {
    words: Vec<u64>,
    bytes: usize,
    matrices: Vec<(Vec<u64>, usize)>,
}

impl Unit {
    fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.bytes]
    }

    fn words(&self) -> &[u16] {
        &bytemuck::cast_slice(&self.words)[..self.bytes / 2]
    }
}

/// What one method took for the whole sample in one round.
struct Round {
    stored: u64,
    encode_seconds: f64,
    decode_seconds: f64,
}

/// Measures. `say` is told what is going on.
pub fn bench(checkpoint: &Checkpoint, options: &Options, say: &dyn Fn(&str)) -> Result<Report> {
    let (dtype, sample) = sample(checkpoint, options.sample_bytes)?;
    let total: u64 = sample.iter().map(|u| u.bytes as u64).sum();
    let file = if options.peers.is_empty() { None } else { Some(write_sample(&sample)?) };
    let mut methods: Vec<(String, Vec<Round>)> = Vec::new();
    let mut record = |name: &str, round: Round| match methods.iter_mut().find(|(n, _)| n == name) {
        Some((_, rounds)) => rounds.push(round),
        None => methods.push((name.to_owned(), vec![round])),
    };
    for run in 1..=options.runs.max(1) {
        say(&format!("round {run} of {}", options.runs.max(1)));
        record("copy", copy(&sample)?);
        record("zstd -3", zstd(&sample)?);
        record("planes", byte_planes(&sample, dtype)?);
        if dtype == Dtype::BF16 {
            record("fixed12", fixed(&sample)?);
            record("dfloat11", dfloat(&sample)?);
        }
        if let Some((file, path)) = &file {
            let _open = file;
            for command in &options.peers {
                for peer in run_peer(command, path)? {
                    let seconds = |gbps: f64| total as f64 / 1e9 / gbps;
                    let round = Round {
                        stored: (peer.ratio * total as f64) as u64,
                        encode_seconds: seconds(peer.compress_gbps),
                        decode_seconds: seconds(peer.decompress_gbps),
                    };
                    record(&peer.peer, round);
                }
            }
        }
    }
    let rows = methods
        .into_iter()
        .map(|(method, rounds)| Row {
            method,
            share: rounds.first().map_or(0.0, |r| r.stored as f64) / total.max(1) as f64,
            encode: speed(total, rounds.iter().map(|r| r.encode_seconds)),
            decode: speed(total, rounds.iter().map(|r| r.decode_seconds)),
        })
        .collect();
    Ok(Report { sample_bytes: total, dtype: dtype.name(), runs: options.runs.max(1), rows })
}

fn speed(bytes: u64, seconds: impl Iterator<Item = f64>) -> Speed {
    let mut rates: Vec<f64> = seconds.map(|s| bytes as f64 / 1e9 / s.max(1e-12)).collect();
    rates.sort_by(f64::total_cmp);
    let at = |i: usize| rates.get(i).copied().unwrap_or(0.0);
    Speed { median: at(rates.len() / 2), min: at(0), max: at(rates.len().saturating_sub(1)) }
}

/// The units that DFloat11 would make, or the largest matrices of the commonest dtype.
fn sample(checkpoint: &Checkpoint, limit: u64) -> Result<(Dtype, Vec<Unit>)> {
    let planned = Plan::new(checkpoint, &Recipe::new(Method::Dfloat11), u64::MAX);
    let (dtype, groups): (Dtype, Vec<Vec<String>>) = match planned {
        Ok(plan) => {
            let units = plan.units().filter(|u| u.method == Method::Dfloat11);
            (Dtype::BF16, units.map(|u| u.tensors.clone()).collect())
        }
        Err(_) => {
            let largest = checkpoint.tensors().values().max_by_key(|t| t.bytes);
            let dtype = largest.map_or(Dtype::BF16, |t| t.dtype);
            let same = checkpoint.tensors().iter().filter(|(_, t)| t.dtype == dtype);
            (dtype, same.map(|(name, _)| vec![name.clone()]).collect())
        }
    };
    // Units that fit, in order; the smallest if none does.
    let size = |names: &[String]| -> u64 {
        names.iter().filter_map(|n| checkpoint.tensors().get(n)).map(|t| t.bytes).sum()
    };
    let smallest = groups.iter().map(|g| size(g)).filter(|&b| b > 0).min().unwrap_or(0);
    let limit = limit.max(smallest);
    let mut units: Vec<Unit> = Vec::new();
    let mut taken = 0;
    for names in groups {
        let mut bytes = 0;
        let mut matrices = Vec::new();
        for name in &names {
            let tensor = checkpoint.tensor(name)?;
            matrices.push((tensor.shape.clone(), tensor.bytes as usize));
            bytes += tensor.bytes as usize;
        }
        if bytes == 0 || taken + bytes as u64 > limit {
            continue;
        }
        let mut words = vec![0u64; bytes.div_ceil(8)];
        let mut rest = &mut bytemuck::cast_slice_mut::<u64, u8>(&mut words)[..bytes];
        for (name, (_, len)) in names.iter().zip(&matrices) {
            let (now, later) = rest.split_at_mut(*len);
            checkpoint.read(name, 0, now)?;
            rest = later;
        }
        taken += bytes as u64;
        units.push(Unit { words, bytes, matrices });
    }
    if units.is_empty() {
        return Err(Error::Invalid(format!(
            "{}: there is no tensor to measure",
            checkpoint.root().display()
        )));
    }
    Ok((dtype, units))
}

/// Times encoding and decoding of every unit; `decode` must give back the unit's bytes. Buffers are kept from
/// unit to unit, as a converter keeps them: fresh memory would be measured otherwise.
fn measure<E: Default>(
    sample: &[Unit],
    mut encode: impl FnMut(&Unit, &mut E) -> Result<usize>,
    mut decode: impl FnMut(&E, &mut [u8]) -> Result<()>,
) -> Result<Round> {
    let mut round = Round { stored: 0, encode_seconds: 0.0, decode_seconds: 0.0 };
    let mut encoded = E::default();
    let mut out: Vec<u64> = Vec::new();
    // The largest unit once without the clock: its memory is there then.
    if let Some(largest) = sample.iter().max_by_key(|u| u.bytes) {
        encode(largest, &mut encoded)?;
        out.resize(largest.words.len(), 0);
    }
    for unit in sample {
        let start = Instant::now();
        round.stored += encode(unit, &mut encoded)? as u64;
        round.encode_seconds += start.elapsed().as_secs_f64();
        out.clear();
        out.resize(unit.words.len(), u64::MAX);
        let decoded = &mut bytemuck::cast_slice_mut::<u64, u8>(&mut out)[..unit.bytes];
        let start = Instant::now();
        decode(&encoded, decoded)?;
        round.decode_seconds += start.elapsed().as_secs_f64();
        if decoded != unit.bytes() {
            return Err(Error::Mismatch { unit: "of the sample".to_owned(), offset: 0 });
        }
    }
    Ok(round)
}

fn invalid(e: impl std::fmt::Display) -> Error {
    Error::Invalid(e.to_string())
}

/// The physical limit: a copy of the bytes.
fn copy(sample: &[Unit]) -> Result<Round> {
    measure(
        sample,
        |unit, copied: &mut Vec<u8>| {
            copied.resize(unit.bytes, 0);
            copied.copy_from_slice(unit.bytes());
            Ok(unit.bytes)
        },
        |copied, out| {
            out.copy_from_slice(copied);
            Ok(())
        },
    )
}

fn zstd(sample: &[Unit]) -> Result<Round> {
    let mut compressor = zstd::bulk::Compressor::new(3).map_err(invalid)?;
    let mut decompressor = zstd::bulk::Decompressor::new().map_err(invalid)?;
    measure(
        sample,
        |unit, encoded: &mut Vec<u8>| {
            encoded.clear();
            encoded.reserve(zstd::zstd_safe::compress_bound(unit.bytes));
            compressor.compress_to_buffer(unit.bytes(), encoded).map_err(invalid)
        },
        |encoded, out| {
            let n = decompressor.decompress_to_buffer(encoded, out).map_err(invalid)?;
            if n == out.len() { Ok(()) } else { Err(invalid("zstd gave another size")) }
        },
    )
}

fn byte_planes(sample: &[Unit], dtype: Dtype) -> Result<Round> {
    let split = encoding::planes::split(dtype);
    let chunk = planes::CHUNK_ELEMENTS * split.width;
    let mut encoder = planes::Encoder::new(planes::DEFAULT_LEVEL);
    let mut decoder = planes::Decoder::new();
    measure(
        sample,
        |unit, (data, lengths): &mut (Vec<u8>, Vec<u32>)| {
            data.clear();
            lengths.clear();
            for bytes in unit.bytes().chunks(chunk) {
                encoder.encode_chunk(split.width, split.rotate, bytes, data, lengths).map_err(invalid)?;
            }
            Ok(data.len() + lengths.len() * 4)
        },
        |(data, lengths), out| {
            let mut at = 0;
            for (bytes, lengths) in out.chunks_mut(chunk).zip(lengths.chunks(split.width)) {
                let len: usize = lengths.iter().map(|&l| l as usize).sum();
                decoder
                    .decode_chunk(split.width, split.rotate, lengths, &data[at..at + len], bytes)
                    .map_err(invalid)?;
                at += len;
            }
            Ok(())
        },
    )
}

/// One matrix in fixed12.
#[derive(Default)]
struct FixedMatrix {
    base: i16,
    rows: usize,
    cols: usize,
    strips: fixed12::Strips,
    offsets: Vec<u32>,
}

fn fixed(sample: &[Unit]) -> Result<Round> {
    measure(
        sample,
        |unit, matrices: &mut Vec<FixedMatrix>| {
            let mut stored = 0;
            let mut rest = unit.words();
            matrices.resize_with(unit.matrices.len(), FixedMatrix::default);
            for ((shape, bytes), m) in unit.matrices.iter().zip(matrices) {
                let (words, later) = rest.split_at(bytes / 2);
                rest = later;
                let grid = encoding::fixed12::grid(shape).ok_or_else(|| invalid("not a matrix"))?;
                (m.rows, m.cols) = (grid.rows() as usize, grid.cols() as usize);
                let mut histogram = fixed12::Histogram::new();
                histogram.add(words);
                m.base = histogram.best_window().base;
                fixed12::encode_strips(m.base, m.cols, words, &mut m.strips).map_err(invalid)?;
                m.offsets.clear();
                m.offsets.push(0);
                m.offsets.extend(m.strips.escape_counts.iter().scan(0u32, |sum, n| {
                    *sum += n;
                    Some(*sum)
                }));
                stored += m.strips.sign_mantissa.len() + m.strips.codes.len() + m.offsets.len() * 4;
                stored += m.strips.escape_positions.len() * 3;
            }
            Ok(stored)
        },
        |matrices, out| {
            let mut rest: &mut [u16] = bytemuck::cast_slice_mut(out);
            for m in matrices {
                let (now, later) = rest.split_at_mut(m.rows * m.cols);
                rest = later;
                let strips = fixed12::StripsRef {
                    sign_mantissa: &m.strips.sign_mantissa,
                    codes: &m.strips.codes,
                    escape_offsets: &m.offsets,
                    escape_positions: &m.strips.escape_positions,
                    escape_exponents: &m.strips.escape_exponents,
                };
                fixed12::decode_strips(m.base, m.cols, m.rows, &strips, now).map_err(invalid)?;
            }
            Ok(())
        },
    )
}

/// One unit in DFloat11.
#[derive(Default)]
struct DfloatUnit {
    luts: Vec<u8>,
    sign_mantissa: Vec<u8>,
    sections: dfloat11::Sections,
    piece: dfloat11::Piece,
}

/// Words of a piece: its buffers stay in the cache.
const PIECE_WORDS: usize = 1 << 16;

fn dfloat(sample: &[Unit]) -> Result<Round> {
    measure(
        sample,
        |unit, e: &mut DfloatUnit| {
            let mut histogram = dfloat11::Histogram::new();
            histogram.add(unit.words());
            let code = dfloat11::Code::build(&histogram).map_err(invalid)?;
            let layout = dfloat11::Layout::new(&code, &histogram).map_err(invalid)?;
            e.luts.clear();
            e.luts.extend_from_slice(code.luts());
            e.sign_mantissa.clear();
            e.sections.encoded_exponent.clear();
            e.sections.gaps.clear();
            e.sections.output_positions.clear();
            let mut assembler = dfloat11::Assembler::new(&layout);
            let mut at = dfloat11::Position::default();
            for words in unit.words().chunks(PIECE_WORDS) {
                dfloat11::encode_piece(&code, at, words, &mut e.piece);
                at = e.piece.end();
                e.sign_mantissa.extend_from_slice(&e.piece.sign_mantissa);
                assembler.push(&e.piece, &mut e.sections);
            }
            assembler.finish(&code, &mut e.sections).map_err(invalid)?;
            let index = e.sections.gaps.len() + e.sections.output_positions.len();
            Ok(e.luts.len() + e.sign_mantissa.len() + e.sections.encoded_exponent.len() + index)
        },
        |e, out| {
            let code = dfloat11::Code::from_luts(&e.luts).map_err(invalid)?;
            let span = dfloat11::Span {
                encoded_exponent: &e.sections.encoded_exponent,
                gaps: &e.sections.gaps,
                output_positions: &e.sections.output_positions,
                sign_mantissa: &e.sign_mantissa,
            };
            dfloat11::decode_span(&code, &span, 0, bytemuck::cast_slice_mut(out)).map_err(invalid)
        },
    )
}

/// What a peer prints.
#[derive(Debug, Deserialize)]
struct Peer {
    peer: String,
    /// Compressed size as a share of the original's.
    ratio: f64,
    compress_gbps: f64,
    decompress_gbps: f64,
}

/// The sample as one file, removed when the handle is dropped.
fn write_sample(sample: &[Unit]) -> Result<(tempfile::NamedTempFile, std::path::PathBuf)> {
    let temporary = std::env::temp_dir();
    let io = |e| Error::from(FormatError::io(&temporary, "write", e));
    let mut file =
        tempfile::Builder::new().prefix("llmpress-bench-").suffix(".bf16").tempfile().map_err(io)?;
    for unit in sample {
        file.write_all(unit.bytes()).map_err(io)?;
    }
    file.rewind().map_err(io)?;
    let path = file.path().to_owned();
    Ok((file, path))
}

fn run_peer(command: &str, file: &std::path::Path) -> Result<Vec<Peer>> {
    let mut words = command.split_whitespace();
    let program = words.next().ok_or_else(|| invalid("--peer: the command is empty"))?;
    let output = Command::new(program)
        .args(words)
        .arg(file)
        .output()
        .map_err(|e| invalid(format!("--peer {command}: cannot be run: {e}")))?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        let last = why.trim().lines().last().unwrap_or_default().to_owned();
        return Err(invalid(format!("--peer {command}: failed: {last}")));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let lines = text.lines().filter(|line| !line.trim().is_empty());
    lines
        .map(|line| serde_json::from_str(line).map_err(|e| invalid(format!("--peer {command}: {line}: {e}"))))
        .collect()
}
