//! Which instructions this processor has, and which of them are to be used.

use std::sync::atomic::{AtomicU8, Ordering};

/// The most that [`limit_instruction_set`] left, as a number of [`Isa`].
static MOST: AtomicU8 = AtomicU8::new(u8::MAX);

/// Keeps all kernels to a set of instructions, `portable`, `avx2` or `avx512`, whatever else this processor has. They give
/// the same bits with each: for tests, and to find out whether one of them is at fault.
///
/// # Errors
/// Another name, or a set that this processor lacks.
pub fn limit_instruction_set(name: &str) -> Result<(), String> {
    let sets = Isa::all();
    let chosen = sets.iter().find(|isa| isa.name() == name).ok_or_else(|| {
        let names: Vec<&str> = sets.iter().map(|isa| isa.name()).collect();
        format!("{name:?} is no set of instructions that the kernels know: {}", names.join(", "))
    })?;
    if *chosen as u8 > Isa::of_processor() as u8 {
        return Err(format!("this processor has no {name}: its kernels are {}", Isa::of_processor().name()));
    }
    MOST.store(*chosen as u8, Ordering::Relaxed);
    Ok(())
}

/// The sets that kernels are written for, each with those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Isa {
    /// What every processor of the target has.
    Portable,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW, VL, DQ, VBMI and VBMI2.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    fn all() -> &'static [Self] {
        &[
            Self::Portable,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512,
        ]
    }

    fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512",
        }
    }

    /// The best one that is to be used.
    #[inline]
    pub(super) fn detect() -> Self {
        let best = Self::of_processor();
        match MOST.load(Ordering::Relaxed) {
            most if most >= best as u8 => best,
            #[cfg(target_arch = "x86_64")]
            1 => Self::Avx2,
            _ => Self::Portable,
        }
    }

    /// The best one that this processor has; the standard library remembers what it found.
    #[inline]
    fn of_processor() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vbmi")
                && is_x86_feature_detected!("avx512vbmi2")
            {
                return Self::Avx512;
            }
            if is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
            {
                return Self::Avx2;
            }
        }
        Self::Portable
    }

    /// All that this processor has, for tests.
    #[cfg(test)]
    pub(super) fn available() -> Vec<Self> {
        #[cfg(target_arch = "x86_64")]
        return match Self::detect() {
            Self::Portable => vec![Self::Portable],
            Self::Avx2 => vec![Self::Portable, Self::Avx2],
            Self::Avx512 => vec![Self::Portable, Self::Avx2, Self::Avx512],
        };
        #[cfg(not(target_arch = "x86_64"))]
        vec![Self::Portable]
    }
}

/// Compiles a function once for each instruction set and picks at run time. The body is plain code: its
/// additions are written out as fused multiply-adds, so every version gives the same bits.
macro_rules! multiversion {
    ($isa:expr, $body:ident($($arg:ident: $type:ty),*) $(-> $result:ty)?) => {{
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2($($arg: $type),*) $(-> $result)? {
                $body($($arg),*)
            }
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
            fn avx512($($arg: $type),*) $(-> $result)? {
                $body($($arg),*)
            }
            #[allow(unsafe_code)]
            match $isa {
                // SAFETY: `Isa` is made by detection only.
                Isa::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                Isa::Avx2 => unsafe { avx2($($arg),*) },
                Isa::Portable => $body($($arg),*),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            let _ = $isa;
            $body($($arg),*)
        }
    }};
}

pub(super) use multiversion;
