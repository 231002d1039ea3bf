//! Products of weights of few bits, and of half the weights, on one core, beside those of bfloat16 and of a peer, in turn: `taskset -c 0 cargo bench -p
//! llmpress-kernels --bench abq -- [ROWSxCOLS] [TOKENS,...]`.
//!
//! Seconds are those that the thread had on its core, so that other programs disturb less. Every matrix lies in memory as often as no cache holds, and every product takes the next one. Quantising or preparing the
//! activations counts. `LLMPRESS_PEER` is a command as docs/bench/llama_cpp_products.py is one: it makes a round for every
//! line that it reads.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    missing_docs,
    dead_code,
    reason = "a benchmark may stop where it stands"
)]

mod limits;

use std::collections::BTreeMap;
use std::hint::black_box;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};

use limits::fma_peak;
use llmpress_kernels::cpu::abq::{Inputs, Matrix, Stored, Zero};
use llmpress_kernels::cpu::pages::{Room, sum};
use llmpress_kernels::cpu::{Elements, Sparse24, dot_rows, dot_sparse24, multiply};

/// Rounds that count.
const ROUNDS: usize = 9;
/// Bytes that the copies of a matrix have together.
const WORKING_SET: usize = 256 << 20;
/// Rows of bfloat16 that are widened at once.
const WIDENED: usize = 64;

fn main() {
    let mut shape = (4096, 4096);
    let mut tokens = vec![1, 16];
    let mut only = Vec::new();
    for argument in std::env::args().skip(1).filter(|a| !a.starts_with('-')) {
        if let Some((rows, cols)) = argument.split_once('x') {
            shape = (rows.parse().unwrap(), cols.parse().unwrap());
        } else if argument.starts_with(|c: char| c.is_ascii_digit()) {
            tokens = argument.split(',').map(|n| n.parse().unwrap()).collect();
        } else {
            only.push(argument.to_lowercase());
        }
    }
    let peer = std::env::var("LLMPRESS_PEER").ok().map(|command| Peer::start(&command));
    let mut products: Vec<Box<dyn Product>> = vec![Box::new(Bf16::new(shape))];
    if only.is_empty() || only.iter().any(|name| "bf16 2:4".contains(name.as_str())) {
        products.push(Box::new(Halved::new(shape)));
    }
    for (bits, activation, group) in [
        (2, None, Some(128)),
        (3, None, Some(128)),
        (4, None, Some(128)),
        (4, None, None),
        (8, None, Some(128)),
        (1, Some(1), None),
        (1, Some(2), Some(128)),
        (1, Some(4), Some(128)),
        (2, Some(1), Some(128)),
        (2, Some(2), Some(128)),
        (2, Some(4), Some(128)),
        (2, Some(8), Some(128)),
        (2, Some(8), None),
        (3, Some(8), Some(128)),
        (4, Some(4), Some(128)),
        (4, Some(4), None),
        (4, Some(8), Some(128)),
        (4, Some(8), None),
        (8, Some(8), Some(128)),
    ] {
        let product = Abq::new(shape, bits, activation, group);
        if only.is_empty() || only.iter().any(|name| product.name().to_lowercase().contains(name)) {
            products.push(Box::new(product));
        }
    }
    measure(shape, &tokens, &mut products, peer);
}

/// Something that multiplies, every time from another place in memory.
trait Product {
    fn name(&self) -> String;
    /// Bytes of weights that a product reads.
    fn bytes(&self) -> usize;
    fn run(&mut self, x: &[f32], tokens: usize, out: &mut [f32]);
    /// How often until the first copy has left every cache.
    fn copies(&self) -> usize {
        WORKING_SET.div_ceil(self.bytes())
    }
}

struct Bf16 {
    shape: (usize, usize),
    words: Vec<u16>,
    next: usize,
    widened: Vec<f32>,
}

impl Bf16 {
    fn new((rows, cols): (usize, usize)) -> Self {
        let copies = WORKING_SET.div_ceil(rows * cols * 2);
        let words = (0..rows * cols * copies).map(|i| 0x3c00 + (i % 512) as u16).collect();
        Self { shape: (rows, cols), words, next: 0, widened: vec![0.0; WIDENED * cols] }
    }
}

impl Product for Bf16 {
    fn name(&self) -> String {
        "bf16".to_owned()
    }

    fn bytes(&self) -> usize {
        self.shape.0 * self.shape.1 * 2
    }

    fn run(&mut self, x: &[f32], tokens: usize, out: &mut [f32]) {
        let (rows, cols) = self.shape;
        let words = &self.words[self.next * rows * cols..][..rows * cols];
        self.next = (self.next + 1) % self.copies();
        if tokens == 1 {
            dot_rows(Elements::Bf16(words), cols, x, out);
            return;
        }
        for (words, out) in words.chunks(WIDENED * cols).zip(out.chunks_mut(WIDENED * tokens)) {
            let weights = &mut self.widened[..words.len()];
            Elements::Bf16(words).widen(0, weights);
            multiply(weights, cols, x, tokens, out);
        }
    }
}

