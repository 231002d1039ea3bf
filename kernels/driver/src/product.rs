//! A product of cuBLAS, done in the emulator's memory.

use llmpress_emulator::Emulator;
use llmpress_kernels::gpu::{Backend, Result};

/// `C = alpha A^T B + beta C`, column-major: A `[k, m]`, B `[k, n]`, C `[m, n]`.
#[derive(Clone, Debug)]
pub(crate) struct Product {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) alpha: f32,
    pub(crate) beta: f32,
    pub(crate) a: (u64, usize),
    pub(crate) b: (u64, usize),
    pub(crate) c: (u64, usize),
    pub(crate) wide: bool,
}

fn widened(words: &[u8], at: usize) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes([words[2 * at], words[2 * at + 1]])) << 16)
}

fn rounded(x: f32) -> u16 {
    let bits = x.to_bits();
    // To the nearest, ties to even.
    (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

impl Product {
    /// Where the operands lie, and how many bytes they have.
    pub(crate) fn sizes(&self) -> [(u64, usize); 3] {
        let bytes = |columns: usize, (_, ld): (u64, usize), rows: usize| (columns - 1) * ld + rows;
        let each = if self.wide { 4 } else { 2 };
        [
            (self.a.0, 2 * bytes(self.m, self.a, self.k)),
            (self.b.0, 2 * bytes(self.n, self.b, self.k)),
            (self.c.0, each * bytes(self.n, self.c, self.m)),
        ]
    }

    pub(crate) fn run(&self, emulator: &Emulator) -> Result<()> {
        let read = |(address, bytes): (u64, usize)| {
            let mut data = vec![0; bytes];
            emulator.read(address, &mut data).map(|()| data)
        };
        let [a, b, c] = self.sizes();
        let (a, b, mut out) = (read(a)?, read(b)?, read(c)?);
        for column in 0..self.n {
            for row in 0..self.m {
                let term = |i| widened(&a, row * self.a.1 + i) * widened(&b, column * self.b.1 + i);
                let sum: f32 = (0..self.k).map(term).sum();
                let at = column * self.c.1 + row;
                // What is multiplied by zero is not read.
                let before = match (self.beta == 0.0, self.wide) {
                    (true, _) => 0.0,
                    (_, true) => {
                        f32::from_le_bytes([out[4 * at], out[4 * at + 1], out[4 * at + 2], out[4 * at + 3]])
                    }
                    _ => widened(&out, at),
                };
                let value = self.alpha * sum + if self.beta == 0.0 { 0.0 } else { self.beta * before };
                if self.wide {
                    out[4 * at..4 * at + 4].copy_from_slice(&value.to_le_bytes());
                } else {
                    out[2 * at..2 * at + 2].copy_from_slice(&rounded(value).to_le_bytes());
                }
            }
        }
        emulator.write(c.0, &out)
    }
}
