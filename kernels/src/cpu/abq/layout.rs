//! Tiles of 16 rows: codes cut into fields of 4, 2 and 1 bits, each field packed into lines of its own.
//!
//! ```text
//! line of a field of f bits:   word r = row r;   bits 8 b + f i .. of it = column 4 (8/f v + i) + b    (line v of the field)
//! fields by width:   1: 1   2: 2   3: 2+1   4: 4   5: 4+1   6: 4+2   7: 4+2+1   8: 4+4      apart: 1+1+...
//! ```
//!
//! So shifting a line by f i and masking its bytes gives, for each row, the fields of four neighbouring columns in a word.

use super::{BLOCK_COLS, Fault, MOST_COLS, Matrix, STRIP, Stored, TILE_ROWS, Zero, place, strip_tiles};
use crate::cpu::Elements;
use crate::cpu::pages::Room;

/// What a processor reads at once: a word a row.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [u8; 64]);

// SAFETY: bytes, and nothing between them.
#[allow(unsafe_code)]
unsafe impl bytemuck::Zeroable for Line {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl bytemuck::Pod for Line {}

/// Some bits of the codes.
#[derive(Clone, Copy, Debug)]
pub(in crate::cpu) struct Field {
    /// How many: 1, 2 or 4, as many as it has lines.
    pub(in crate::cpu) bits: usize,
    /// The lowest of them; also its first line.
    pub(in crate::cpu) offset: usize,
}

/// The fields of codes of `planes` bits, and how many there are.
pub(in crate::cpu) const fn fields(planes: usize, apart: bool) -> ([Field; 8], usize) {
    let mut fields = [Field { bits: 0, offset: 0 }; 8];
    let (mut count, mut offset) = (0, 0);
    while offset < planes {
        let bits = match planes - offset {
            _ if apart => 1,
            4.. => 4,
            2.. => 2,
            _ => 1,
        };
        fields[count] = Field { bits, offset };
        offset += bits;
        count += 1;
    }
    (fields, count)
}

/// Values as they are stored, here of 16 rows side by side.
#[derive(Debug)]
pub(in crate::cpu) enum Lanes {
    F32(Room<f32>),
    Bf16(Room<u16>),
    F16(Room<u16>),
}

impl Lanes {
    /// In the order in which they are given.
    pub(in crate::cpu) fn of(elements: Elements<'_>) -> Self {
        match elements {
            Elements::F32(x) => Self::F32(Room::of(x)),
            Elements::Bf16(x) => Self::Bf16(Room::of(x)),
            Elements::F16(x) => Self::F16(Room::of(x)),
        }
    }

    pub(super) fn get(&self, i: usize) -> f32 {
        self.elements().get(i)
    }

    pub(in crate::cpu) fn bytes(&self) -> usize {
        match self {
            Self::F32(x) => 4 * x.len(),
            Self::Bf16(x) | Self::F16(x) => 2 * x.len(),
        }
    }

    pub(in crate::cpu) fn elements(&self) -> Elements<'_> {
        match self {
            Self::F32(x) => Elements::F32(x),
            Self::Bf16(x) => Elements::Bf16(x),
            Self::F16(x) => Elements::F16(x),
        }
    }
}

/// What stands for zero, `[strip][group][tile][16]`.
#[derive(Debug)]
pub(super) enum Zeros {
    Symmetric,
    Integer(Room<u8>),
    Real(Lanes),
}

/// Sums of the codes of a group, as narrow as they fit.
#[derive(Debug)]
pub(super) enum Sums {
    /// The activations' form needs none.
    None,
    Narrow(Room<u16>),
    Wide(Room<u32>),
}

impl Sums {
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::None => 0,
            Self::Narrow(sums) => 2 * sums.len(),
            Self::Wide(sums) => 4 * sums.len(),
        }
    }

    /// Of 16 rows.
    pub(super) fn get(&self, at: usize) -> [i32; TILE_ROWS] {
        let mut out = [0; TILE_ROWS];
        for (i, out) in out.iter_mut().enumerate() {
            *out = match self {
                Self::None => 0,
                Self::Narrow(sums) => i32::from(sums[at + i]),
                Self::Wide(sums) => sums[at + i] as i32,
            };
        }
        out
    }
}

/// Whether planes keep lines of their own: where counting common bits beats multiplying codes.
fn apart(planes: u8, activation_bits: Option<u8>) -> bool {
    activation_bits.is_some_and(|bits| planes * bits <= MOST_PLANE_PAIRS)
}

/// Most pairs of a plane of weights and one of activations that are counted: measured, for one token and for 16.
const MOST_PLANE_PAIRS: u8 = 4;

