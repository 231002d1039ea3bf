//! What the kernels are to reach, and whether they did.

use serde::Serialize;

use crate::KernelRow;

/// What a goal is counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    /// cuBLAS's time for the plain BF16 product by the kernel's, in the same run.
    TimesCublas,
    /// Bytes of decoded weights, GB/s.
    OutputGbps,
}

/// A goal for one kernel on one matrix: on an H100 80GB HBM3, cold cache, launch included.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Goal {
    /// The kernel, as `bench kernels` names it.
    pub kernel: &'static str,
    /// The matrix in Llama 3 8B.
    pub matrix: &'static str,
    /// Its output features.
    pub n: usize,
    /// Its input features.
    pub k: usize,
    /// Tokens; 0 for decoding alone.
    pub m: usize,
    /// What is counted.
    pub measure: Measure,
    /// The goal.
    pub at_least: f64,
    /// What a quick prototype reached.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prototype: Option<f64>,
}

const fn fixed12(
    matrix: &'static str,
    n: usize,
    k: usize,
    m: usize,
    at_least: f64,
    prototype: Option<f64>,
) -> Goal {
    Goal { kernel: "fixed12", matrix, n, k, m, measure: Measure::TimesCublas, at_least, prototype }
}

/// On the largest matrix.
const fn abq(kernel: &'static str, m: usize, at_least: f64, prototype: Option<f64>) -> Goal {
    let (matrix, n, k, measure) = ("gate_up", 28672, 4096, Measure::TimesCublas);
    Goal { kernel, matrix, n, k, m, measure, at_least, prototype }
}

/// All goals.
pub const GOALS: &[Goal] = &[
    Goal {
        kernel: "decode dfloat11",
        matrix: "gate_up",
        n: 28672,
        k: 4096,
        m: 0,
        measure: Measure::OutputGbps,
        at_least: 1300.0,
        prototype: Some(1040.0),
    },
    fixed12("o", 4096, 4096, 1, 1.5, Some(1.49)),
    fixed12("gate_up", 28672, 4096, 1, 1.5, Some(1.56)),
    fixed12("down", 4096, 14336, 1, 1.5, Some(1.47)),
    fixed12("qkv", 6144, 4096, 1, 1.5, None),
    fixed12("o", 4096, 4096, 8, 1.5, Some(1.50)),
    fixed12("gate_up", 28672, 4096, 8, 1.5, Some(1.36)),
    fixed12("down", 4096, 14336, 8, 1.5, Some(1.43)),
    fixed12("qkv", 6144, 4096, 8, 1.5, None),
    fixed12("o", 4096, 4096, 16, 1.5, Some(1.41)),
    fixed12("gate_up", 28672, 4096, 16, 1.5, Some(1.41)),
    fixed12("down", 4096, 14336, 16, 1.5, Some(1.53)),
    fixed12("qkv", 6144, 4096, 16, 1.5, None),
    fixed12("o", 4096, 4096, 32, 1.25, Some(1.04)),
    fixed12("gate_up", 28672, 4096, 32, 1.25, Some(1.18)),
    fixed12("down", 4096, 14336, 32, 1.25, Some(1.23)),
    fixed12("qkv", 6144, 4096, 32, 1.25, None),
    fixed12("o", 4096, 4096, 64, 1.1, Some(0.95)),
    fixed12("gate_up", 28672, 4096, 64, 1.1, Some(1.06)),
    fixed12("down", 4096, 14336, 64, 1.1, Some(1.14)),
    fixed12("qkv", 6144, 4096, 64, 1.1, None),
    fixed12("o", 4096, 4096, 128, 1.0, Some(0.68)),
    fixed12("gate_up", 28672, 4096, 128, 1.0, Some(0.54)),
    fixed12("down", 4096, 14336, 128, 1.0, Some(0.71)),
    fixed12("qkv", 6144, 4096, 128, 1.0, None),
    // 30 microseconds, where cuBLAS takes 95.
    abq("abq w4a16 g128", 1, 3.1, None),
    abq("abq w4a16 g128", 8, 3.1, None),
    // Quantising included; without it in the prototypes.
    abq("abq w2a8", 1, 5.0, Some(6.0)),
    abq("abq w2a8", 8, 5.0, None),
    abq("abq w4a8", 1, 3.5, Some(3.7)),
    abq("abq w4a8", 8, 3.5, None),
    abq("abq w4a4", 1, 3.5, None),
    abq("abq w4a4", 8, 3.5, None),
];

/// A goal and what was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GoalResult {
    /// The goal.
    #[serde(flatten)]
    pub goal: Goal,
    /// What was measured; `None` if it was not.
    pub measured: Option<f64>,
    /// Whether it is reached; `None` if it was not measured.
    pub reached: Option<bool>,
}

/// The goals against what was measured. A wrong result reaches nothing.
pub(super) fn against(rows: &[KernelRow]) -> Vec<GoalResult> {
    GOALS
        .iter()
        .map(|goal| {
            let row = rows
                .iter()
                .find(|row| (row.n, row.k, row.m) == (goal.n, goal.k, goal.m) && row.kernel == goal.kernel);
            let measured = row.and_then(|row| match goal.measure {
                Measure::TimesCublas => row.speed_against_cublas,
                Measure::OutputGbps => Some(2.0 * (row.n * row.k) as f64 / row.microseconds.median / 1e3),
            });
            let reached = measured.zip(row).map(|(x, row)| row.correct && x >= goal.at_least);
            GoalResult { goal: *goal, measured, reached }
        })
        .collect()
}
