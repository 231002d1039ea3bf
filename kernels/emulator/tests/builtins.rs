//! What the emulator makes of built-ins equals plain definitions.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use llmpress_emulator::Emulator;
use llmpress_kernels::gpu::{Argument, Gpu, Launch};
use proptest::prelude::*;

fn launch(gpu: &Gpu, kernel: &'static str, grid: [u32; 3], block: u32, arguments: &[Argument]) {
    gpu.launch(&Launch { file: "builtins", kernel, grid, block, shared: 1024, arguments, overlaps: true })
        .unwrap();
}

fn byte_perm(a: u32, b: u32, selector: u32) -> u32 {
    let bytes: Vec<u8> = a.to_le_bytes().into_iter().chain(b.to_le_bytes()).collect();
    u32::from_le_bytes([0, 4, 8, 12].map(|shift| bytes[(selector >> shift & 7) as usize]))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20))]

    #[test]
    fn integers(words in proptest::collection::vec(any::<[u32; 3]>(), 64)) {
        let gpu = Gpu::new(Emulator::new());
        let input = gpu.upload(words.as_flattened()).unwrap();
        let out = gpu.allocate(64 * 40).unwrap();
        launch(&gpu, "integers", [2, 1, 1], 32, &[input.view().pointer(), out.view().pointer()]);
        let found: Vec<u32> = out.view().read(640).unwrap();
        for (&[a, b, c], found) in words.iter().zip(found.chunks(10)) {
            let joined = u64::from(b) << 32 | u64::from(a);
            let expected = [
                byte_perm(a, b, c & 0x7777),
                ((joined << (c & 31)) >> 32) as u32,
                (joined >> (c & 31)) as u32,
                (a & b) | (!a & c),
                a.count_ones() | b.leading_zeros() << 8 | (if c == 0 { 0 } else { c.trailing_zeros() + 1 }) << 16,
                a.reverse_bits(),
                ((u64::from(a) * u64::from(b)) >> 32) as u32,
                a ^ b ^ c,
                a.min(b),
                (b as i32).max(c as i32) as u32,
            ];
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn lanes(values in proptest::collection::vec(0u32..5, 96)) {
        let gpu = Gpu::new(Emulator::new());
        let input = gpu.upload(&values).unwrap();
        let out = gpu.allocate(96 * 32).unwrap();
        launch(&gpu, "lanes", [1, 1, 1], 96, &[input.view().pointer(), out.view().pointer()]);
        let found: Vec<u32> = out.view().read(96 * 8).unwrap();
        for (t, found) in found.chunks(8).enumerate() {
            let (first, lane) = (t / 32 * 32, t % 32);
            let warp = &values[first..first + 32];
            let votes = warp.iter().enumerate().map(|(i, v)| (v & 1) << i).sum();
            let expected = [
                warp[(lane * 7 + 3) % 32],
                if lane >= 5 { warp[lane - 5] } else { warp[lane] },
                if lane + 9 < 32 { warp[lane + 9] } else { warp[lane] },
                warp[lane ^ 18],
                votes,
                u32::from(warp.contains(&0)) | u32::from(!warp.contains(&0)) << 1,
                warp[lane / 8 * 8 + 2],
                warp[lane ^ 1],
            ];
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn products_add_in_order_of_k(seed in any::<u64>()) {
        let mut state = seed | 1;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * 3.0
        };
        let round = |x: f32| half::bf16::from_f32(x);
        let a: Vec<half::bf16> = (0..256).map(|_| round(next())).collect();
        let b: Vec<half::bf16> = (0..128).map(|_| round(next())).collect();
        let c: Vec<f32> = (0..128).map(|_| next()).collect();
        let bits = |x: &[half::bf16]| x.iter().map(|x| x.to_bits()).collect::<Vec<u16>>();
        let gpu = Gpu::new(Emulator::new());
        let (left, right) = (gpu.upload(&bits(&a)).unwrap(), gpu.upload(&bits(&b)).unwrap());
        let (add, out) = (gpu.upload(&c).unwrap(), gpu.allocate(512).unwrap());
        let pointers = [&left, &right, &add, &out].map(|buffer| buffer.view().pointer());
        launch(&gpu, "product", [1, 1, 1], 32, &pointers);
        let found: Vec<f32> = out.view().read(128).unwrap();
        for row in 0..16 {
            for column in 0..8 {
                let sum = (0..16).fold(c[row * 8 + column], |sum, k| {
                    a[row * 16 + k].to_f32().mul_add(b[column * 16 + k].to_f32(), sum)
                });
                prop_assert_eq!(found[row * 8 + column].to_bits(), sum.to_bits());
            }
        }
    }

    #[test]
    fn products_of_two_in_four_add_what_is_kept_in_order_of_k(seed in any::<u64>()) {
        let mut state = seed | 1;
        let mut bits = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            state >> 40
        };
        let value = |bits: u64| half::bf16::from_f32((bits as f32 / (1 << 23) as f32 - 1.0) * 3.0);
        let a: Vec<half::bf16> = (0..256).map(|_| value(bits())).collect();
        let b: Vec<half::bf16> = (0..256).map(|_| value(bits())).collect();
        let c: Vec<f32> = (0..128).map(|_| value(bits()).to_f32()).collect();
        let nibbles = [0b0100u32, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110];
        let mut row = || (0..8).fold(0, |row, quad| row | nibbles[(bits() % 6) as usize] << (4 * quad));
        let kept: Vec<u32> = (0..16).map(|_| row()).collect();
        let words = |x: &[half::bf16]| x.iter().map(|x| x.to_bits()).collect::<Vec<u16>>();
        let gpu = Gpu::new(Emulator::new());
        let (left, right) = (gpu.upload(&words(&a)).unwrap(), gpu.upload(&words(&b)).unwrap());
        let (places, add) = (gpu.upload(&kept).unwrap(), gpu.upload(&c).unwrap());
        let (lower, upper) = (gpu.allocate(512).unwrap(), gpu.allocate(512).unwrap());
        let pointers = [&left, &places, &right, &add, &lower, &upper].map(|buffer| buffer.view().pointer());
        launch(&gpu, "sparse_product", [1, 1, 1], 32, &pointers);
        for out in [lower, upper] {
            let found: Vec<f32> = out.view().read(128).unwrap();
            for row in 0..16 {
                for column in 0..8 {
                    let sum = (0..16).fold(c[row * 8 + column], |sum, i| {
                        let place = kept[row] >> (2 * i) & 3;
                        let k = 4 * (i / 2) + place as usize;
                        a[row * 16 + i].to_f32().mul_add(b[column * 32 + k].to_f32(), sum)
                    });
                    prop_assert_eq!(found[row * 8 + column].to_bits(), sum.to_bits());
                }
            }
        }
    }

    #[test]
    fn lanes_get_their_words_of_matrices(
        words in proptest::collection::vec(any::<u32>(), 256), rows in proptest::collection::vec(0u32..57, 4),
    ) {
        let gpu = Gpu::new(Emulator::new());
        let (input, at, out) = (gpu.upload(&words).unwrap(), gpu.upload(&rows).unwrap(), gpu.allocate(512).unwrap());
        let pointers = [&input, &at, &out].map(|buffer| buffer.view().pointer());
        launch(&gpu, "matrices", [1, 1, 1], 32, &pointers);
        let found: Vec<u32> = out.view().read(128).unwrap();
        for (i, found) in found.into_iter().enumerate() {
            let (lane, matrix) = (i / 4, i % 4);
            prop_assert_eq!(found, words[4 * (rows[matrix] as usize + lane / 4) + lane % 4]);
        }
    }

    #[test]
    fn products_of_bytes_and_bits_are_exact(
        a in proptest::collection::vec(any::<u32>(), 128), b in proptest::collection::vec(any::<u32>(), 64),
        c in proptest::collection::vec(any::<i32>(), 128),
    ) {
        let gpu = Gpu::new(Emulator::new());
        let (left, right, add) = (gpu.upload(&a).unwrap(), gpu.upload(&b).unwrap(), gpu.upload(&c).unwrap());
        let (bytes, bits) = (gpu.allocate(512).unwrap(), gpu.allocate(512).unwrap());
        let pointers = [&left, &right, &add, &bytes, &bits].map(|buffer| buffer.view().pointer());
        launch(&gpu, "integer_products", [1, 1, 1], 32, &pointers);
        let (bytes, bits): (Vec<i32>, Vec<i32>) = (bytes.view().read(128).unwrap(), bits.view().read(128).unwrap());
        for row in 0..16 {
            for column in 0..8 {
                let at = row * 8 + column;
                let pairs = a[row * 8..][..8].iter().zip(&b[column * 8..][..8]);
                let sum = |(a, b): (&u32, &u32)| -> i32 {
                    a.to_le_bytes().into_iter().zip(b.to_le_bytes()).map(|(a, b)| i32::from(a) * i32::from(b)).sum()
                };
                prop_assert_eq!(bytes[at], c[at].wrapping_add(pairs.map(sum).sum::<i32>()));
                let pairs = a[row * 4..][..4].iter().zip(&b[column * 4..][..4]);
                let common = pairs.map(|(a, b)| (a & b).count_ones() as i32).sum::<i32>();
                prop_assert_eq!(bits[at], c[at].wrapping_add(common));
            }
        }
    }

    #[test]
    fn functions(bits in proptest::collection::vec(any::<u32>(), 128), plain in proptest::collection::vec(-120f32..120.0, 128)) {
        let x: Vec<f32> = bits.into_iter().map(f32::from_bits).chain(plain).collect();
        let gpu = Gpu::new(Emulator::new());
        let input = gpu.upload(&x).unwrap();
        let (exponentials, rounded) = (gpu.allocate(1024).unwrap(), gpu.allocate(1024).unwrap());
        let pointers = [&input, &exponentials, &rounded].map(|buffer| buffer.view().pointer());
        launch(&gpu, "functions", [4, 1, 1], 64, &pointers);
        let found: Vec<f32> = exponentials.view().read(256).unwrap();
        let words: Vec<u32> = rounded.view().read(256).unwrap();
        for ((x, found), word) in x.iter().zip(found).zip(words) {
            let expected = llmpress_kernels::cpu::exp(*x);
            prop_assert!(found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan());
            let bf16 = u32::from(half::bf16::from_f32(*x).to_bits());
            prop_assert_eq!(word, bf16 | bf16 << 16);
        }
    }
}

#[test]
fn grids_of_three_dimensions_sum_by_blocks() {
    let (grid, block) = ([3u32, 2, 2], 128u32);
    let count = 12 * 128 - 37;
    let data: Vec<u32> = (0..count as u32).map(|i| i * i % 1013).collect();
    for emulator in [Emulator::new(), Emulator::backwards()] {
        let gpu = Gpu::new(emulator);
        let (input, out) = (gpu.upload(&data).unwrap(), gpu.allocate(48).unwrap());
        let arguments =
            [input.view().pointer(), Argument::U64(count as u64), out.view().pointer(), Argument::F32(2.0)];
        launch(&gpu, "sums", grid, block, &arguments);
        let expected: Vec<u32> = data.chunks(128).map(|c| 2 * c.iter().sum::<u32>()).collect();
        assert_eq!(out.view().read::<u32>(12).unwrap(), expected);
    }
}

#[test]
fn pairs_of_bf16_are_added_where_that_is_exact() {
    let pair = |low: f32, high: f32| {
        u32::from(half::bf16::from_f32(low).to_bits()) | u32::from(half::bf16::from_f32(high).to_bits()) << 16
    };
    let gpu = Gpu::new(Emulator::new());
    let a: Vec<u32> = (0..64).map(|i| pair(128.0 + i as f32, -0.5 * i as f32)).collect();
    let run = |b: &[u32]| {
        let (left, right) = (gpu.upload(&a).unwrap(), gpu.upload(b).unwrap());
        let (sums, copies) = (gpu.allocate(128).unwrap(), gpu.allocate(256).unwrap());
        let pointers = [&left, &right, &sums, &copies].map(|buffer| buffer.view().pointer());
        let launch = Launch {
            file: "builtins",
            kernel: "pairs",
            grid: [1, 1, 1],
            block: 32,
            shared: 256,
            arguments: &pointers,
            overlaps: true,
        };
        gpu.launch(&launch)
            .map(|()| (sums.view().read::<u32>(32).unwrap(), copies.view().read::<u32>(64).unwrap()))
    };
    let (sums, copies) = run(&[pair(-136.0, 0.25); 32]).unwrap();
    let expected: Vec<u32> = (0..32).map(|i| pair(i as f32 - 8.0, 0.25 - 0.5 * i as f32)).collect();
    assert_eq!(sums, expected);
    assert_eq!(copies, a);
    let error = run(&[pair(0.001, 0.0); 32]).unwrap_err().to_string();
    assert!(error.contains("no BF16"), "{error}");
}