/// Two of four bfloat16 weights, values and positions.
struct Halved {
    shape: (usize, usize),
    values: Vec<u16>,
    positions: Vec<u8>,
    next: usize,
    widened: Vec<f32>,
}

impl Halved {
    fn new((rows, cols): (usize, usize)) -> Self {
        // Every pair of positions there is, in no order that a processor could guess.
        const NIBBLES: [u8; 6] = [0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110];
        let nibble = |i: u64| NIBBLES[(i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as usize % 6];
        let copies = WORKING_SET.div_ceil(rows * cols / 8 * 9);
        let values = (0..rows * cols / 2 * copies).map(|i| 0x3c00 + (i % 512) as u16).collect();
        let positions =
            (0..(rows * cols / 8 * copies) as u64).map(|i| nibble(2 * i) | nibble(2 * i + 1) << 4).collect();
        Self { shape: (rows, cols), values, positions, next: 0, widened: vec![0.0; WIDENED * cols] }
    }
}

impl Product for Halved {
    fn name(&self) -> String {
        "bf16 2:4".to_owned()
    }

    fn bytes(&self) -> usize {
        self.shape.0 * self.shape.1 / 8 * 9
    }

    fn run(&mut self, x: &[f32], tokens: usize, out: &mut [f32]) {
        let (rows, cols) = self.shape;
        let (values, positions) = (rows * cols / 2, rows * cols / 8);
        let values = &self.values[self.next * values..][..values];
        let positions = &self.positions[self.next * positions..][..positions];
        self.next = (self.next + 1) % self.copies();
        let part = |rows: std::ops::Range<usize>| {
            let values = &values[rows.start * cols / 2..rows.end * cols / 2];
            let positions = &positions[rows.start * cols / 8..rows.end * cols / 8];
            Sparse24::new(Elements::Bf16(values), positions, rows.len(), cols).unwrap()
        };
        if tokens == 1 {
            dot_sparse24(&part(0..rows), x, out).unwrap();
            return;
        }
        for (first, out) in (0..rows).step_by(WIDENED).zip(out.chunks_mut(WIDENED * tokens)) {
            let rows = first..rows.min(first + WIDENED);
            let weights = &mut self.widened[..rows.len() * cols];
            part(rows).widen(weights).unwrap();
            multiply(weights, cols, x, tokens, out);
        }
    }
}

struct Abq {
    bits: u8,
    activation: Option<u8>,
    group: Option<usize>,
    matrices: Vec<Matrix>,
    inputs: Inputs,
    next: usize,
}

impl Abq {
    fn new((rows, cols): (usize, usize), bits: u8, activation: Option<u8>, group: Option<usize>) -> Self {
        let count = usize::from(bits) * rows * cols.div_ceil(32);
        let words: Vec<u32> = (1..=count as u64)
            .map(|i| {
                (i.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29).wrapping_mul(0xbf58_476d_1ce4_e5b9)
                    >> 32) as u32
            })
            .collect();
        let groups = rows * cols.div_ceil(group.unwrap_or(cols));
        let scale = vec![0x2000; groups];
        let stored = Stored {
            rows,
            cols,
            bits,
            planes: bits,
            group_size: group,
            activation_bits: activation,
            words: &words,
            scale: Elements::F16(&scale),
            zero: Zero::Real(Elements::F16(&scale)),
        };
        let first = Matrix::new(&stored).unwrap();
        let copies = WORKING_SET.div_ceil(first.bytes());
        let mut matrices = vec![first];
        matrices.extend((1..copies).map(|_| Matrix::new(&stored).unwrap()));
        Self { bits, activation, group, matrices, inputs: Inputs::default(), next: 0 }
    }
}

impl Product for Abq {
    fn name(&self) -> String {
        let group = self.group.map_or("per row".to_owned(), |group| format!("g{group}"));
        format!("W{}A{} {group}", self.bits, self.activation.unwrap_or(16))
    }

    fn bytes(&self) -> usize {
        self.matrices[0].bytes()
    }

    fn run(&mut self, x: &[f32], tokens: usize, out: &mut [f32]) {
        let matrix = &self.matrices[self.next];
        self.next = (self.next + 1) % self.matrices.len();
        matrix.prepare(x, tokens, &mut self.inputs).unwrap();
        matrix.multiply(0..matrix.rows(), &self.inputs, out);
    }
}

/// A program that measures its own products.
struct Peer {
    child: Child,
    answers: BufReader<std::process::ChildStdout>,
}

