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
            let (low, high) = planes.split_at_mut(2 * elements);
            let (a, b) = low.split_at_mut(elements);
            let (c, d) = high.split_at_mut(elements);
            for ((((element, a), b), c), d) in bytes.as_chunks().0.iter().zip(a).zip(b).zip(c).zip(d) {
                [*a, *b, *c, *d] = u32::from_le_bytes(*element).rotate_left(turn).to_le_bytes();
            }
        }
        8 => {
            let (squares, tail) = bytes.as_chunks::<64>();
            let (elements_done, whole) = (squares.len() * 8, elements);
            for (number, square) in squares.iter().enumerate() {
                let mut rows = [0; 8];
                for (row, element) in rows.iter_mut().zip(square.as_chunks().0) {
                    *row = u64::from_le_bytes(*element).rotate_left(turn);
                }
                for (plane, row) in transpose(rows).into_iter().enumerate() {
                    planes[plane * whole + number * 8..][..8].copy_from_slice(&row.to_le_bytes());
                }
            }
            for (i, element) in tail.as_chunks().0.iter().enumerate() {
                let element = u64::from_le_bytes(*element).rotate_left(turn).to_le_bytes();
                for (plane, byte) in element.into_iter().enumerate() {
                    planes[plane * whole + elements_done + i] = byte;
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
    for (distance, mask) in [(4, 0xffff_ffff), (2, 0xffff_0000_ffff), (1, 0x00ff_00ff_00ff_00ff_u64)] {
        for i in 0..8 {
            if i & distance == 0 {
                let other = i + distance;
                let change = (rows[i] >> (8 * distance) ^ rows[other]) & mask;
                rows[other] ^= change;
                rows[i] ^= change << (8 * distance);
            }
        }
    }
    rows
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
