//! A kernel that breaks a rule is caught, and its twin that keeps it is not.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use llmpress_emulator::Emulator;
use llmpress_kernels::gpu::{Argument, Error, Gpu, Launch};

const THREADS: u32 = 64;

struct Run {
    gpu: Gpu,
    shared: u32,
    blocks: u32,
}

impl Run {
    fn new() -> Self {
        Self { gpu: Gpu::new(Emulator::new()), shared: 4 * THREADS, blocks: 1 }
    }

    fn launch(&self, kernel: &'static str, arguments: &[Argument]) -> Result<(), Error> {
        self.gpu.launch(&Launch {
            file: "faults",
            kernel,
            grid: [self.blocks, 1, 1],
            block: THREADS,
            shared: self.shared,
            arguments,
            overlaps: true,
        })
    }

    /// Runs a kernel on an output of a word a thread and `more` arguments.
    fn with_output(&self, kernel: &'static str, more: &[Argument]) -> Result<Vec<u32>, Error> {
        let out = self.gpu.upload(&[0u32; THREADS as usize])?;
        let mut arguments = vec![out.view().pointer()];
        arguments.extend(more);
        self.launch(kernel, &arguments)?;
        out.view().read(THREADS as usize)
    }
}

#[track_caller]
fn caught<T>(result: Result<T, Error>, words: &str) {
    match result {
        Err(Error::Fault { kernel, fault }) => {
            assert!(kernel.starts_with("faults/"), "{kernel}");
            assert!(fault.contains(words), "{fault:?} does not say {words:?}");
        }
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("not caught: {words}"),
    }
}

#[test]
fn a_missing_barrier_is_a_race() {
    let run = Run::new();
    // Thread 1 already wrote what thread 0 of the next round reads; the emulator runs threads in turn.
    caught(run.with_output("missing_barrier", &[]), "shared memory that");
    let out = run.with_output("with_barrier", &[]).unwrap();
    assert_eq!(out, (0..THREADS).map(|t| (t + 1) % THREADS).collect::<Vec<_>>());
    caught(run.with_output("overwritten_too_early", &[]), "no barrier between");
}

#[test]
fn a_warps_barrier_orders_its_warp_only() {
    let run = Run::new();
    let within = run.with_output("warp_barrier", &[Argument::U32(0)]).unwrap();
    assert_eq!(within, (0..THREADS).collect::<Vec<_>>());
    caught(run.with_output("warp_barrier", &[Argument::U32(32)]), "shared memory that");
}

#[test]
fn what_others_read_before_the_warp_met_may_change() {
    let run = Run::new();
    let sums = run.with_output("changes_after_others_read", &[Argument::U32(1)]).unwrap();
    assert_eq!(sums, (0..THREADS).map(|t| 2 * ((t + 1) % 32) + 1).collect::<Vec<_>>());
    caught(run.with_output("changes_after_others_read", &[Argument::U32(0)]), "shared memory that");
}

#[test]
fn writes_to_one_place_must_be_atomic() {
    let mut run = Run::new();
    caught(run.with_output("all_write_one", &[]), "nothing to order the two");
    run.blocks = 3;
    assert_eq!(run.with_output("all_add_to_one", &[]).unwrap()[0], 3 * THREADS);
}

#[test]
fn blocks_that_race_are_caught_in_one_order_of_blocks() {
    let caught_in = |gpu: Gpu| {
        let run = Run { gpu, shared: 0, blocks: 5 };
        matches!(run.with_output("blocks_race", &[]), Err(Error::Fault { .. }))
    };
    assert!(caught_in(Gpu::new(Emulator::new())) || caught_in(Gpu::new(Emulator::backwards())));
}

#[test]
fn accesses_beyond_a_buffer_are_caught() {
    let run = Run { shared: 0, ..Run::new() };
    let (small, out) = (run.gpu.upload(&[1u32; 10]).unwrap(), run.gpu.upload(&[0u32; 1]).unwrap());
    let read = |at| {
        run.gpu.launch(&Launch {
            file: "faults",
            kernel: "reads_at",
            grid: [1, 1, 1],
            block: 1,
            shared: 0,
            arguments: &[small.view().pointer(), out.view().pointer(), Argument::U64(at)],
            overlaps: true,
        })
    };
    read(9).unwrap();
    caught(read(10), "0 bytes after buffer 0 of 40 bytes");
    caught(read(u64::MAX), "outside of every buffer");
    caught(read(1 << 40), "outside of every buffer");
    let write = |at| run.launch("writes_at", &[small.view().pointer(), Argument::U64(at)]);
    caught(write(10), "writes 4 bytes outside");
}

