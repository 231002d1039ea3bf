//! Where the kept values of a row lie: four bits a quad, two quads a byte.
//!
//! ```text
//! nibble:  bits 0-1 place of the first kept value in its quad, bits 2-3 that of the second; first < second
//! byte k:  quad 2 k in bits 0-3, quad 2 k + 1 in bits 4-7; the half that an odd last quad leaves is 0
//! ```

use super::QUAD;

/// The nibbles that there are, by the four bits that say which of a quad are kept; 0 for masks of other than two.
const OF_MASK: [u8; 16] = {
    let mut table = [0; 16];
    let mut first = 0;
    while first < QUAD {
        let mut second = first + 1;
        while second < QUAD {
            table[1 << first | 1 << second] = (first | second << 2) as u8;
            second += 1;
        }
        first += 1;
    }
    table
};

/// Bytes of a row of `cols` columns.
pub const fn row_bytes(cols: usize) -> usize {
    cols.div_ceil(2 * QUAD)
}

/// The nibble of a quad of which exactly two are kept: bit i of `mask` is set where i is. `None` for other masks.
pub fn of_mask(mask: u8) -> Option<u8> {
    OF_MASK.get(usize::from(mask)).copied().filter(|&nibble| nibble != 0)
}

/// The places of a nibble, the lower one first; `None` for nibbles that stand for no two of four.
pub fn places(nibble: u8) -> Option<(usize, usize)> {
    let (first, second) = (usize::from(nibble & 3), usize::from(nibble >> 2));
    (first < second && second < QUAD).then_some((first, second))
}

/// Which of a quad are kept, as bits; 0 for nibbles that stand for no two of four.
pub fn to_mask(nibble: u8) -> u8 {
    places(nibble).map_or(0, |(first, second)| 1 << first | 1 << second)
}

/// Makes exactly two of the places that must be kept (bits of `mask`): the lowest others fill up. `None` where more than two
/// must be.
pub fn fill_up(mask: u8) -> Option<u8> {
    let mut mask = mask & 0xf;
    while mask.count_ones() < 2 {
        mask |= mask + 1;
    }
    of_mask(mask)
}

/// The nibble of a quad in the bytes of its row.
pub fn get(row: &[u8], quad: usize) -> u8 {
    row.get(quad / 2).map_or(0, |byte| byte >> (4 * (quad % 2)) & 0xf)
}

/// Joins the nibbles of a row into `row_bytes` bytes; what is past the last is 0.
pub fn pack_row(nibbles: impl IntoIterator<Item = u8>, out: &mut [u8]) {
    out.fill(0);
    for (quad, nibble) in nibbles.into_iter().enumerate() {
        if let Some(byte) = out.get_mut(quad / 2) {
            *byte |= (nibble & 0xf) << (4 * (quad % 2));
        }
    }
}

/// Finds the positions of a row of elements of `width` bytes: what is not +0 to the bit, filled up from the lowest place.
/// `out` has [`row_bytes`] bytes.
///
/// # Errors
/// The first quad of which more than two are not +0.
pub fn choose_row(width: usize, dense: &[u8], out: &mut [u8]) -> Result<(), usize> {
    out.fill(0);
    let width = width.max(1);
    for (quad, values) in dense.chunks_exact(QUAD * width).enumerate() {
        let kept = values.chunks_exact(width).enumerate();
        let mask = kept.fold(0, |mask, (i, value)| mask | u8::from(value.iter().any(|&b| b != 0)) << i);
        let nibble = fill_up(mask).ok_or(quad)?;
        if let Some(byte) = out.get_mut(quad / 2) {
            *byte |= nibble << (4 * (quad % 2));
        }
    }
    Ok(())
}

/// Appends the kept elements, of `width` bytes each, of a dense row.
///
/// # Errors
/// The first quad whose nibble stands for no two of four.
pub fn gather(width: usize, positions: &[u8], dense: &[u8], kept: &mut Vec<u8>) -> Result<(), usize> {
    let width = width.max(1);
    for (quad, dense) in dense.chunks_exact(QUAD * width).enumerate() {
        let (first, second) = places(get(positions, quad)).ok_or(quad)?;
        kept.extend_from_slice(&dense[first * width..][..width]);
        kept.extend_from_slice(&dense[second * width..][..width]);
    }
    Ok(())
}

