//! Picks the tile shape of a kernel by trying a few, once for each shape of the operands.
//!
//! All shapes of a kernel give the same bits, so what was picked never shows in a result.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use super::{Gpu, Result, ceiling};

/// Runs of a candidate; the median counts.
const RUNS: usize = 7;
/// Read between runs, so that none finds its operands in the cache: more than the L2 of any GPU so far. What is written would
/// have to leave the cache while a candidate runs.
const FLUSHED_BYTES: usize = 128 << 20;

/// What is launched: a kernel and the sizes of its operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// The kernel's family.
    pub kernel: &'static str,
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
    /// Tokens.
    pub m: usize,
    /// Slices that the input features are cut into.
    pub slices: usize,
}

/// Remembers the fastest candidate of each shape.
#[derive(Debug, Default)]
pub struct Picker {
    tries: bool,
    remembered: Mutex<HashMap<Shape, usize>>,
}

impl Picker {
    /// One that tries every candidate of a shape the first time.
    #[must_use]
    pub fn trying() -> Self {
        Self { tries: true, ..Self::default() }
    }

    /// One that takes the first candidate always.
    #[must_use]
    pub fn first() -> Self {
        Self::default()
    }

    /// The candidate to run, 0 .. `candidates`. `run` starts one; it must be repeatable.
    ///
    /// # Errors
    /// Those of `run`; no memory to flush the cache with.
    pub fn pick(
        &self,
        gpu: &Gpu,
        shape: Shape,
        candidates: usize,
        run: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<usize> {
        if !self.tries || candidates < 2 {
            return Ok(0);
        }
        if let Some(picked) = self.remembered.lock().unwrap_or_else(PoisonError::into_inner).get(&shape) {
            return Ok(*picked);
        }
        let (flushed, sums) =
            (gpu.allocate(FLUSHED_BYTES)?, gpu.allocate(4 * ceiling::blocks(gpu) as usize)?);
        let mut best = (f64::INFINITY, 0);
        for candidate in 0..candidates {
            // The first run compiles the kernel.
            run(candidate)?;
            let mut times = Vec::new();
            for _ in 0..RUNS {
                // Not waited for: the launch is under way to the GPU while it reads, so that its way is not timed.
                // An emulator has no cache.
                if !gpu.backend().adds_in_order() {
                    ceiling::read_all(gpu, flushed.view(), sums.view())?;
                }
                times.push(gpu.backend().timed(&mut || run(candidate))?);
            }
            times.sort_by(f64::total_cmp);
            let median = times[RUNS / 2];
            if median < best.0 {
                best = (median, candidate);
            }
        }
        self.remembered.lock().unwrap_or_else(PoisonError::into_inner).insert(shape, best.1);
        Ok(best.1)
    }
}
