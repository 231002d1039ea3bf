//! Elements to byte planes and back.
//!
//! Both directions take widths of 1, 2, 4 and 8 and slices that fit together, which [`super`] has checked;
//! other widths and rests are left alone.

/// Splits `bytes` into `planes`, one after another, least significant first.
pub fn split(width: usize, rotate: bool, bytes: &[u8], planes: &mut [u8]) {
    let turn = u32::from(rotate);
    let elements = bytes.len() / width;
    match width {
        1 => {
            for (plane, byte) in planes.iter_mut().zip(bytes) {
                *plane = byte.rotate_left(turn);
            }
        }
        2 => {
            let (low, high) = planes.split_at_mut(elements);
            for ((element, low), high) in bytes.as_chunks().0.iter().zip(low).zip(high) {
                [*low, *high] = u16::from_le_bytes(*element).rotate_left(turn).to_le_bytes();
            }
        }
        4 => {
            let (squares, tail) = bytes.as_chunks::<32>();
            for (number, square) in squares.iter().enumerate() {
                // Two squares of four elements side by side.
                let mut rows = [0; 4];
                let (left, right) = square.split_at(16);
                for ((row, left), right) in rows.iter_mut().zip(left.as_chunks().0).zip(right.as_chunks().0) {
                    let left = u64::from(u32::from_le_bytes(*left).rotate_left(turn));
                    let right = u64::from(u32::from_le_bytes(*right).rotate_left(turn));
                    *row = left | right << 32;
                }
                exchange(&mut rows, 2, 0x0000_ffff_0000_ffff);
                exchange(&mut rows, 1, 0x00ff_00ff_00ff_00ff);
                for (plane, row) in rows.into_iter().enumerate() {
                    planes[plane * elements + number * 8..][..8].copy_from_slice(&row.to_le_bytes());
                }
            }
            for (i, element) in tail.as_chunks().0.iter().enumerate() {
                let element = u32::from_le_bytes(*element).rotate_left(turn).to_le_bytes();
                for (plane, byte) in element.into_iter().enumerate() {
                    planes[plane * elements + squares.len() * 8 + i] = byte;
                }
            }
        }
        8 => {
            let (squares, tail) = bytes.as_chunks::<64>();
            for (number, square) in squares.iter().enumerate() {
                let mut rows = [0; 8];
                for (row, element) in rows.iter_mut().zip(square.as_chunks().0) {
                    *row = u64::from_le_bytes(*element).rotate_left(turn);
                }
                for (plane, row) in transpose(rows).into_iter().enumerate() {
                    planes[plane * elements + number * 8..][..8].copy_from_slice(&row.to_le_bytes());
                }
            }
            for (i, element) in tail.as_chunks().0.iter().enumerate() {
                let element = u64::from_le_bytes(*element).rotate_left(turn).to_le_bytes();
                for (plane, byte) in element.into_iter().enumerate() {
                    planes[plane * elements + squares.len() * 8 + i] = byte;
                }
            }
        }
        _ => {}
    }
}

/// Joins equally long `planes`, least significant first, to the elements of `out`.
pub fn join(rotate: bool, planes: &[&[u8]], out: &mut [u8]) {
    let turn = u32::from(rotate);
    match *planes {
        [plane] => {
            for (byte, plane) in out.iter_mut().zip(plane) {
                *byte = plane.rotate_right(turn);
            }
        }
        [low, high] => {
            for ((element, &low), &high) in out.as_chunks_mut().0.iter_mut().zip(low).zip(high) {
                *element = u16::from_le_bytes([low, high]).rotate_right(turn).to_le_bytes();
            }
        }
        [a, b, c, d] => {
            let elements = out.as_chunks_mut().0.iter_mut();
            for ((((element, &a), &b), &c), &d) in elements.zip(a).zip(b).zip(c).zip(d) {
                *element = u32::from_le_bytes([a, b, c, d]).rotate_right(turn).to_le_bytes();
            }
        }
        [first, ..] if planes.len() == 8 => {
            let (squares, tail) = out.as_chunks_mut::<64>();
            let done = first.len() / 8 * 8;
            for (number, square) in squares.iter_mut().enumerate() {
                let mut rows = [0; 8];
                for (row, plane) in rows.iter_mut().zip(planes) {
                    if let Some(&eight) = plane[number * 8..].first_chunk() {
                        *row = u64::from_le_bytes(eight);
                    }
                }
                for (row, element) in transpose(rows).into_iter().zip(square.as_chunks_mut().0) {
                    *element = row.rotate_right(turn).to_le_bytes();
                }
            }
            for (i, element) in tail.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                for (byte, plane) in element.iter_mut().zip(planes) {
                    *byte = plane[done + i];
                }
                *element = u64::from_le_bytes(*element).rotate_right(turn).to_le_bytes();
            }
        }
        _ => {}
    }
}

/// Byte `i` of row `j` becomes byte `j` of row `i`: blocks of four bytes change places, then of two, of one.
fn transpose(mut rows: [u64; 8]) -> [u64; 8] {
    exchange(&mut rows, 4, 0x0000_0000_ffff_ffff);
    exchange(&mut rows, 2, 0x0000_ffff_0000_ffff);
    exchange(&mut rows, 1, 0x00ff_00ff_00ff_00ff);
    rows
}

/// Of rows `distance` apart, the upper one's bytes above the mask and the lower one's under it change places.
#[inline(always)]
fn exchange<const ROWS: usize>(rows: &mut [u64; ROWS], distance: usize, mask: u64) {
    for i in 0..ROWS {
        if i & distance == 0 {
            let change = (rows[i] >> (8 * distance) ^ rows[i + distance]) & mask;
            rows[i + distance] ^= change;
            rows[i] ^= change << (8 * distance);
        }
    }
}

/// [`split`], byte by byte.
pub fn split_reference(width: usize, rotate: bool, bytes: &[u8], planes: &mut [u8]) {
    let elements = bytes.len() / width;
    for (number, element) in bytes.chunks_exact(width).enumerate() {
        for plane in 0..width {
            // Rotated left, a byte's lowest bit is the highest of the byte below it, around the end.
            let below = element[(plane + width - 1) % width];
            let byte = element[plane];
            planes[plane * elements + number] = if rotate { byte << 1 | below >> 7 } else { byte };
        }
    }
}

/// [`join`], byte by byte.
pub fn join_reference(rotate: bool, planes: &[&[u8]], out: &mut [u8]) {
    let width = planes.len();
    for (number, element) in out.chunks_exact_mut(width).enumerate() {
        for (plane, to) in element.iter_mut().enumerate() {
            let (byte, above) = (planes[plane][number], planes[(plane + 1) % width][number]);
            *to = if rotate { byte >> 1 | above << 7 } else { byte };
        }
    }
}
