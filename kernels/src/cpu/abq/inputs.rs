//! Activations as products take them: chunks of up to 16 tokens, padded to a power of two of them.
//!
//! ```text
//! single precision:  chunk | column | token                 and sums of groups, token by token
//! codes less z:      chunk | block of 32 | token | 32 bytes
//! planes of codes:   chunk | block of 32 | token | plane, a word in the order of a line of single bits
//! ```

use super::activation::{Grid, NotFinite, quantise_with};
use super::layout::transposed;
use super::{BLOCK_COLS, TILE_ROWS};
use crate::cpu::isa::{Isa, multiversion};

/// Most tokens of a chunk: their sums fill the registers.
pub(super) const MOST_TOKENS: usize = 16;
const _: () = assert!(MOST_TOKENS == TILE_ROWS);

/// Activations prepared for products with matrices of one shape. Kept from product to product, it allocates seldom.
#[derive(Debug, Default)]
pub struct Inputs {
    tokens: usize,
    cols: usize,
    group: usize,
    /// Of the codes; `None` in single precision.
    bits: Option<u8>,
    floats: Vec<f32>,
    /// `[token padded][group]`.
    float_sums: Vec<f32>,
    codes: Vec<i8>,
    planes: Vec<u32>,
    /// Whether `planes` hold the codes.
    counted: bool,
    /// Of each padded token.
    steps: Vec<f32>,
    corrections: Vec<i32>,
    /// `[token padded][group]`.
    code_sums: Vec<i32>,
    /// A token on its way.
    token: Vec<f32>,
    token_codes: Vec<u8>,
}

/// Some tokens.
#[derive(Clone, Copy)]
pub(super) struct Chunk<'a> {
    /// The first one, of the panel.
    pub(super) first: usize,
    /// How many there are.
    pub(super) tokens: usize,
    /// How many are computed.
    pub(super) padded: usize,
    pub(super) form: Form<'a>,
}

/// What they are.
#[derive(Clone, Copy)]
pub(super) enum Form<'a> {
    Floats(Floats<'a>),
    Integers(Integers<'a>),
}

#[derive(Clone, Copy)]
pub(super) struct Floats<'a> {
    /// `[column][padded]`, whole blocks.
    pub(super) x: &'a [f32],
    /// `[padded][group]`.
    pub(super) sums: &'a [f32],
}

#[derive(Clone, Copy)]
pub(super) struct Integers<'a> {
    /// `[block][padded][32]`: codes, less `z` for up to 7 bits, less 128 for 8.
    pub(super) codes: &'a [i8],
    /// `[block][padded][bits]`, in place of `codes` where bits are counted: codes as they are.
    pub(super) planes: &'a [u32],
    pub(super) bits: usize,
    /// What a sum of weight codes is multiplied with to make up for the difference from codes less z.
    pub(super) corrections: &'a [i32],
    pub(super) steps: &'a [f32],
    /// `[padded][group]`: sums of codes less z.
    pub(super) sums: &'a [i32],
}

