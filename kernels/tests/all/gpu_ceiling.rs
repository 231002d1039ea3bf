//! The kernel that measures the read ceiling reads everything.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use llmpress_emulator::Emulator;
use llmpress_kernels::gpu::{Gpu, ceiling};

#[test]
fn every_word_is_read_once() {
    let gpu = Gpu::new(Emulator::new());
    let blocks = ceiling::blocks(&gpu) as usize;
    for words in [0, 4, 8, 4 * 512 * blocks, 4 * 512 * blocks * 4 + 20, 90_000] {
        let data: Vec<u32> = (0..words as u32).map(|i| i.wrapping_mul(2_654_435_761) ^ i << 7).collect();
        let (input, out) = (gpu.upload(&data).unwrap(), gpu.allocate(4 * blocks).unwrap());
        ceiling::read_all(&gpu, input.view(), out.view()).unwrap();
        let found = out.view().read::<u32>(blocks).unwrap().into_iter().fold(0, |a, b| a ^ b);
        assert_eq!(found, data.iter().fold(0, |a, b| a ^ b), "{words} words");
    }
    assert!(
        ceiling::read_all(&gpu, gpu.allocate(16).unwrap().view(), gpu.allocate(4).unwrap().view()).is_err()
    );
}
