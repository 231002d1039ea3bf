//! The picker tries each candidate once for a shape, and remembers; recorded launches can be replayed.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use llmpress_emulator::Emulator;
use llmpress_kernels::gpu::picker::{Picker, Shape};
use llmpress_kernels::gpu::{Error, Gpu, Launch};

const SHAPE: Shape = Shape { kernel: "test", n: 1, k: 2, m: 3, slices: 1 };

#[test]
fn the_fastest_candidate_is_remembered_by_shape() {
    let gpu = Gpu::new(Emulator::new());
    let picker = Picker::trying();
    let mut runs = [0; 3];
    let mut fastest = 2;
    for (shape, expected) in [(SHAPE, 2), (SHAPE, 2), (Shape { m: 4, ..SHAPE }, 1), (SHAPE, 2)] {
        let picked = picker.pick(&gpu, shape, 3, &mut |candidate| {
            runs[candidate] += 1;
            // An emulated GPU's clock counts its work.
            gpu.upload(&vec![0u8; if candidate == fastest { 1 << 10 } else { 1 << 14 }]).map(drop)
        });
        assert_eq!(picked.unwrap(), expected);
        if shape.m == 3 {
            fastest = 1;
        }
    }
    assert_eq!(runs, [16; 3], "two shapes were tried, eight runs each");
    assert_eq!(gpu.allocated().0, 0);
}

#[test]
fn without_trying_the_first_is_taken_and_failures_are_passed_on() {
    let gpu = Gpu::new(Emulator::new());
    assert_eq!(Picker::first().pick(&gpu, SHAPE, 3, &mut |_| unreachable!()).unwrap(), 0);
    assert_eq!(Picker::trying().pick(&gpu, SHAPE, 1, &mut |_| unreachable!()).unwrap(), 0);
    let failed = Picker::trying().pick(&gpu, SHAPE, 2, &mut |_| Err(Error::Invalid("no".to_owned())));
    assert!(matches!(failed, Err(Error::Invalid(_))));
}

#[test]
fn recorded_launches_run_when_they_are_replayed() {
    let gpu = Gpu::new(Emulator::new());
    let (count, copy) = (gpu.upload(&[0u32]).unwrap(), gpu.upload(&[9u32]).unwrap());
    let launch = |arguments: &[_]| {
        gpu.launch(&Launch {
            file: "faults",
            kernel: "all_add_to_one",
            grid: [2, 1, 1],
            block: 32,
            shared: 0,
            arguments,
            overlaps: true,
        })
    };
    let add = || launch(&[count.view().pointer()]);
    let mut graph = gpu
        .capture(|| {
            add()?;
            count.view().copy_to(copy.view())?;
            add()
        })
        .unwrap();
    assert_eq!(count.view().read::<u32>(1).unwrap(), [0]);
    for round in 1..4 {
        graph.replay().unwrap();
        assert_eq!(count.view().read::<u32>(1).unwrap(), [128 * round]);
        assert_eq!(copy.view().read::<u32>(1).unwrap(), [128 * round - 64]);
    }
    // What cannot be recorded is refused, and the recording ends.
    assert!(matches!(gpu.capture(|| count.view().read::<u32>(1).map(|_| ())), Err(Error::Invalid(_))));
    assert!(gpu.capture(|| gpu.allocate(4).map(|_| ())).is_err());
    add().unwrap();
    assert_eq!(count.view().read::<u32>(1).unwrap(), [448]);
    // Errors name the kernel.
    assert!(launch(&[]).is_err_and(|e| e.to_string().contains("all_add_to_one")));
}
