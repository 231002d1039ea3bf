//! The read ceiling of a GPU, by which achieved bandwidths are judged.

use super::{Argument, Gpu, Launch, Result, View};

/// Threads of a block.
const THREADS: u32 = 512;

/// Blocks of a launch: the number of words of `out`.
#[must_use]
pub fn blocks(gpu: &Gpu) -> u32 {
    4 * gpu.backend().multiprocessors()
}

/// Reads `data` once, 16 bytes at a time (a rest of fewer is left out), and writes a word for each of [`blocks`] to
/// `out`: together, by exclusive or, that of all words.
///
/// # Errors
/// `out` is too small; the launch fails.
pub fn read_all(gpu: &Gpu, data: View<'_>, out: View<'_>) -> Result<()> {
    let blocks = blocks(gpu);
    out.require("out", 4 * blocks as usize)?;
    gpu.launch(&Launch {
        file: "ceiling",
        kernel: "read_all",
        grid: [blocks, 1, 1],
        block: THREADS,
        shared: 128,
        arguments: &[data.pointer(), Argument::U64((data.bytes() / 16) as u64), out.pointer()],
        overlaps: true,
    })
}
