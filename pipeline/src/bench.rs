//! Measures every lossless method on a checkpoint's own tensors, side by side, on one thread.
//!
//! ```text
//! round 1: copy, zstd, every method, peers | round 2: ... | medians
//! ```
//!
//! All methods take turns in every round, so that a drift of the machine's speed touches all alike. What
//! a method decodes is compared with its input in every round.

use std::io::{Seek, Write};
use std::process::Command;
use std::time::Instant;

use llmpress_formats::{Checkpoint, Dtype, Error as FormatError};
use serde::{Deserialize, Serialize};

use crate::method::timed::{Joined, Timed, invalid};
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

/// What one method took for the whole sample in one round.
struct Round {
    stored: u64,
    encode_seconds: f64,
    decode_seconds: f64,
}

/// Measures. `say` is told what is going on.
pub fn bench(checkpoint: &Checkpoint, options: &Options, say: &dyn Fn(&str)) -> Result<Report> {
    let (dtype, sample) = sample(checkpoint, options.sample_bytes)?;
    let total: u64 = sample.iter().map(|unit| unit.bytes().len() as u64).sum();
    let file = if options.peers.is_empty() { None } else { Some(write_sample(&sample)?) };
    let mut methods: Vec<(String, Vec<Round>)> = Vec::new();
    let mut record = |name: &str, round: Round| match methods.iter_mut().find(|(n, _)| n == name) {
        Some((_, rounds)) => rounds.push(round),
        None => methods.push((name.to_owned(), vec![round])),
    };
    for run in 1..=options.runs.max(1) {
        say(&format!("round {run} of {}", options.runs.max(1)));
        record("copy", measure(&sample, &mut Copy::default())?);
        record("zstd -3", measure(&sample, &mut Zstd::new()?)?);
        for method in Method::ALL {
            if let Some(mut timed) = method.room().timed(dtype) {
                record(method.name(), measure(&sample, &mut *timed)?);
            }
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

/// The units of the method that makes them of several tensors, or the largest matrices of the commonest dtype.
fn sample(checkpoint: &Checkpoint, limit: u64) -> Result<(Dtype, Vec<Joined>)> {
    let grouping = Method::ALL.iter().find(|method| method.room().takes_patterns());
    let planned = grouping.and_then(|method| {
        let plan = Plan::new(checkpoint, &Recipe::new(*method), u64::MAX).ok()?;
        Some(plan.units().filter(|u| u.method == *method).map(|u| u.tensors.clone()).collect())
    });
    let (dtype, groups): (Dtype, Vec<Vec<String>>) = match planned {
        Some(units) => (Dtype::BF16, units),
        None => {
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
    let mut units: Vec<Joined> = Vec::new();
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
        let sizes: Vec<usize> = matrices.iter().map(|(_, len)| *len).collect();
        let mut unit = Joined::new(matrices);
        let mut rest = unit.bytes_mut();
        for (name, len) in names.iter().zip(sizes) {
            let (now, later) = rest.split_at_mut(len);
            checkpoint.read(name, 0, now)?;
            rest = later;
        }
        taken += bytes as u64;
        units.push(unit);
    }
    if units.is_empty() {
        return Err(Error::Invalid(format!(
            "{}: there is no tensor to measure",
            checkpoint.root().display()
        )));
    }
    Ok((dtype, units))
}

/// Times encoding and decoding of every unit, whose bytes must come back.
fn measure(sample: &[Joined], timed: &mut dyn Timed) -> Result<Round> {
    let mut round = Round { stored: 0, encode_seconds: 0.0, decode_seconds: 0.0 };
    let mut out: Vec<u64> = Vec::new();
    // The largest unit once without the clock: its memory is there then.
    if let Some(largest) = sample.iter().max_by_key(|unit| unit.bytes().len()) {
        timed.encode(largest)?;
        out.resize(largest.bytes().len().div_ceil(8), 0);
    }
    for unit in sample {
        let start = Instant::now();
        round.stored += timed.encode(unit)? as u64;
        round.encode_seconds += start.elapsed().as_secs_f64();
        out.clear();
        out.resize(unit.bytes().len().div_ceil(8), u64::MAX);
        let decoded = &mut bytemuck::cast_slice_mut::<u64, u8>(&mut out)[..unit.bytes().len()];
        let start = Instant::now();
        timed.decode(decoded)?;
        round.decode_seconds += start.elapsed().as_secs_f64();
        if decoded != unit.bytes() {
            return Err(Error::Mismatch { unit: "of the sample".to_owned(), offset: 0 });
        }
    }
    Ok(round)
}

/// The physical limit: a copy of the bytes.
#[derive(Default)]
struct Copy(Vec<u8>);

impl Timed for Copy {
    fn encode(&mut self, unit: &Joined) -> Result<usize> {
        self.0.resize(unit.bytes().len(), 0);
        self.0.copy_from_slice(unit.bytes());
        Ok(self.0.len())
    }

    fn decode(&mut self, out: &mut [u8]) -> Result<()> {
        out.copy_from_slice(&self.0);
        Ok(())
    }
}

struct Zstd {
    compressor: zstd::bulk::Compressor<'static>,
    decompressor: zstd::bulk::Decompressor<'static>,
    encoded: Vec<u8>,
}

impl Zstd {
    fn new() -> Result<Self> {
        let compressor = zstd::bulk::Compressor::new(3).map_err(invalid)?;
        let decompressor = zstd::bulk::Decompressor::new().map_err(invalid)?;
        Ok(Self { compressor, decompressor, encoded: Vec::new() })
    }
}

impl Timed for Zstd {
    fn encode(&mut self, unit: &Joined) -> Result<usize> {
        self.encoded.clear();
        self.encoded.reserve(zstd::zstd_safe::compress_bound(unit.bytes().len()));
        self.compressor.compress_to_buffer(unit.bytes(), &mut self.encoded).map_err(invalid)
    }

    fn decode(&mut self, out: &mut [u8]) -> Result<()> {
        let n = self.decompressor.decompress_to_buffer(&self.encoded, out).map_err(invalid)?;
        if n == out.len() { Ok(()) } else { Err(invalid("zstd gave another size")) }
    }
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
fn write_sample(sample: &[Joined]) -> Result<(tempfile::NamedTempFile, std::path::PathBuf)> {
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
