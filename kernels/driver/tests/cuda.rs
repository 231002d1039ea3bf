//! The driver path without a GPU: opening, memory, launches, recordings, times, and what can go wrong with each.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::thread;

use llmpress_driver_standin::{DRIVER_NAMES, built, hide, install};
use llmpress_emulator::Emulator;
use llmpress_kernels::gpu::cuda::{Cuda, devices};
use llmpress_kernels::gpu::fixed12::Matrix;
use llmpress_kernels::gpu::gate::{Activation, gate};
use llmpress_kernels::gpu::picker::Picker;
use llmpress_kernels::gpu::product::{Product, Weights, Workspace, product_in, variants};
use llmpress_kernels::gpu::{Argument, Error, Gpu, Launch, Result, ceiling, modules};
use support::{calls, child, clean, configure, lines};

fn with_driver(test: &str, settings: &str, body: impl FnOnce(&Path)) {
    child(test, |dir| install(dir, DRIVER_NAMES).unwrap(), settings, body);
}

fn open() -> Gpu {
    Gpu::new(Cuda::open(0).unwrap())
}

/// What the GPU cannot be used for.
fn why() -> String {
    match Cuda::open(0) {
        Err(Error::Unavailable(why)) => why,
        other => panic!("{other:?}"),
    }
}

fn numbers(count: usize, seed: u32) -> Vec<f32> {
    (0..count as u32).map(|i| ((i * 7 + seed) % 23) as f32 / 8.0 - 1.3).collect()
}

fn words(count: usize, seed: u32) -> Vec<u16> {
    numbers(count, seed).into_iter().map(|x| (x.to_bits() >> 16) as u16).collect()
}

/// Every variant of a product of plain and of fixed12 weights, as bits.
fn products(gpu: &Gpu) -> Result<Vec<Vec<u32>>> {
    let (rows, cols, tokens) = (272, 192, 40);
    let w = words(rows * cols, 3);
    let (dense, packed) = (gpu.upload(&w)?, Matrix::encode(gpu, rows, cols, &w)?);
    let x = gpu.upload(&words(tokens * cols, 5))?;
    let y = gpu.allocate(4 * tokens * rows)?;
    let mut all = Vec::new();
    for weights in [Weights::dense(dense.view(), rows, cols), Weights::fixed12(&packed)] {
        let workspace = Workspace::new(gpu, weights.workspace_bytes(gpu, tokens))?;
        for variant in variants(gpu, weights, tokens) {
            let operands = Product {
                x: x.view(),
                stride: cols,
                tokens,
                y: y.view(),
                y_stride: rows,
                bias: None,
                adds: false,
                workspace: Some(&workspace),
            };
            product_in(gpu, weights, &operands, variant)?;
            all.push(y.view().read::<f32>(tokens * rows)?.into_iter().map(f32::to_bits).collect());
        }
    }
    Ok(all)
}

#[test]
fn opening_says_what_there_is_and_dropping_gives_it_all_back() {
    with_driver(
        "opening_says_what_there_is_and_dropping_gives_it_all_back",
        "multiprocessors=7;capability=8.6",
        |dir| {
            let cuda = Cuda::open(0).unwrap();
            let info = cuda.info().clone();
            assert_eq!((info.name.as_str(), info.capability, info.multiprocessors), ("Stand-in", (8, 6), 7));
            assert_eq!((info.driver, info.memory), ((12, 4), 4 << 30));
            assert_eq!(devices().unwrap(), [info]);
            for file in modules() {
                cuda.load(file).unwrap();
            }
            // A second time costs nothing.
            let loads =
                |dir| calls(&lines(dir)).iter().filter(|call| call.starts_with("cuModuleLoad")).count();
            cuda.load("gate").unwrap();
            assert_eq!(loads(dir), modules().len());
            let gpu = Gpu::new(cuda);
            let buffer = gpu.upload(&[1u32, 2, 3]).unwrap();
            assert_eq!(buffer.view().read::<u32>(3).unwrap(), [1, 2, 3]);
            drop(gpu);
            drop(buffer);
            assert!(calls(&lines(dir)).contains(&"cuDevicePrimaryCtxRelease_v2"));
            clean(dir);
        },
    );
}