/// Looks at widths and sizes; how many groups a row has.
pub(in crate::cpu) fn check(stored: &Stored<'_>) -> Result<usize, Fault> {
    let &Stored { rows, cols, bits, planes, activation_bits, .. } = stored;
    if !(1..=8).contains(&bits) || !(1..=8).contains(&planes) || !(bits..=bits + 1).contains(&planes) {
        return Err(Fault::Shape(format!("there are no weights of {bits} bits in {planes} planes")));
    }
    if let Some(bits) = activation_bits.filter(|bits| !(1..=8).contains(bits)) {
        return Err(Fault::Shape(format!("there are no activations of {bits} bits")));
    }
    let asked = stored.group_size.unwrap_or_else(|| whole(cols));
    if asked == 0 || !asked.is_multiple_of(BLOCK_COLS) {
        return Err(Fault::Shape(format!("a group of {asked} columns is no multiple of {BLOCK_COLS}")));
    }
    let groups = cols.div_ceil(asked);
    let size = |component, found, a: usize, b: usize, c: usize| {
        let expected = a.checked_mul(b).and_then(|n| n.checked_mul(c)).unwrap_or(usize::MAX);
        if found == expected { Ok(()) } else { Err(Fault::Size { component, found, expected }) }
    };
    size("planes", stored.words.len(), usize::from(planes), rows, cols.div_ceil(BLOCK_COLS))?;
    size("scale", stored.scale.len(), rows, groups, 1)?;
    match stored.zero {
        Zero::Symmetric => {}
        Zero::Integer(zero) => size("zero", zero.len(), rows, groups, 1)?,
        Zero::Real(offset) => size("offset", offset.len(), rows, groups, 1)?,
    }
    Ok(groups)
}

/// Columns of whole blocks; at least one.
fn whole(cols: usize) -> usize {
    cols.max(1).next_multiple_of(BLOCK_COLS)
}

pub(super) fn regroup(stored: &Stored<'_>) -> Result<Matrix, Fault> {
    let &Stored { rows, cols, bits, planes, activation_bits, .. } = stored;
    let asked_groups = check(stored)?;
    let whole = whole(cols);
    let asked = stored.group_size.unwrap_or(whole);
    let group = match asked.min(whole) {
        fits @ ..=MOST_COLS => fits,
        _ if asked_groups == 1 => MOST_COLS,
        _ => 1 << asked.trailing_zeros().min(MOST_COLS.trailing_zeros()),
    };
    let groups = cols.div_ceil(group);
    let order = Order { rows, groups, asked_groups, ratio: asked.min(whole) / group };
    let apart = apart(planes, activation_bits);
    let sums = if apart || activation_bits == Some(8) {
        code_sums(stored, groups, group / BLOCK_COLS)
    } else {
        Sums::None
    };
    Ok(Matrix {
        rows,
        cols,
        group,
        groups,
        bits,
        planes: usize::from(planes),
        apart,
        activation_bits,
        lines: lines(stored, apart),
        scale: order.lanes(stored.scale),
        zero: match stored.zero {
            Zero::Symmetric => Zeros::Symmetric,
            Zero::Integer(zero) => Zeros::Integer(order.tiled(|at| zero[at])),
            Zero::Real(offset) => Zeros::Real(order.lanes(offset)),
        },
        sums,
    })
}

/// From `[rows, groups as stored]` to `[strip][group][tile][16]`.
struct Order {
    rows: usize,
    groups: usize,
    asked_groups: usize,
    /// Pieces of a stored group.
    ratio: usize,
}

impl Order {
    fn tiled<T: bytemuck::Pod>(&self, get: impl Fn(usize) -> T) -> Room<T> {
        let mut out = Room::new(self.rows.next_multiple_of(TILE_ROWS) * self.groups);
        let mut places = out.iter_mut();
        for first in (0..self.rows.div_ceil(TILE_ROWS)).step_by(STRIP) {
            let rows = first * TILE_ROWS..(first + strip_tiles(self.rows, first)) * TILE_ROWS;
            for group in 0..self.groups {
                let stored = (group / self.ratio).min(self.asked_groups - 1);
                for (row, place) in rows.clone().zip(&mut places) {
                    if row < self.rows {
                        *place = get(row * self.asked_groups + stored);
                    }
                }
            }
        }
        out
    }

    fn lanes(&self, elements: Elements<'_>) -> Lanes {
        match elements {
            Elements::F32(x) => Lanes::F32(self.tiled(|at| x[at])),
            Elements::Bf16(x) => Lanes::Bf16(self.tiled(|at| x[at])),
            Elements::F16(x) => Lanes::F16(self.tiled(|at| x[at])),
        }
    }
}