/// What is wrong with the positions of a row of `cols` columns, if anything is.
pub(super) fn fault(row: &[u8], cols: usize) -> Option<String> {
    let quads = cols / QUAD;
    // A byte at a time: both of its nibbles are good, or the rest finds the one that is not.
    const GOOD: [bool; 256] = {
        let mut table = [false; 256];
        let mut byte = 0;
        while byte < 256 {
            let (low, high) = (byte & 0xf, byte >> 4);
            table[byte] = low & 3 < low >> 2 && high & 3 < high >> 2;
            byte += 1;
        }
        table
    };
    let whole = &row[..row.len().min(quads / 2)];
    if let Some(byte) = whole.iter().position(|&byte| !GOOD[usize::from(byte)]) {
        let quad = 2 * byte + usize::from(places(whole[byte] & 0xf).is_some());
        return Some(no_two(quad, get(row, quad)));
    }
    if !quads.is_multiple_of(2) {
        let nibble = get(row, quads - 1);
        if places(nibble).is_none() {
            return Some(no_two(quads - 1, nibble));
        }
        if get(row, quads) != 0 {
            return Some(format!("bits are set past its {cols} columns"));
        }
    }
    None
}

fn no_two(quad: usize, nibble: u8) -> String {
    format!(
        "columns {} to {}: {nibble:#x} is not the places of two of four, the lower one first",
        quad * QUAD,
        quad * QUAD + QUAD - 1
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn six_nibbles_stand_for_two_of_four() {
        let good: Vec<u8> = (0..=255).filter(|&n| places(n).is_some()).collect();
        assert_eq!(good, [4, 8, 9, 12, 13, 14]);
        for mask in 0..=255u8 {
            let two = mask < 16 && mask.count_ones() == 2;
            assert_eq!(of_mask(mask).is_some(), two);
            assert!(of_mask(mask).is_none_or(|nibble| to_mask(nibble) == mask));
        }
    }

    #[test]
    fn what_must_be_kept_is_filled_up_from_the_lowest_place() {
        let filled = |mask| fill_up(mask).map(to_mask);
        for (mask, expected) in [(0, 0b11), (1, 0b11), (0b10, 0b11), (0b100, 0b101), (0b1000, 0b1001)] {
            assert_eq!(filled(mask), Some(expected));
        }
        for mask in 0..16u8 {
            match mask.count_ones() {
                0..=1 => assert!(filled(mask).is_some_and(|f| f & mask == mask && f.count_ones() == 2)),
                2 => assert_eq!(filled(mask), Some(mask)),
                _ => assert_eq!(filled(mask), None),
            }
        }
    }

    #[test]
    fn a_wrong_nibble_is_found_wherever_it_is() {
        for cols in (0..=44).step_by(4) {
            let quads = cols / QUAD;
            let mut row = vec![0; row_bytes(cols)];
            pack_row((0..quads).map(|q| [4, 8, 9, 12, 13, 14][q % 6]), &mut row);
            assert_eq!(fault(&row, cols), None);
            assert!((0..quads).all(|q| get(&row, q) == [4, 8, 9, 12, 13, 14][q % 6]));
            for quad in 0..row.len() * 2 {
                for nibble in (0..16u8).filter(|&n| places(n).is_none()) {
                    let mut row = row.clone();
                    row[quad / 2] = row[quad / 2] & (0xf0 >> (4 * (quad % 2))) | nibble << (4 * (quad % 2));
                    let found = fault(&row, cols);
                    match (quad < quads, nibble) {
                        (true, _) => {
                            assert!(found.is_some_and(|f| f.starts_with(&format!("columns {} to", 4 * quad))))
                        }
                        (false, 0) => assert_eq!(found, None),
                        (false, _) => assert!(found.is_some_and(|f| f.contains("past its"))),
                    }
                }
            }
        }
    }
}