#[test]
fn pieces_of_shared_memory_have_bounds() {
    let run = Run { shared: 48, ..Run::new() };
    assert_eq!(run.with_output("reads_shared_at", &[Argument::U32(4)]).unwrap()[0], 1);
    for at in [5, 7, 8, 11, 1000, u32::MAX] {
        caught(run.with_output("reads_shared_at", &[Argument::U32(at)]), "");
    }
    let small = Run { shared: 64, ..Run::new() };
    caught(
        small.with_output("takes_more_than_given", &[]),
        "takes 80 bytes of shared memory; the launch gives 64",
    );
}

#[test]
fn shared_memory_holds_nothing_at_first() {
    let run = Run { shared: 256, ..Run::new() };
    caught(run.with_output("reads_unwritten_shared", &[]), "nobody has written");
}

#[test]
fn threads_that_never_come_are_named() {
    let run = Run::new();
    caught(run.with_output("half_at_barrier", &[]), "waits at a barrier for ever: thread 63 has returned");
    caught(run.with_output("lane_leaves", &[]), "waits for its warp for ever");
    caught(run.with_output("different_operations", &[]), "while others of its warp are at");
    caught(run.with_output("half_mask", &[]), "whole warps");
}

#[test]
fn places_that_have_no_order_are_caught() {
    let run = Run::new();
    assert_eq!(run.with_output("keeps", &[Argument::U32(0x4e9d_cd84)]).unwrap(), [0; THREADS as usize]);
    caught(run.with_output("keeps", &[Argument::U32(0x4e9d_cd81)]), "the places 1 and 0");
    caught(run.with_output("keeps", &[Argument::U32(0xae9d_cd84)]), "the places 2 and 2");
}

#[test]
fn alignment_is_checked() {
    let run = Run::new();
    let (words, out) = (run.gpu.upload(&[1u32; 10]).unwrap(), run.gpu.upload(&[0u32; 1]).unwrap());
    let arguments = [words.view().pointer(), out.view().pointer()];
    caught(run.launch("misaligned", &arguments), "not aligned");
    caught(run.launch("misaligned_vector", &arguments), "not aligned");
}

#[test]
fn reading_once_what_was_written_is_caught() {
    let run = Run::new();
    let (data, out) = (run.gpu.upload(&[1u32; 64]).unwrap(), run.gpu.upload(&[0u32; 64]).unwrap());
    caught(run.launch("once_of_written", &[data.view().pointer(), out.view().pointer()]), "load_once");
}

#[test]
fn background_copies_need_their_wait_and_their_barrier() {
    let run = Run { shared: 16 * THREADS, ..Run::new() };
    let data: Vec<u32> = (0..8 * THREADS).collect();
    let (data, out) = (run.gpu.upload(&data).unwrap(), run.gpu.upload(&[0u32; 64]).unwrap());
    let copy = |left_out| {
        let arguments = [data.view().pointer(), out.view().pointer(), Argument::U32(left_out)];
        run.launch("background_copy", &arguments)
    };
    copy(0).unwrap();
    assert_eq!(out.view().read::<u32>(2).unwrap(), [128, 132]);
    caught(copy(1), "still copying");
    caught(copy(2), "shared memory that");
    let run = Run { shared: 32 * THREADS, ..run };
    let stages = |stage| {
        run.launch("background_stages", &[data.view().pointer(), out.view().pointer(), Argument::U32(stage)])
    };
    stages(0).unwrap();
    caught(stages(1), "still copying");
}

#[test]
fn arguments_and_names_are_checked() {
    let run = Run::new();
    for (kernel, arguments) in
        [("with_barrier", vec![]), ("with_barrier", vec![Argument::U32(1)]), ("no_such_kernel", vec![])]
    {
        assert!(matches!(run.launch(kernel, &arguments), Err(Error::Invalid(_))));
    }
}

