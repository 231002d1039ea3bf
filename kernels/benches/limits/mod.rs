//! What bounds a kernel: arithmetic in registers, or reading memory.

use std::hint::black_box;
use std::thread;
use std::time::Instant;

/// `work` in units of 10^9 a second.
pub(crate) fn rate(work: usize, f: impl FnOnce()) -> f64 {
    let start = Instant::now();
    f();
    work as f64 / start.elapsed().as_secs_f64() / 1e9
}

/// Fused multiply-adds on registers alone.
pub(crate) fn fma_peak() -> f64 {
    const TURNS: usize = 200_000;
    #[inline(always)]
    fn body<const LANES: usize, const SUMS: usize>(a: [f32; LANES], b: [f32; LANES]) -> f32 {
        let mut sums = [[0.0f32; LANES]; SUMS];
        for _ in 0..TURNS {
            for sum in &mut sums {
                for lane in 0..LANES {
                    sum[lane] = a[lane].mul_add(b[lane], sum[lane]);
                }
            }
        }
        sums.as_flattened().iter().sum()
    }
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512vl")]
        fn avx512(a: f32, b: f32) -> f32 {
            use std::arch::x86_64::*;
            let (a, b) = (_mm512_set1_ps(a), _mm512_set1_ps(b));
            let mut sums = [_mm512_setzero_ps(); 24];
            for _ in 0..TURNS {
                for sum in &mut sums {
                    *sum = _mm512_fmadd_ps(a, b, *sum);
                }
            }
            sums.into_iter().map(|sum| _mm512_reduce_add_ps(sum)).sum()
        }
        #[target_feature(enable = "avx2,fma")]
        fn avx2(a: f32, b: f32) -> f32 {
            body::<8, 12>([a; 8], [b; 8])
        }
        let (a, b) = (black_box(1.5), black_box(0.5));
        #[allow(unsafe_code)]
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl") {
            // SAFETY: the features were detected.
            let run = || unsafe { avx512(a, b) };
            return rate(2 * 24 * 16 * TURNS, || _ = black_box(run()));
        } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: as above.
            let run = || unsafe { avx2(a, b) };
            return rate(2 * 12 * 8 * TURNS, || _ = black_box(run()));
        }
    }
    rate(2 * 12 * 4 * TURNS, || _ = black_box(body::<4, 12>([black_box(1.5); 4], [black_box(0.5); 4])))
}

/// Reads all of it in order: a sum of 64-bit words.
pub(crate) fn stream(bytes: &[u8]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn avx2(bytes: &[u8]) -> u64 {
        use std::arch::x86_64::*;
        let (chunks, _) = bytes.as_chunks::<256>();
        let mut sums = [_mm256_setzero_si256(); 8];
        for chunk in chunks {
            let (parts, _) = chunk.as_chunks::<32>();
            for (sum, part) in sums.iter_mut().zip(parts) {
                *sum = _mm256_add_epi64(*sum, bytemuck::cast(*part));
            }
        }
        let sums: [[u64; 4]; 8] = bytemuck::cast(sums);
        sums.as_flattened().iter().fold(0, |a, b| a ^ b)
    }
    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code)]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the feature was detected.
        return unsafe { avx2(bytes) };
    }
    let (chunks, _) = bytemuck::cast_slice::<u8, u64>(bytes).as_chunks::<64>();
    let mut sums = [0u64; 64];
    for chunk in chunks {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *sum = sum.wrapping_add(*x);
        }
    }
    sums.iter().fold(0, |a, b| a ^ b)
}

/// GB/s at which `threads` read `bytes`.
pub(crate) fn read(bytes: &[u8], threads: usize) -> f64 {
    let part = bytes.len() / threads / 256 * 256;
    rate(threads * part, || {
        thread::scope(|scope| {
            for bytes in bytes.chunks_exact(part).take(threads) {
                scope.spawn(move || black_box(stream(bytes)));
            }
        });
    })
}
