//! Whether coders may use more than what every processor has.

use std::sync::atomic::{AtomicBool, Ordering};

static PORTABLE_ONLY: AtomicBool = AtomicBool::new(false);

/// Keeps all coders of this process to plain code, which gives the same bytes: for tests, and to find out whether the
/// instructions of a processor are at fault.
pub fn use_portable_code_only() {
    PORTABLE_ONLY.store(true, Ordering::Relaxed);
}

/// Whether AVX2 is there and may be used.
#[cfg(target_arch = "x86_64")]
#[inline]
pub(crate) fn has_avx2() -> bool {
    std::arch::is_x86_feature_detected!("avx2") && !PORTABLE_ONLY.load(Ordering::Relaxed)
}

/// Whether AVX2 and BMI2, and what counts bits, are there and may be used.
#[cfg(target_arch = "x86_64")]
#[inline]
pub(crate) fn has_avx2_and_bmi2() -> bool {
    has_avx2() && std::arch::is_x86_feature_detected!("bmi2") && std::arch::is_x86_feature_detected!("popcnt")
}
