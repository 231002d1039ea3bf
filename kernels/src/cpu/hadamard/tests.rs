use proptest::prelude::*;

use super::*;
use crate::cpu::test_values::{same_bits, values};

/// The definition's order of additions, one value at a time.
fn reference(h: &Hadamard, x: &[f32], way: Way) -> Vec<f32> {
    let flip = |x: &mut Vec<f32>| {
        for (x, flipped) in x.iter_mut().zip(&h.flipped) {
            if *flipped {
                *x = -*x;
            }
        }
    };
    let mut x = x.to_vec();
    if way == Way::Forward {
        flip(&mut x);
    }
    for block in x.chunks_exact_mut(h.block) {
        let mut stride = 1;
        for factor in h.factors.iter().rev() {
            let order = factor.order();
            for start in (0..block.len()).filter(|i| i / stride % order == 0) {
                let column: Vec<f32> = (0..order).map(|i| block[start + i * stride]).collect();
                let turned = match factor {
                    Factor::Sylvester(_) => butterflies(column),
                    Factor::Paley(paley) => rows(paley, &column, way),
                };
                turned.into_iter().enumerate().for_each(|(i, y)| block[start + i * stride] = y);
            }
            stride *= order;
        }
    }
    x.iter_mut().for_each(|x| *x *= h.scale);
    if way == Way::Back {
        flip(&mut x);
    }
    x
}

fn butterflies(mut x: Vec<f32>) -> Vec<f32> {
    let mut distance = 1;
    while distance < x.len() {
        for i in (0..x.len()).filter(|i| i & distance == 0) {
            (x[i], x[i + distance]) = (x[i] + x[i + distance], x[i] - x[i + distance]);
        }
        distance *= 2;
    }
    x
}

fn rows(paley: &Paley, x: &[f32], way: Way) -> Vec<f32> {
    let n = paley.order();
    let negative = |i: usize, j: usize| match way {
        Way::Forward => paley.signs()[i * n + j] < 0.0,
        Way::Back => paley.signs()[j * n + i] < 0.0,
    };
    let row = |i: usize| {
        let first = if negative(i, 0) { -x[0] } else { x[0] };
        (1..n).fold(first, |sum, j| if negative(i, j) { sum - x[j] } else { sum + x[j] })
    };
    (0..n).map(row).collect()
}

/// Sizes with every kind of factor, blocks, and none.
const SIZES: [usize; 22] =
    [1, 2, 3, 4, 5, 6, 8, 12, 16, 20, 24, 28, 36, 40, 48, 56, 64, 76, 80, 96, 144, 152];

proptest! {
    #[test]
    fn every_path_gives_the_bits_of_the_reference(which in 0..SIZES.len(), width in 1usize..60, seed: u64) {
        let size = SIZES[which];
        let h = Hadamard::new(size, (seed % 3 > 0).then_some(seed as u32)).unwrap();
        let x = values(seed, size * width);
        for way in [Way::Forward, Way::Back] {
            let mut expected = vec![0.0; x.len()];
            for column in 0..width {
                let of: Vec<f32> = x.iter().skip(column).step_by(width).copied().collect();
                let turned = reference(&h, &of, way);
                expected.iter_mut().skip(column).step_by(width).zip(turned).for_each(|(to, y)| *to = y);
            }
            for isa in Isa::available() {
                let mut out = x.clone();
                h.run(isa, &mut out, width, way);
                prop_assert!(same_bits(&out, &expected), "{isa:?} {size} {width}");
            }
        }
    }

    #[test]
    fn the_inverse_undoes_and_lengths_stay(which in 0..SIZES.len(), seed: u64) {
        let size = SIZES[which];
        let h = Hadamard::new(size, Some(seed as u32)).unwrap();
        let x = values(seed | 1, size);
        let length = |x: &[f32]| x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let mut y = x.clone();
        h.forward(&mut y, 1);
        prop_assert!((length(&x) - length(&y)).abs() < 1e-5 * length(&x).max(1e-30));
        h.back(&mut y, 1);
        prop_assert!(x.iter().zip(&y).all(|(a, b)| (a - b).abs() <= 1e-5 * length(&x) as f32));
    }
}

/// `R R^T = I`, by turning the unit vectors.
fn is_orthogonal(h: &Hadamard) {
    let n = h.size();
    let mut r = vec![0.0f32; n * n];
    (0..n).for_each(|i| r[i * n + i] = 1.0);
    h.forward(&mut r, n);
    let limit = h.scale * 1.001;
    assert!(r.iter().all(|r| r.abs() <= limit), "{n}");
    let one = |at: usize| f64::from(u8::from(at / n == at % n));
    if n <= 256 {
        for at in 0..n * n {
            let (a, b) = (&r[at / n * n..][..n], &r[at % n * n..][..n]);
            let dot: f64 = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            assert!((dot - one(at)).abs() < 1e-6, "{n}: {at} {dot}");
        }
    }
    let mut product = r.clone();
    h.back(&mut product, n);
    for (at, p) in product.iter().enumerate() {
        assert!((f64::from(*p) - one(at)).abs() < 2e-6, "{n}: {at} {p}");
    }
    // Columns of the transpose are the rows of R.
    let mut back = vec![0.0f32; n * n];
    (0..n).for_each(|i| back[i * n + i] = 1.0);
    h.back(&mut back, n);
    for i in 0..n {
        for j in 0..n {
            assert_eq!(r[i * n + j], back[j * n + i], "{n}");
        }
    }
}