impl Inputs {
    /// How many tokens were prepared.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    pub(super) fn fits(&self, cols: usize, group: usize, bits: Option<u8>, counted: bool) -> bool {
        let same = (self.cols, self.bits, self.counted) == (cols, bits, counted);
        same && (self.group == group || cols == 0)
    }

    /// First token, tokens and padded tokens of every chunk.
    fn spans(tokens: usize) -> impl Iterator<Item = (usize, usize, usize)> {
        (0..tokens).step_by(MOST_TOKENS).map(move |first| {
            let count = (tokens - first).min(MOST_TOKENS);
            (first, count, count.next_power_of_two())
        })
    }

    pub(super) fn chunks(&self) -> impl Iterator<Item = Chunk<'_>> {
        let whole = self.cols.next_multiple_of(BLOCK_COLS);
        let groups = self.cols.div_ceil(self.group.max(1));
        Self::spans(self.tokens).map(move |(first, tokens, padded)| {
            // Chunks before this one are full.
            let form = match self.bits {
                None => Form::Floats(Floats {
                    x: &self.floats[first * whole..][..padded * whole],
                    sums: &self.float_sums[first * groups..][..padded * groups],
                }),
                Some(bits) => {
                    let bits = usize::from(bits);
                    let words = whole / BLOCK_COLS * bits;
                    Form::Integers(Integers {
                        codes: if self.counted {
                            &[]
                        } else {
                            &self.codes[first * whole..][..padded * whole]
                        },
                        planes: if self.counted {
                            &self.planes[first * words..][..padded * words]
                        } else {
                            &[]
                        },
                        bits,
                        corrections: &self.corrections[first..][..padded],
                        steps: &self.steps[first..][..padded],
                        sums: &self.code_sums[first * groups..][..padded * groups],
                    })
                }
            };
            Chunk { first, tokens, padded, form }
        })
    }

    fn shape(&mut self, tokens: usize, cols: usize, group: usize, bits: Option<u8>) -> (usize, usize) {
        (self.tokens, self.cols, self.group, self.bits) = (tokens, cols, group, bits);
        let padded = Self::spans(tokens).map(|(.., padded)| padded).sum();
        (padded, cols.div_ceil(group))
    }

    pub(super) fn floats(&mut self, isa: Isa, x: &[f32], tokens: usize, cols: usize, group: usize) {
        let (padded, groups) = self.shape(tokens, cols, group, None);
        self.counted = false;
        let whole = cols.next_multiple_of(BLOCK_COLS);
        self.floats.clear();
        self.floats.resize(padded * whole, 0.0);
        self.float_sums.clear();
        self.float_sums.resize(padded * groups, 0.0);
        for (first, count, width) in Self::spans(tokens) {
            let to = &mut self.floats[first * whole..][..width * whole];
            for (to, x) in to.chunks_exact_mut(width).zip(x.chunks_exact(tokens)) {
                to[..count].copy_from_slice(&x[first..first + count]);
            }
        }
        for t in 0..tokens {
            let token = token(x, tokens, t, &mut self.token);
            let sums = &mut self.float_sums[t * groups..][..groups];
            multiversion!(isa, group_sums(token: &[f32], group: usize, sums: &mut [f32]));
        }
    }

    #[allow(clippy::too_many_arguments, reason = "the shape, as it is everywhere here")]
    pub(super) fn integers(
        &mut self,
        isa: Isa,
        x: &[f32],
        tokens: usize,
        cols: usize,
        group: usize,
        bits: u8,
        counted: bool,
    ) -> Result<(), NotFinite> {
        let (padded, groups) = self.shape(tokens, cols, group, Some(bits));
        let blocks = cols.div_ceil(BLOCK_COLS);
        self.counted = counted;
        self.codes.clear();
        self.planes.clear();
        if counted {
            self.planes.resize(padded * blocks * usize::from(bits), 0);
        } else {
            self.codes.resize(padded * blocks * BLOCK_COLS, 0);
        }
        self.steps.clear();
        self.steps.resize(padded, 0.0);
        self.corrections.clear();
        self.corrections.resize(padded, 0);
        self.code_sums.clear();
        self.code_sums.resize(padded * groups, 0);
        self.token_codes.resize(cols, 0);
        for (first, count, width) in Self::spans(tokens) {
            for t in first..first + count {
                let token = token(x, tokens, t, &mut self.token);
                let codes = &mut self.token_codes[..cols];
                let Grid { step, zero } =
                    quantise_with(isa, token, bits, codes).map_err(|_| NotFinite { token: t })?;
                self.steps[t] = step;
                let sums = &mut self.code_sums[t * groups..][..groups];
                for (sum, codes) in sums.iter_mut().zip(codes.chunks(group)) {
                    *sum = codes.iter().map(|code| i32::from(*code)).sum::<i32>()
                        - codes.len() as i32 * i32::from(zero);
                }
                let less = match bits {
                    _ if counted => 0,
                    8 => 128,
                    _ => zero,
                };
                self.corrections[t] = i32::from(less) - i32::from(zero);
                let at = (first * blocks + t - first) * BLOCK_COLS;
                for (block, codes) in codes.chunks(BLOCK_COLS).enumerate() {
                    if counted {
                        let at = (first * blocks + block * width + t - first) * usize::from(bits);
                        pack(codes, &mut self.planes[at..at + usize::from(bits)]);
                    } else {
                        let to = &mut self.codes[at + block * width * BLOCK_COLS..][..codes.len()];
                        for (to, code) in to.iter_mut().zip(codes) {
                            *to = code.wrapping_sub(less) as i8;
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

/// A token of a panel, in order.
fn token<'a>(x: &'a [f32], tokens: usize, token: usize, buffer: &'a mut Vec<f32>) -> &'a [f32] {
    if tokens == 1 {
        return x;
    }
    buffer.clear();
    buffer.extend(x.iter().skip(token).step_by(tokens));
    buffer
}

/// Bit planes of up to 32 codes, each in the order of a line of single bits.
fn pack(codes: &[u8], planes: &mut [u32]) {
    for (i, plane) in planes.iter_mut().enumerate() {
        let word = codes.iter().enumerate().fold(0, |word, (k, code)| word | u32::from(code >> i & 1) << k);
        *plane = transposed(word);
    }
}

/// Sums of each group: column k to partial sum k % 8, then halves added.
#[inline(always)]
fn group_sums(x: &[f32], group: usize, sums: &mut [f32]) {
    for (sum, x) in sums.iter_mut().zip(x.chunks(group)) {
        let mut eight = [0.0f32; 8];
        let (chunks, rest) = x.as_chunks::<8>();
        for chunk in chunks {
            for (sum, x) in eight.iter_mut().zip(chunk) {
                *sum += x;
            }
        }
        for (sum, x) in eight.iter_mut().zip(rest) {
            *sum += x;
        }
        let mut half = 4;
        while half > 0 {
            for i in 0..half {
                eight[i] += eight[i + half];
            }
            half /= 2;
        }
        *sum = eight[0];
    }
}
