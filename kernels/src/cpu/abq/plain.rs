//! The scalar reference: what every other path must equal bit for bit.

use std::ops::Range;

use super::inputs::{Chunk, Floats, Form, Integers, MOST_TOKENS};
use super::layout::{Line, Zeros, fields};
use super::{BLOCK_COLS, Matrix, TILE_ROWS};

/// `totals[tile * padded + token][row]`.
pub(super) fn multiply(
    matrix: &Matrix,
    tiles: Range<usize>,
    chunk: &Chunk<'_>,
    totals: &mut [[f32; TILE_ROWS]],
) {
    for (tile, totals) in tiles.zip(totals.chunks_exact_mut(chunk.padded)) {
        totals.fill([0.0; TILE_ROWS]);
        for group in 0..matrix.groups {
            match chunk.form {
                Form::Floats(x) => floats(matrix, tile, group, &x, totals),
                Form::Integers(x) => integers(matrix, tile, group, &x, totals),
            }
        }
        if let Form::Integers(x) = chunk.form {
            for (totals, step) in totals.iter_mut().zip(x.steps) {
                totals.iter_mut().for_each(|total| *total *= step);
            }
        }
    }
}

/// The codes of a block, `[column][row]`.
pub(super) fn codes(lines: &[Line], apart: bool) -> [[u8; TILE_ROWS]; BLOCK_COLS] {
    let mut codes = [[0; TILE_ROWS]; BLOCK_COLS];
    let (fields, count) = fields(lines.len(), apart);
    for field in &fields[..count] {
        let mask = u8::MAX >> (8 - field.bits);
        for (quad, codes) in codes.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let at = quad * field.bits;
            let line = &lines[field.offset + at / 8].0;
            for (b, codes) in codes.iter_mut().enumerate() {
                for (row, code) in codes.iter_mut().enumerate() {
                    *code |= (line[4 * row + b] >> (at % 8) & mask) << field.offset;
                }
            }
        }
    }
    codes
}

fn integers(matrix: &Matrix, tile: usize, group: usize, x: &Integers<'_>, totals: &mut [[f32; TILE_ROWS]]) {
    let padded = totals.len();
    let at = matrix.lanes(tile, group);
    let code_sums = matrix.sums.get(at);
    let mut sums = [[0i32; TILE_ROWS]; MOST_TOKENS];
    for (sums, correction) in sums.iter_mut().zip(x.corrections) {
        for (sum, codes) in sums.iter_mut().zip(code_sums) {
            *sum = codes.wrapping_mul(*correction);
        }
    }
    for block in matrix.group_blocks(group) {
        let codes = codes(&matrix.lines[matrix.block(tile, block)..][..matrix.planes], matrix.apart);
        let x = x.codes[block * padded * BLOCK_COLS..].chunks_exact(BLOCK_COLS);
        for (sums, x) in sums[..padded].iter_mut().zip(x) {
            for (codes, x) in codes.iter().zip(x) {
                for (sum, code) in sums.iter_mut().zip(codes) {
                    *sum = sum.wrapping_add(i32::from(*code) * i32::from(*x));
                }
            }
        }
    }
    for (t, (totals, sums)) in totals.iter_mut().zip(&sums).enumerate() {
        let of_inputs = x.sums[t * matrix.groups + group];
        for (row, (total, sum)) in totals.iter_mut().zip(sums).enumerate() {
            let scale = matrix.scale.get(at + row);
            let less = |zero: i32| sum.wrapping_sub(of_inputs.wrapping_mul(zero)) as f32;
            *total = match &matrix.zero {
                Zeros::Symmetric => scale.mul_add(less(1 << (matrix.bits - 1)), *total),
                Zeros::Integer(zeros) => scale.mul_add(less(zeros[at + row].into()), *total),
                Zeros::Real(offset) => {
                    offset.get(at + row).mul_add(of_inputs as f32, scale.mul_add(*sum as f32, *total))
                }
            };
        }
    }
}

fn floats(matrix: &Matrix, tile: usize, group: usize, x: &Floats<'_>, totals: &mut [[f32; TILE_ROWS]]) {
    let padded = totals.len();
    let at = matrix.lanes(tile, group);
    let centre = matrix.centre();
    let mut sums = [[0.0f32; TILE_ROWS]; MOST_TOKENS];
    for block in matrix.group_blocks(group) {
        let codes = codes(&matrix.lines[matrix.block(tile, block)..][..matrix.planes], matrix.apart);
        let x = x.x[block * padded * BLOCK_COLS..].chunks_exact(padded);
        for (codes, x) in codes.iter().zip(x) {
            for (sums, x) in sums.iter_mut().zip(x) {
                for (sum, code) in sums.iter_mut().zip(codes) {
                    *sum = (f32::from(*code) - centre).mul_add(*x, *sum);
                }
            }
        }
    }
    for (t, (totals, sums)) in totals.iter_mut().zip(&sums).enumerate() {
        let of_inputs = x.sums[t * matrix.groups + group];
        for (row, (total, sum)) in totals.iter_mut().zip(sums).enumerate() {
            let scale = matrix.scale.get(at + row);
            *total = match &matrix.zero {
                Zeros::Symmetric => scale.mul_add(*sum, *total),
                Zeros::Integer(zeros) => {
                    let sum = (centre - f32::from(zeros[at + row])).mul_add(of_inputs, *sum);
                    scale.mul_add(sum, *total)
                }
                Zeros::Real(offset) => {
                    let offset = scale.mul_add(centre, offset.get(at + row));
                    offset.mul_add(of_inputs, scale.mul_add(*sum, *total))
                }
            };
        }
    }
}