#[test]
fn a_loop_without_end_ends() {
    let run = Run::new();
    let out = run.gpu.upload(&[1u32]).unwrap();
    caught(run.launch("never_ends", &[out.view().pointer()]), "runs without end");
}

#[test]
fn memory_is_kept_apart() {
    let gpu = Gpu::new(Emulator::new());
    let buffer = gpu.upload(&[1u16, 2, 3]).unwrap();
    assert!(buffer.slice(2..7).is_err() && buffer.view().read::<u32>(2).is_err());
    assert_eq!(buffer.slice(2..6).unwrap().read::<u16>(2).unwrap(), [2, 3]);
    let other = gpu.allocate(6).unwrap();
    buffer.view().copy_to(other.view()).unwrap();
    assert_eq!(other.view().read::<u16>(3).unwrap(), [1, 2, 3]);
    assert!(other.view().copy_to(buffer.slice(2..6).unwrap()).is_err());
}

#[test]
fn what_other_blocks_wrote_is_read_afresh_after_an_atomic() {
    let run = Run { blocks: 3, ..Run::new() };
    let parts = run.gpu.upload(&[0f32; 12]).unwrap();
    let counter = run.gpu.upload(&[0u32]).unwrap();
    let out = run.gpu.upload(&[0f32]).unwrap();
    let start = |counts| {
        let launch = Launch {
            file: "faults",
            kernel: "last_block_adds",
            grid: [3, 1, 1],
            block: 4,
            shared: 16,
            arguments: &[
                parts.view().pointer(),
                counter.view().pointer(),
                out.view().pointer(),
                Argument::U32(counts),
            ],
            overlaps: true,
        };
        run.gpu.launch(&launch)
    };
    start(1).unwrap();
    assert_eq!(out.view().read::<f32>(1).unwrap(), [30.0]);
    caught(start(0), "reads afresh");
}

#[test]
fn what_earlier_launches_write_is_touched_after_waiting_only() {
    let run = Run { shared: 0, ..Run::new() };
    let buffers: Vec<_> = (0..3).map(|i| run.gpu.upload(&[i; THREADS as usize]).unwrap()).collect();
    let launch = |kernel, from: usize, to: usize, early: &[Argument], overlaps| {
        let mut arguments = vec![buffers[from].view().pointer(), buffers[to].view().pointer()];
        arguments.extend(early);
        let (grid, shared) = ([1; 3], 0);
        run.gpu.launch(&Launch {
            file: "faults",
            kernel,
            grid,
            block: THREADS,
            shared,
            arguments: &arguments,
            overlaps,
        })
    };
    let copy =
        |from, to, early, overlaps| launch("copies_early", from, to, &[Argument::U32(early)], overlaps);
    // Reading early what no launch writes, and late what one does.
    copy(0, 1, 1, true).unwrap();
    copy(1, 2, 0, true).unwrap();
    // Not only what the launch just before it writes.
    caught(copy(1, 2, 1, true), "before it waits for earlier launches, which write it");
    caught(copy(0, 2, 3, true), "writes byte 0 of buffer 2 before it waits");
    // They have ended: the launch does not overlap, or somebody waited.
    copy(1, 2, 3, false).unwrap();
    caught(copy(2, 0, 1, true), "which write it");
    run.gpu.synchronize().unwrap();
    copy(2, 0, 1, true).unwrap();
    buffers[2].view().copy_to(buffers[1].view()).unwrap();
    copy(0, 2, 1, true).unwrap();
    launch("copies", 2, 1, &[], true).unwrap();
    // What lets nothing begin early has ended by then, and so has all before it.
    copy(1, 2, 1, true).unwrap();
    // A recording keeps who overlaps.
    for (overlaps, holds) in [(true, false), (false, true)] {
        let mut graph = run
            .gpu
            .capture(|| {
                copy(0, 1, 0, true)?;
                copy(1, 2, 1, overlaps)
            })
            .unwrap();
        assert_eq!(graph.replay().is_ok(), holds);
    }
}
