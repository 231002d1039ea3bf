//! An order of channels in which two of each four in a row hold as much as possible (after Zhang et al., "Plug-and-Play", section
//! 4.2: channel permutation for N:M).
//!
//! ```text
//! scores: channels x rows, of what keeping a weight is worth
//! channels by their sums --dealt out--> quads --one of each quad taken out, all assigned anew--> quads, better ones --> ...
//! ```
//!
//! With three channels of a quad fixed, a row keeps `a + max(b, x)` with a fourth one: a and b are the greatest of the three, x the
//! fourth's. So an assignment is worth the sum of `max(b, x)`, and the best one is never worse than the one before.

use pathfinding::prelude::{Matrix, kuhn_munkres};
use rayon::prelude::*;

use crate::QUAD;

/// Quads between which channels are assigned at a time: the work of an assignment is their cube.
const QUADS: usize = 256;
/// Sweeps at most; each takes out every channel once.
const SWEEPS: usize = 12;
/// A sweep that gains less of what is kept is the last one.
const GAIN: f64 = 1e-4;
/// Values that are added side by side.
const LANES: usize = 16;
/// What the worth of the best of all pairs becomes as an integer.
const WHOLE: f64 = (1u64 << 40) as f64;

/// Which channel is to come to each place, so that quads of a row keep the most; none where the order that there is keeps as much.
/// `scores` has those of a channel one after the other, `rows` each, finite and none below 0.
pub(crate) fn reorder(scores: &[f32], rows: usize) -> Option<Vec<u32>> {
    let channels = scores.len().checked_div(rows)?;
    if channels <= QUAD || !channels.is_multiple_of(QUAD) {
        return None;
    }
    let scores = Scores { scores, rows };
    let as_it_is: Vec<[usize; QUAD]> =
        (0..channels / QUAD).map(|quad| std::array::from_fn(|i| QUAD * quad + i)).collect();
    let before = scores.kept(&as_it_is);
    let mut quads = scores.dealt_out(channels);
    let mut kept = scores.kept(&quads);
    for sweep in 0..SWEEPS {
        for place in 0..QUAD {
            scores.assign(&mut quads, place, (QUAD * sweep + place) as u64);
        }
        let now = scores.kept(&quads);
        let gained = now - kept;
        kept = now;
        if gained <= GAIN * kept {
            break;
        }
    }
    if kept <= before {
        return None;
    }
    quads.iter_mut().for_each(|quad| quad.sort_unstable());
    quads.sort_unstable();
    Some(quads.into_iter().flatten().map(|channel| channel as u32).collect())
}

struct Scores<'a> {
    scores: &'a [f32],
    rows: usize,
}

impl Scores<'_> {
    fn of(&self, channel: usize) -> &[f32] {
        self.scores.get(channel * self.rows..(channel + 1) * self.rows).unwrap_or_default()
    }

    /// What the greatest two of each four add up to.
    fn kept(&self, quads: &[[usize; QUAD]]) -> f64 {
        let of = |quad: &[usize; QUAD]| -> f64 {
            let [a, b, c, d] = quad.map(|channel| self.of(channel));
            let two = |((a, b), (c, d)): ((&f32, &f32), (&f32, &f32))| {
                let (low, high) = (a.min(*b).max(c.min(*d)), a.max(*b).max(c.max(*d)));
                // The second is the greater of the lesser ones, or the lesser of the greater ones.
                f64::from(high) + f64::from(low.max(a.max(*b).min(c.max(*d))))
            };
            a.iter().zip(b).zip(c.iter().zip(d)).map(two).sum()
        };
        let each: Vec<f64> = quads.par_iter().map(of).collect();
        each.iter().sum()
    }

    /// Quads of which each gets its share of the greatest channels, and of the least.
    fn dealt_out(&self, channels: usize) -> Vec<[usize; QUAD]> {
        let sum = |channel: usize| self.of(channel).iter().map(|&s| f64::from(s)).sum::<f64>();
        let sums: Vec<f64> = (0..channels).into_par_iter().map(sum).collect();
        let mut order: Vec<usize> = (0..channels).collect();
        order.sort_by(|&a, &b| sums[b].total_cmp(&sums[a]).then(a.cmp(&b)));
        let count = channels / QUAD;
        // There and back.
        (0..count)
            .map(|quad| {
                std::array::from_fn(|round| {
                    let at = if round % 2 == 0 { quad } else { count - 1 - quad };
                    order[round * count + at]
                })
            })
            .collect()
    }

    /// Takes the channel at a place out of each quad, and gives each quad the one that suits it, some quads at a time.
    fn assign(&self, quads: &mut [[usize; QUAD]], place: usize, seed: u64) {
        let mut order: Vec<usize> = (0..quads.len()).collect();
        if quads.len() > QUADS {
            order.sort_by_key(|&quad| (mixed(seed << 32 | quad as u64), quad));
        }
        for some in order.chunks(QUADS) {
            let taken: Vec<usize> = some.iter().map(|&quad| quads[quad][place]).collect();
            let seconds: Vec<Vec<f32>> =
                some.par_iter().map(|&quad| self.second(&quads[quad], place)).collect();
            let worth: Vec<Vec<f32>> = seconds
                .par_iter()
                .map(|second| taken.iter().map(|&channel| greater(second, self.of(channel))).collect())
                .collect();
            for (&quad, channel) in some.iter().zip(assigned(&worth)) {
                quads[quad][place] = taken[channel];
            }
        }
    }

    /// The second of three channels, row by row.
    fn second(&self, quad: &[usize; QUAD], without: usize) -> Vec<f32> {
        let [a, b, c] = [1, 2, 3].map(|i| self.of(quad[(without + i) % QUAD]));
        a.iter().zip(b).zip(c).map(|((a, b), c)| a.min(*b).max(a.max(*b).min(*c))).collect()
    }
}