impl Peer {
    fn start(command: &str) -> Self {
        let mut child = Command::new("sh")
            .args(["-c", command])
            // Not where cargo starts benchmarks, but where the command was typed.
            .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the peer starts");
        let mut answers = BufReader::new(child.stdout.take().unwrap());
        let mut names = String::new();
        answers.read_line(&mut names).unwrap();
        assert!(names.starts_with('['), "the peer says what it measures: {names:?}");
        Self { child, answers }
    }

    fn round(&mut self, times: &mut BTreeMap<(usize, usize, String), Times>) {
        let input = self.child.stdin.as_mut().unwrap();
        input.write_all(b"\n").unwrap();
        input.flush().unwrap();
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        let all: Vec<serde_json::Value> = serde_json::from_str(&line).expect("the peer's times");
        for (i, one) in all.iter().enumerate() {
            let tokens = one["tokens"].as_u64().unwrap() as usize;
            let key = (tokens, 1000 + i, format!("llama.cpp {}", one["name"].as_str().unwrap()));
            let times = times.entry(key).or_default();
            times.bytes = one["bytes"].as_u64().unwrap() as usize;
            times.seconds.push(one["seconds"].as_f64().unwrap());
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

#[derive(Default)]
struct Times {
    bytes: usize,
    seconds: Vec<f64>,
}

fn measure(
    (rows, cols): (usize, usize),
    tokens: &[usize],
    products: &mut [Box<dyn Product>],
    mut peer: Option<Peer>,
) {
    let streamed = vec![1u64; WORKING_SET / 8];
    // As our matrices lie.
    let in_huge_pages = Room::of(&streamed);
    let mut times: BTreeMap<(usize, usize, String), Times> = BTreeMap::new();
    let (mut reads, mut slow_reads, mut peaks) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        for (words, reads) in [(&*streamed, &mut slow_reads), (&in_huge_pages, &mut reads)] {
            let start = on_core();
            black_box(sum(black_box(words)));
            reads.push(WORKING_SET as f64 / (on_core() - start) / 1e9);
        }
        peaks.push(fma_peak());
        for &tokens in tokens {
            let x: Vec<f32> =
                (0..cols * tokens).map(|i| ((i * 2_654_435_761) % 2001) as f32 / 1000.0 - 1.0).collect();
            let mut out = vec![0.0; rows * tokens];
            for (i, product) in products.iter_mut().enumerate() {
                let turns = if tokens == 1 { product.copies() } else { product.copies().div_ceil(4).max(4) };
                let start = on_core();
                for _ in 0..turns {
                    product.run(black_box(&x), tokens, black_box(&mut out));
                }
                let seconds = (on_core() - start) / turns as f64;
                let times = times.entry((tokens, i, product.name())).or_default();
                times.bytes = product.bytes();
                // The first round warms up.
                times.seconds.extend((round > 0).then_some(seconds));
            }
        }
        if let Some(peer) = &mut peer {
            peer.round(&mut times);
        }
    }
    let (read, slow, peak) = (median(&reads), median(&slow_reads), median(&peaks));
    println!(
        "{rows} x {cols}; one thread reads {slow:.1} GB/s, {read:.1} from huge pages, and makes {peak:.0} GFLOP/s of fused \
         multiply-adds"
    );
    println!(
        "median of {ROUNDS} rounds (fastest .. slowest); 10^9 products of weight and activation a second"
    );
    for &tokens in tokens {
        let of = |name: &str| {
            let found = times.iter().filter(|((t, _, n), _)| *t == tokens && n.starts_with(name));
            found.map(|(_, times)| median(&times.seconds)).reduce(f64::min)
        };
        println!("{tokens} tokens");
        println!(
            "  product               us   (fastest .. slowest)   10^9/s    GB/s  of read  to bf16  to Q4_0"
        );
        for ((_, _, name), times) in times.iter().filter(|((t, ..), _)| *t == tokens) {
            let seconds = median(&times.seconds);
            let (fastest, slowest) =
                times.seconds.iter().fold((f64::MAX, 0.0f64), |(a, b), s| (a.min(*s), b.max(*s)));
            let against =
                |other: Option<f64>| other.map_or("-".to_owned(), |s| format!("{:.2}", s / seconds));
            let gb = times.bytes as f64 / seconds / 1e9;
            println!(
                "  {name:26} {:7.0} ({:6.0} .. {:6.0}) {:8.1} {gb:7.1} {:6.0} % {:>8} {:>8}",
                seconds * 1e6,
                fastest * 1e6,
                slowest * 1e6,
                (rows * cols * tokens) as f64 / seconds / 1e9,
                gb / read * 100.0,
                against(of("bf16")),
                against(of("llama.cpp Q4_0")),
            );
        }
    }
}

/// Seconds that this thread ran.
fn on_core() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