/// Puts a driver into a directory that has no function of this name.
fn install_without(dir: &Path, function: &str) {
    let mut library = std::fs::read(built().unwrap()).unwrap();
    let name = [&b"\0"[..], function.as_bytes(), b"\0"].concat();
    let places: Vec<usize> =
        library.windows(name.len()).enumerate().filter(|(_, w)| *w == name).map(|(i, _)| i).collect();
    assert!(!places.is_empty());
    for at in places {
        library[at + name.len() - 2] = b'_';
    }
    for name in DRIVER_NAMES {
        std::fs::write(dir.join(name), &library).unwrap();
    }
}

#[test]
fn a_driver_that_lacks_a_function_is_refused_by_its_name() {
    // Which one differs by a setting: each child is a process of its own, and runs this test anew.
    for function in ["cuInit", "cuDeviceTotalMem_v2", "cuGraphLaunch", "cuMemsetD8Async"] {
        let test = "a_driver_that_lacks_a_function_is_refused_by_its_name";
        child(
            test,
            |dir| install_without(dir, function),
            "",
            |_| {
                let why = why();
                let lacks = ["cuInit", "cuDeviceTotalMem_v2", "cuGraphLaunch", "cuMemsetD8Async"];
                assert!(lacks.iter().any(|name| why.contains(&format!("has no {name}:"))), "{why}");
                assert!(why.contains("install the NVIDIA driver"), "{why}");
            },
        );
        if std::env::var_os("LLMPRESS_STANDIN_CHILD").is_some() {
            return;
        }
    }
}

#[test]
fn kernels_give_the_emulators_bits_and_ask_for_the_memory_they_need() {
    with_driver("kernels_give_the_emulators_bits_and_ask_for_the_memory_they_need", "", |dir| {
        let found = products(&open()).unwrap();
        assert_eq!(found, products(&Gpu::new(Emulator::new())).unwrap());
        assert!(found.len() > 4);
        // More than 48 KiB of shared memory is asked for, once a kernel.
        let asked = calls(&lines(dir)).iter().filter(|call| **call == "cuFuncSetAttribute").count();
        assert!(asked > 0 && asked <= found.len(), "{asked}");
        clean(dir);
    });
}

#[test]
fn a_gpu_with_less_shared_memory_runs_the_variants_that_fit() {
    let settings = "shared=101376;capability=8.6";
    with_driver("a_gpu_with_less_shared_memory_runs_the_variants_that_fit", settings, |dir| {
        let found = products(&open()).unwrap();
        assert_eq!(found, products(&Gpu::new(Emulator::with_shared_limit(101_376))).unwrap());
        let gpu = open();
        let launch = Launch {
            file: "ceiling",
            kernel: "read_all",
            grid: [1; 3],
            block: 512,
            shared: 101_377,
            arguments: &[Argument::Pointer(0), Argument::U64(0), Argument::Pointer(0)],
            overlaps: true,
        };
        let refused = gpu.launch(&launch).unwrap_err().to_string();
        assert!(refused.contains("101377") && refused.contains("101376"), "{refused}");
        drop(gpu);
        clean(dir);
    });
}