#[test]
fn every_order_of_paley_gives_an_orthogonal_matrix() {
    for order in [12, 20, 24, 28, 36, 44, 48, 60, 76, 84, 108, 140, 148, 152] {
        is_orthogonal(&Hadamard::with_factors(order as usize, &[order], None).unwrap());
    }
}

#[test]
fn sizes_of_real_models_are_orthogonal_and_one_block() {
    for (size, factors) in [
        (64, vec![64]),
        (128, vec![128]),
        (256, vec![256]),
        (576, vec![12, 12, 4]),
        (768, vec![12, 64]),
        (896, vec![28, 32]),
        (1536, vec![12, 128]),
    ] {
        let h = Hadamard::new(size, Some(1)).unwrap();
        assert_eq!(h.factors(), factors);
        is_orthogonal(&h);
    }
    for (size, factors) in [
        (2048, vec![2048]),
        (4096, vec![4096]),
        (4864, vec![76, 64]),
        (8192, vec![8192]),
        (8960, vec![28, 20, 16]),
        (6912, vec![12, 12, 12, 4]),
        (14336, vec![28, 512]),
        (18944, vec![148, 128]),
        (28672, vec![28, 1024]),
        (29568, vec![44, 28, 12, 2]),
    ] {
        let h = Hadamard::new(size, Some(1)).unwrap();
        assert_eq!(h.factors(), factors, "{size}");
        assert_eq!(h.block, size);
        // Too large to be multiplied out: the inverse is tried on a vector with an outlier.
        let mut x = vec![0.0f32; size];
        (x[3], x[size - 1]) = (1000.0, 1.0);
        let before = x.clone();
        h.forward(&mut x, 1);
        assert!(x.iter().all(|x| x.abs() < 1002.0 * h.scale), "the outlier is spread over all");
        h.back(&mut x, 1);
        assert!(x.iter().zip(&before).all(|(a, b)| (a - b).abs() < 5e-3), "{size}");
    }
    is_orthogonal(&Hadamard::with_factors(608, &[152, 4], Some(3)).unwrap());
}

#[test]
fn other_sizes_are_turned_by_blocks_of_their_largest_power_of_two() {
    // 11008 has no Hadamard matrix here that costs less than a product.
    for (size, block) in [(1, 1), (3, 1), (6, 2), (10, 2), (11008, 256)] {
        let h = Hadamard::new(size, Some(9)).unwrap();
        assert_eq!((h.block, size % h.block), (block, 0), "{size}");
        if size < 100 {
            is_orthogonal(&h);
        }
    }
    let mut x = vec![0.0f32; 11008];
    x[300] = 16.0;
    Hadamard::new(11008, None).unwrap().forward(&mut x, 1);
    assert!(x.iter().enumerate().all(|(i, x)| x.abs() == f32::from(u8::from((256..512).contains(&i)))));
}

#[test]
fn what_is_no_rotation_is_refused() {
    assert!(Hadamard::new(0, None).is_err() && Hadamard::new((1 << 24) + 1, None).is_err());
    for (size, factors) in
        [(12, &[8][..]), (12, &[0]), (12, &[1, 12]), (18, &[18]), (8, &[u32::MAX, u32::MAX, u32::MAX])]
    {
        assert!(Hadamard::with_factors(size, factors, None).is_err(), "{factors:?}");
    }
    // 92 = 91 + 1 = 2 (45 + 1): neither is prime. 1032 = 1031 + 1 is too large.
    for order in [92, 1032] {
        let error = Hadamard::with_factors(order as usize, &[order], None).unwrap_err();
        assert!(error.contains(&order.to_string()), "{error}");
    }
}

#[test]
fn signs_are_those_of_the_format() {
    // SplitMix64 from 0 begins with e220a8397b1dcdaf, 6e789e6aa1b965f4.
    let flipped = plan::flipped(128, 0);
    let word = |bits: &[bool]| bits.iter().enumerate().fold(0u64, |w, (k, b)| w | u64::from(*b) << k);
    assert_eq!(word(&flipped[..64]), 0xe220_a839_7b1d_cdaf);
    assert_eq!(word(&flipped[64..]), 0x6e78_9e6a_a1b9_65f4);
    assert_ne!(plan::flipped(64, 1), plan::flipped(64, 2));
    // Paley's first of order 4 would be this; of order 12 the first rows are, from the squares 1, 3, 4, 5, 9 modulo 11.
    let signs = Paley::of(12).unwrap();
    let row = |i: usize| signs.signs()[12 * i..12 * (i + 1)].iter().map(|s| *s as i8).collect::<Vec<_>>();
    assert_eq!(row(0), [1; 12]);
    assert_eq!(row(1), [-1, 1, 1, -1, 1, 1, 1, -1, -1, -1, 1, -1]);
    assert_eq!(row(2), [-1, -1, 1, 1, -1, 1, 1, 1, -1, -1, -1, 1]);
}
