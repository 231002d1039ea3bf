//! Every kernel against its scalar reference, on whatever device there is: what a new GPU has to pass before anything it
//! computes is believed.
//!
//! ```text
//! numbers from a fixed seed, odd shapes --> device, reference --> the same bits
//!                                                                 near, where a GPU's tensor cores round by themselves
//! ```

mod abq;
mod attention;
mod cache_codes;
mod coders;
mod elementwise;
mod experts;
mod numbers;
mod products;
mod sparse24;

use serde::Serialize;

use super::{Gpu, Result};

/// How one kernel did on one shape.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Proof {
    /// The kernel.
    pub kernel: String,
    /// The shape, in words.
    pub shape: String,
    /// Whether every bit had to be right; else results had to be near.
    pub exact: bool,
    /// The largest error, as a share of what rounding allows: at most 1 where the proof holds.
    pub worst: f64,
    /// What is wrong.
    pub fault: Option<String>,
}

impl Proof {
    /// Whether it holds.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.fault.is_none()
    }
}

/// Proves all kernels. `say` is told each result. A kernel that cannot be started is a fault of its own; the others are proven
/// all the same.
///
/// # Errors
/// The device is lost or has no memory.
pub fn prove(gpu: &Gpu, say: &mut dyn FnMut(&Proof)) -> Result<Vec<Proof>> {
    let mut court = Court { gpu, proofs: Vec::new(), say };
    coders::prove(&mut court)?;
    elementwise::prove(&mut court)?;
    products::prove(&mut court)?;
    sparse24::prove(&mut court)?;
    abq::prove(&mut court)?;
    experts::prove(&mut court)?;
    attention::prove(&mut court)?;
    cache_codes::prove(&mut court)?;
    Ok(court.proofs)
}

/// Where proofs are brought.
struct Court<'a> {
    gpu: &'a Gpu,
    proofs: Vec<Proof>,
    say: &'a mut dyn FnMut(&Proof),
}

/// Operations of a shape that an emulator takes too long for.
const EMULATED_OPERATIONS: usize = 1 << 19;

impl Court<'_> {
    /// Whether a shape is left out: large ones only show something on a real device.
    fn too_large(&self, operations: usize) -> bool {
        self.gpu.backend().adds_in_order() && operations > EMULATED_OPERATIONS
    }

    fn add(&mut self, proof: Proof) {
        (self.say)(&proof);
        self.proofs.push(proof);
    }

    /// Results that must be the same to the bit; NaNs are all alike.
    fn same<T: Same>(&mut self, kernel: &str, shape: &str, found: &[T], expected: &[T]) {
        let differs = found.iter().zip(expected).position(|(a, b)| !a.same(b));
        let fault = match differs {
            _ if found.len() != expected.len() => {
                Some(format!("{} results instead of {}", found.len(), expected.len()))
            }
            Some(at) => Some(format!("result {at} is {:?} instead of {:?}", found[at], expected[at])),
            None => None,
        };
        self.add(Proof {
            kernel: kernel.to_owned(),
            shape: shape.to_owned(),
            exact: true,
            worst: f64::from(u8::from(fault.is_some())),
            fault,
        });
    }

    /// Results that may be off by `allowed`, each its own; to the bit where the device adds in the stated order.
    fn near(&mut self, kernel: &str, shape: &str, found: &[f32], expected: &[f32], allowed: &[f32]) {
        if self.gpu.backend().adds_in_order() {
            return self.same(kernel, shape, found, expected);
        }
        let mut worst = (0.0, 0);
        for (at, ((found, expected), allowed)) in found.iter().zip(expected).zip(allowed).enumerate() {
            let error = f64::from((found - expected).abs()) / f64::from(*allowed).max(f64::MIN_POSITIVE);
            let error = if found.same(expected) {
                0.0
            } else if error.is_nan() {
                f64::INFINITY
            } else {
                error
            };
            if error > worst.0 {
                worst = (error, at);
            }
        }
        let (error, at) = worst;
        let fault = if found.len() != expected.len() {
            Some(format!("{} results instead of {}", found.len(), expected.len()))
        } else if error > 1.0 {
            Some(format!("result {at} is {} instead of {} +- {}", found[at], expected[at], allowed[at]))
        } else {
            None
        };
        self.add(Proof {
            kernel: kernel.to_owned(),
            shape: shape.to_owned(),
            exact: false,
            worst: error.min(f64::MAX),
            fault,
        });
    }

    /// Brings what a closure computes; an error of the device becomes a fault of the kernel.
    fn case(&mut self, kernel: &str, shape: &str, work: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        match work(self) {
            Ok(()) => Ok(()),
            // Nothing can be shown on a device that has no room or is gone.
            Err(error) if self.gpu.synchronize().is_err() => Err(error),
            Err(error) => {
                self.add(Proof {
                    kernel: kernel.to_owned(),
                    shape: shape.to_owned(),
                    exact: true,
                    worst: 1.0,
                    fault: Some(error.to_string()),
                });
                Ok(())
            }
        }
    }
}

/// Equality by bits, but for NaNs.
trait Same: std::fmt::Debug {
    fn same(&self, other: &Self) -> bool;
}

impl Same for f32 {
    fn same(&self, other: &Self) -> bool {
        self.to_bits() == other.to_bits() || self.is_nan() && other.is_nan()
    }
}

/// BF16 words that were computed.
#[derive(Clone, Copy, Debug)]
struct Bf16(u16);

impl Same for Bf16 {
    fn same(&self, other: &Self) -> bool {
        let wide = |word: &Self| f32::from_bits(u32::from(word.0) << 16);
        self.0 == other.0 || wide(self).is_nan() && wide(other).is_nan()
    }
}

impl Same for u16 {
    fn same(&self, other: &Self) -> bool {
        self == other
    }
}

impl Same for u32 {
    fn same(&self, other: &Self) -> bool {
        self == other
    }
}
