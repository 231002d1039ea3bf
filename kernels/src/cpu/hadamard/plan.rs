//! Which factors a size gets, and which signs.

use super::paley;

/// The largest size.
pub(super) const MAX_SIZE: usize = 1 << 24;

/// The factors of the largest block, the slowest index first: Paley's orders, the largest first, then a power of two.
///
/// Of all ways to write `size` as a product of Paley's orders and a power of two the one with the fewest additions a value
/// (an order costs itself, a power of two its logarithm); of equals the first found, larger orders first. Where there
/// is none: the largest power of two that divides it.
pub(super) fn factors(size: usize) -> Vec<u32> {
    if size == 0 || size > MAX_SIZE {
        return Vec::new();
    }
    let twos = size.trailing_zeros();
    let odd = size >> twos;
    let mut best: Option<(u32, Vec<u32>)> = None;
    split(odd, twos, u32::MAX, &mut Vec::new(), 0, &mut best);
    let mut factors = best.map(|(_, factors)| factors).unwrap_or_default();
    let taken: u32 = factors.iter().map(|f| f.trailing_zeros()).sum();
    if twos > taken {
        factors.push(1 << (twos - taken));
    }
    factors
}

/// Tries every order for a divisor of what is left of the odd part.
fn split(
    odd: usize,
    twos: u32,
    most: u32,
    taken: &mut Vec<u32>,
    cost: u32,
    best: &mut Option<(u32, Vec<u32>)>,
) {
    let total = cost + twos;
    if best.as_ref().is_some_and(|(least, _)| *least <= cost) {
        return;
    }
    if odd == 1 {
        if best.as_ref().is_none_or(|(least, _)| total < *least) {
            *best = Some((total, taken.clone()));
        }
        return;
    }
    let largest = most.min(paley::MAX_ORDER);
    for order in (4..=largest).rev().filter(|order| !order.is_power_of_two()) {
        let needed = order.trailing_zeros();
        let part = (order >> needed) as usize;
        if needed <= twos && odd.is_multiple_of(part) && paley::prime(order).is_some() {
            taken.push(order);
            split(odd / part, twos - needed, order, taken, cost + order, best);
            taken.pop();
        }
    }
}

/// The features whose sign is flipped: bit k mod 64 of word k / 64 of SplitMix64 (Steele, Lea and Flood) from the seed.
pub(super) fn flipped(size: usize, seed: u32) -> Vec<bool> {
    let word = |i: usize| {
        let mut z = u64::from(seed).wrapping_add((i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let words: Vec<u64> = (0..size.div_ceil(64)).map(word).collect();
    (0..size).map(|k| words[k / 64] >> (k % 64) & 1 == 1).collect()
}