fn code_sums(stored: &Stored<'_>, groups: usize, group_blocks: usize) -> Sums {
    let &Stored { rows, cols, planes, .. } = stored;
    let words = cols.div_ceil(BLOCK_COLS);
    let mut sums = vec![0u32; rows.next_multiple_of(TILE_ROWS) * groups];
    for plane in 0..usize::from(planes) {
        for row in 0..rows {
            let row_words = &stored.words[(plane * rows + row) * words..][..words];
            for (group, words) in row_words.chunks(group_blocks).enumerate() {
                let count: u32 = words.iter().map(|word| word.count_ones()).sum();
                let at = place(rows, groups, row / TILE_ROWS, group) * TILE_ROWS;
                sums[at + row % TILE_ROWS] += count << plane;
            }
        }
    }
    if sums.iter().all(|sum| *sum <= u32::from(u16::MAX)) {
        let narrow: Vec<u16> = sums.iter().map(|sum| *sum as u16).collect();
        Sums::Narrow(Room::of(&narrow))
    } else {
        Sums::Wide(Room::of(&sums))
    }
}

/// `spread[byte]`: bit i of the byte at bit 4 i.
const SPREAD: [u32; 256] = {
    let mut spread = [0u32; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut bit = 0;
        while bit < 8 {
            spread[byte] |= ((byte as u32 >> bit) & 1) << (4 * bit);
            bit += 1;
        }
        byte += 1;
    }
    spread
};

/// Bits 4 i + b of a word, as bits i of byte b: the order of a line of single bits.
pub(super) fn transposed(word: u32) -> u32 {
    let mut out = 0;
    for b in 0..4 {
        let mut bits = (word >> b) & 0x1111_1111;
        bits = (bits | bits >> 3) & 0x0303_0303;
        bits = (bits | bits >> 6) & 0x000f_000f;
        bits = (bits | bits >> 12) & 0xff;
        out |= bits << (8 * b);
    }
    out
}

fn lines(stored: &Stored<'_>, apart: bool) -> Room<Line> {
    let &Stored { rows, cols, planes, .. } = stored;
    let planes = usize::from(planes);
    let words = cols.div_ceil(BLOCK_COLS);
    let (fields, count) = fields(planes, apart);
    let mut lines = Room::<Line>::new(rows.div_ceil(TILE_ROWS) * words * planes);
    for row in 0..rows {
        for word in 0..words {
            let at = place(rows, words, row / TILE_ROWS, word) * planes;
            let lines = &mut lines[at..at + planes];
            for field in &fields[..count] {
                let mut bits = [0; 4];
                for (i, bits) in bits[..field.bits].iter_mut().enumerate() {
                    *bits = transposed(stored.words[((field.offset + i) * rows + row) * words + word]);
                }
                for b in 0..4 {
                    // Eight fields, one a nibble.
                    let nibbles = bits.iter().enumerate().fold(0, |nibbles, (i, bits)| {
                        nibbles | SPREAD[(bits >> (8 * b) & 0xff) as usize] << i
                    });
                    for v in 0..field.bits {
                        let part = match field.bits {
                            4 => nibbles >> (8 * v),
                            2 => {
                                let four = nibbles >> (16 * v) & 0x3333;
                                let pairs = (four | four >> 2) & 0x0f0f;
                                pairs | pairs >> 4
                            }
                            _ => bits[0] >> (8 * b),
                        };
                        lines[field.offset + v].0[row % TILE_ROWS * 4 + b] = part as u8;
                    }
                }
            }
        }
    }
    lines
}

impl Matrix {
    /// One code.
    pub(super) fn code(&self, row: usize, col: usize) -> u8 {
        let lines = &self.lines[self.block(row / TILE_ROWS, col / BLOCK_COLS)..];
        let (quad, byte) = (col % BLOCK_COLS / 4, row % TILE_ROWS * 4 + col % 4);
        let (fields, count) = fields(self.planes, self.apart);
        fields[..count].iter().fold(0, |code, field| {
            let at = quad * field.bits;
            let bits = lines[field.offset + at / 8].0[byte] >> (at % 8) & (u8::MAX >> (8 - field.bits));
            code | bits << field.offset
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fields_of_every_width_are_its_bits() {
        for planes in 1..=8 {
            for apart in [false, true] {
                let (fields, count) = fields(planes, apart);
                let bits: usize = fields[..count].iter().map(|field| field.bits).sum();
                assert_eq!(bits, planes);
                assert!(fields[..count].windows(2).all(|two| two[0].offset + two[0].bits == two[1].offset));
            }
        }
    }

    #[test]
    fn bits_of_a_word_are_regrouped_by_columns_of_four() {
        for col in 0..32 {
            assert_eq!(transposed(1 << col), 1 << (8 * (col % 4) + col / 4));
        }
    }
}