#[test]
fn a_recording_runs_when_it_is_replayed_and_not_before() {
    with_driver("a_recording_runs_when_it_is_replayed_and_not_before", "", |dir| {
        let gpu = open();
        let inner = 64;
        let (a, b) = (gpu.upload(&numbers(inner, 1)).unwrap(), gpu.upload(&numbers(inner, 2)).unwrap());
        let (x, copy) = (gpu.upload(&vec![7u16; inner]).unwrap(), gpu.upload(&vec![9u16; inner]).unwrap());
        let work = || {
            gate(&gpu, Activation::Silu, a.view(), Some(b.view()), inner, inner, 1, x.view(), inner)?;
            x.view().copy_to(copy.view())
        };
        // As a session does: once as it is, which loads the kernel.
        work().unwrap();
        let expected = copy.view().read::<u16>(inner).unwrap();
        x.view().write(&vec![7u16; inner]).unwrap();
        copy.view().write(&vec![9u16; inner]).unwrap();
        let mut graph = gpu.capture(work).unwrap();
        gpu.synchronize().unwrap();
        assert_eq!(copy.view().read::<u16>(inner).unwrap(), vec![9; inner]);
        for _ in 0..2 {
            graph.replay().unwrap();
            assert_eq!(copy.view().read::<u16>(inner).unwrap(), expected);
            copy.view().write(&vec![9u16; inner]).unwrap();
        }
        // Nothing but launches and copies between the two ends.
        let all = lines(dir);
        let names = calls(&all);
        let at = |name| names.iter().position(|call| *call == name).unwrap();
        let between = &names[at("cuStreamBeginCapture_v2") + 1..at("cuStreamEndCapture")];
        let allowed = ["cuCtxGetCurrent", "cuLaunchKernel", "cuLaunchKernelEx", "cuMemcpyDtoDAsync_v2"];
        assert!(between.iter().all(|call| allowed.contains(call)), "{between:?}");
        assert!(all.iter().all(|line| !line.starts_with("refused")));
        drop((graph, a, b, x, copy));
        drop(gpu);
        clean(dir);
    });
}

#[test]
fn waiting_in_a_recording_fails_and_the_gpu_goes_on() {
    with_driver("waiting_in_a_recording_fails_and_the_gpu_goes_on", "", |dir| {
        let gpu = open();
        let buffer = gpu.upload(&[1u32, 2]).unwrap();
        let view = buffer.view();
        assert!(gpu.capture(|| view.read::<u32>(1).map(|_| ())).is_err());
        assert!(gpu.capture(|| view.write(&[3u32])).is_err());
        let given_back = gpu.capture(|| {
            drop(gpu.allocate(64)?);
            view.slice(0..4)?.copy_to(view.slice(4..8)?)
        });
        assert!(given_back.unwrap_err().to_string().contains("given back"));
        assert!(gpu.capture(|| gpu.synchronize()).is_err());
        // An error that the driver had no part in.
        assert!(gpu.capture(|| Err(Error::Invalid("no".to_owned()))).unwrap_err().to_string() == "no");
        assert_eq!(view.read::<u32>(2).unwrap(), [1, 2]);
        let mut graph = gpu.capture(|| view.slice(0..4)?.copy_to(view.slice(4..8)?)).unwrap();
        graph.replay().unwrap();
        assert_eq!(view.read::<u32>(2).unwrap(), [1, 1]);
        drop((graph, buffer));
        drop(gpu);
        clean(dir);
    });
}

#[test]
fn times_are_those_of_the_work() {
    with_driver("times_are_those_of_the_work", "", |dir| {
        let gpu = open();
        let data = gpu.upload(&vec![1u32; 1 << 20]).unwrap();
        let out = gpu.allocate(4 * ceiling::blocks(&gpu) as usize).unwrap();
        let time = |bytes: usize| {
            let some = data.slice(0..bytes).unwrap();
            gpu.backend().timed(&mut || ceiling::read_all(&gpu, some, out.view())).unwrap()
        };
        let (little, much) = (time(1 << 10), time(4 << 20));
        // Counted, not measured: other work on the processor does not change them.
        assert!(little > 0.0 && much - little > 1e-4, "{little} {much}");
        assert_eq!([little, much], [time(1 << 10), time(4 << 20)]);
        // What fails in between is what is said.
        let failed = gpu.backend().timed(&mut || Err(Error::Invalid("no".to_owned())));
        assert_eq!(failed.unwrap_err().to_string(), "no");
        drop((data, out));
        drop(gpu);
        clean(dir);
    });
}