/// The sum of the greater ones, pair by pair, in one order of additions.
fn greater(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; LANES];
    let (a, b) = (a.chunks(LANES), b.chunks(LANES));
    for (a, b) in a.zip(b) {
        sums.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| *sum += if a > b { a } else { b });
    }
    sums.iter().sum()
}

/// Which column each row gets, each once, for the greatest sum.
fn assigned(worth: &[Vec<f32>]) -> Vec<usize> {
    let values = || worth.iter().flatten().map(|&w| f64::from(w));
    let most = values().fold(0.0, f64::max);
    let scale = if most > 0.0 { WHOLE / most } else { 0.0 };
    // The same number of columns in every row.
    let whole: Vec<i64> = values().map(|w| (w * scale) as i64).collect();
    match Matrix::from_vec(worth.len(), worth.len(), whole) {
        Ok(matrix) => kuhn_munkres(&matrix).1,
        Err(_) => (0..worth.len()).collect(),
    }
}

/// The finish of SplitMix64.
fn mixed(x: u64) -> u64 {
    let z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::noise;

    /// By sorting.
    fn kept(scores: &[f32], rows: usize, order: &[u32]) -> f64 {
        let mut sum = 0.0;
        for quad in order.chunks(QUAD) {
            for row in 0..rows {
                let mut four: Vec<f32> = quad.iter().map(|&c| scores[c as usize * rows + row]).collect();
                four.sort_by(|a, b| b.total_cmp(a));
                sum += f64::from(four[0]) + f64::from(four[1]);
            }
        }
        sum
    }

    proptest! {
        #[test]
        fn an_order_names_each_channel_once_and_keeps_more_than_the_one_that_there_was(
            quads in 0usize..12, rows in 1usize..20, seed in 0usize..1000, ties in 1u32..4,
        ) {
            let channels = QUAD * quads;
            let score = |i: usize| (noise(seed, i).abs() * 10f32.powi(ties as i32)).round();
            let scores: Vec<f32> = (0..channels * rows).map(score).collect();
            let own: Vec<u32> = (0..channels as u32).collect();
            if let Some(order) = reorder(&scores, rows) {
                let mut sorted = order.clone();
                sorted.sort_unstable();
                prop_assert_eq!(&sorted, &own);
                prop_assert!(kept(&scores, rows, &order) > kept(&scores, rows, &own));
                prop_assert!(order.chunks(QUAD).all(|quad| quad.is_sorted()));
            }
        }
    }

    #[test]
    fn four_great_channels_in_one_quad_are_spread_over_all() {
        // Channels 0 to 3 are great, the others small: two of a quad may be great without a loss.
        let rows = 8;
        let scores: Vec<f32> =
            (0..16 * rows).map(|i| if i / rows < 4 { 100.0 } else { 0.0 } + noise(5, i).abs()).collect();
        let order = reorder(&scores, rows).unwrap();
        let great = order.chunks(QUAD).map(|quad| quad.iter().filter(|&&c| c < 4).count());
        assert!(great.max().unwrap() <= 2, "{order:?}");
    }

    #[test]
    fn more_quads_than_are_assigned_at_a_time_come_to_the_same_on_any_number_of_threads() {
        let (channels, rows) = (QUAD * (QUADS + 44), 6);
        let scores: Vec<f32> = (0..channels * rows).map(|i| noise(9, i).powi(2)).collect();
        let on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| reorder(&scores, rows).unwrap())
        };
        let order = on(1);
        assert_eq!(order, on(3));
        let own: Vec<u32> = (0..channels as u32).collect();
        assert!(kept(&scores, rows, &order) > 1.02 * kept(&scores, rows, &own));
    }

    #[test]
    fn nothing_is_moved_where_nothing_can_be_gained() {
        assert_eq!(reorder(&[], 3), None);
        assert_eq!(reorder(&[], 0), None);
        assert_eq!(reorder(&[1.0, 2.0, 3.0, 4.0], 1), None);
        assert_eq!(reorder(&[1.0; 24], 3), None);
        assert_eq!(reorder(&[0.0; 24], 3), None);
        // 6 channels make no quads.
        assert_eq!(reorder(&[1.0, 5.0, 2.0, 4.0, 3.0, 0.0], 1), None);
    }
}