#[test]
fn shapes_are_picked_by_their_times() {
    with_driver("shapes_are_picked_by_their_times", "", |dir| {
        let gpu = open();
        let picker = Picker::trying();
        let shape = llmpress_kernels::gpu::picker::Shape { kernel: "any", n: 1, k: 2, m: 3, slices: 1 };
        let buffers = [1usize << 22, 1 << 10].map(|bytes| gpu.upload(&vec![1u8; bytes]).unwrap());
        let out = gpu.allocate(4 * ceiling::blocks(&gpu) as usize).unwrap();
        let mut runs = [0, 0];
        for round in &mut runs {
            let picked = picker
                .pick(&gpu, shape, 2, &mut |i| {
                    *round += 1;
                    ceiling::read_all(&gpu, buffers[i].view(), out.view())
                })
                .unwrap();
            assert_eq!(picked, 1);
        }
        // The second time it is remembered.
        assert!(runs[0] >= 2 && runs[1] == 0, "{runs:?}");
        drop((buffers, out));
        drop(gpu);
        clean(dir);
    });
}

#[test]
fn memory_that_is_not_there_is_said_with_its_sizes() {
    with_driver("memory_that_is_not_there_is_said_with_its_sizes", "memory=1000", |dir| {
        let gpu = open();
        let first = gpu.allocate(600).unwrap();
        match gpu.allocate(500) {
            Err(Error::Memory { asked: 500, free: 400, total: 1000 }) => {}
            other => panic!("{other:?}"),
        }
        drop(first);
        drop(gpu.allocate(1000).unwrap());
        assert_eq!(gpu.allocated(), (0, 1000));
        drop(gpu);
        clean(dir);
    });
}

#[test]
fn a_kernel_that_fails_is_an_error_where_somebody_waits_and_from_then_on() {
    with_driver("a_kernel_that_fails_is_an_error_where_somebody_waits_and_from_then_on", "", |dir| {
        let gpu = open();
        let (data, out) = (gpu.allocate(64).unwrap(), gpu.allocate(4).unwrap());
        let launch = Launch {
            file: "ceiling",
            kernel: "read_all",
            grid: [1; 3],
            block: 512,
            shared: 128,
            arguments: &[data.view().pointer(), Argument::U64(1 << 20), out.view().pointer()],
            overlaps: true,
        };
        gpu.launch(&launch).unwrap();
        for error in [
            gpu.synchronize().unwrap_err(),
            data.view().read::<u8>(1).unwrap_err(),
            gpu.allocate(4).unwrap_err(),
            gpu.launch(&launch).unwrap_err(),
        ] {
            assert!(error.to_string().contains("CUDA_ERROR_ILLEGAL_ADDRESS"), "{error}");
        }
        drop((data, out));
        drop(gpu);
        let faults: Vec<String> = lines(dir).into_iter().filter(|line| line.starts_with("fault")).collect();
        assert!(faults.len() == 1 && faults[0].contains("ceiling/read_all"), "{faults:?}");
    });
}

/// Something of everything.
fn everything() -> Result<()> {
    let gpu = Gpu::new(Cuda::open(0)?);
    let inner = 64;
    let (a, x) = (gpu.upload(&numbers(inner, 1))?, gpu.upload(&vec![0u16; inner])?);
    let work = || gate(&gpu, Activation::Silu, a.view(), Some(a.view()), inner, inner, 1, x.view(), inner);
    work()?;
    let mut graph = gpu.capture(work)?;
    graph.replay()?;
    gpu.backend().timed(&mut || graph.replay())?;
    gpu.backend().memory()?;
    x.view().read::<u16>(inner)?;
    gpu.synchronize()
}

#[test]
fn a_gpu_that_is_lost_at_any_call_is_an_error_that_names_the_call() {
    with_driver("a_gpu_that_is_lost_at_any_call_is_an_error_that_names_the_call", "", |dir| {
        everything().unwrap();
        clean(dir);
        let names = lines(dir);
        let names = calls(&names);
        let end = names.iter().rposition(|call| *call == "cuStreamSynchronize").unwrap();
        let mut seen = Vec::new();
        for call in 1..=end {
            configure(dir, &format!("lose={call};lost=214"));
            match everything() {
                Err(error) => {
                    let text = error.to_string();
                    let named = text.contains("cu")
                        || text.contains("the launch of")
                        || text.contains("does not start");
                    assert!(text.contains("ECC") && named, "{call} ({}): {text}", names[call - 1]);
                    seen.push(text);
                }
                // What is dropped last has nobody to tell.
                Ok(()) => assert!(names[call..].iter().all(|name| !name.contains("Launch")), "{call}"),
            }
        }
        seen.dedup();
        assert!(seen.len() > 10, "{seen:#?}");
    });
}

#[test]
fn threads_share_a_gpu() {
    with_driver("threads_share_a_gpu", "", |dir| {
        let gpu = open();
        let expected = products(&Gpu::new(Emulator::new())).unwrap();
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| assert_eq!(products(&gpu).unwrap(), expected));
            }
        });
        drop(gpu);
        clean(dir);
    });
}

#[test]
fn without_a_driver_it_is_said_what_is_needed() {
    let test = "without_a_driver_it_is_said_what_is_needed";
    child(
        test,
        |dir| hide(dir, DRIVER_NAMES).unwrap(),
        "",
        |_| {
            assert!(why().contains("libcuda.so.1") && why().contains("NVIDIA"), "{}", why());
        },
    );
}

#[test]
fn a_driver_is_found_by_either_name() {
    for name in DRIVER_NAMES {
        // The other one is there too, and cannot be loaded.
        let prepare = |dir: &Path| {
            install(dir, &[name]).unwrap();
            let others: Vec<&str> = DRIVER_NAMES.iter().filter(|other| *other != name).copied().collect();
            hide(dir, &others).unwrap();
        };
        child("a_driver_is_found_by_either_name", prepare, "", |_| drop(open()));
    }
}

#[test]
fn what_cannot_be_used_says_why() {
    with_driver("what_cannot_be_used_says_why", "", |dir| {
        for (settings, wanted) in [
            // The library of the toolkit's `stubs` directory.
            ("init=34", &["does not start", "STUB_LIBRARY"][..]),
            ("init=803", &["does not start", "DRIVER_MISMATCH"]),
            ("devices=0", &["NO_DEVICE"]),
            ("driver=12030", &["CUDA 12.3", "12.4", "550"]),
            ("driver=11080", &["CUDA 11.8", "12.4"]),
            ("capability=7.5", &["7.5", "8.0", "Stand-in"]),
        ] {
            configure(dir, settings);
            let why = why();
            assert!(wanted.iter().all(|part| why.contains(part)), "{settings}: {why}");
        }
        configure(dir, "devices=2");
        assert_eq!(devices().unwrap().len(), 2);
        let why = Cuda::open(2).unwrap_err().to_string();
        assert!(why.contains("no GPU 2") && why.contains("finds 2"), "{why}");
        let (first, second) = (open(), Gpu::new(Cuda::open(1).unwrap()));
        let buffers = (first.upload(&[1u32]).unwrap(), second.upload(&[2u32]).unwrap());
        assert_eq!(buffers.0.view().read::<u32>(1).unwrap(), [1]);
        assert_eq!(buffers.1.view().read::<u32>(1).unwrap(), [2]);
        drop(buffers);
        drop((first, second));
        clean(dir);
    });
}

#[test]
fn ptx_that_does_not_compile_is_named() {
    with_driver("ptx_that_does_not_compile_is_named", "refuse=silu_gate", |dir| {
        let cuda = Cuda::open(0).unwrap();
        let error = cuda.load("gate").unwrap_err().to_string();
        assert!(error.contains("(gate)") && error.contains("CUDA_ERROR_INVALID_PTX"), "{error}");
        // And what the compiler says of it.
        assert!(error.contains("line 24") && error.contains("silu_gate is refused"), "{error}");
        assert!(cuda.load("ceiling").is_ok());
        assert!(cuda.load("no_such_file").unwrap_err().to_string().contains("no_such_file"));
        drop(cuda);
        clean(dir);
    });
}
