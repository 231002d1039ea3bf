//! What the stand-in refuses, and what it writes down: each rule of the driver's that it checks, broken once, through
//! the bindings that the GPU path has.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, unsafe_code)]

mod support;

use std::ffi::{CString, c_void};
use std::path::Path;
use std::{fs, mem, ptr, thread};

use cudarc::driver::sys::{self, CUresult as Code, CUstreamCaptureMode as Mode};
use llmpress_driver_standin::{DRIVER_NAMES, install};
use support::{child, clean, configure, lines};

fn with_driver(test: &str, body: impl FnOnce(&Path)) {
    child(test, |dir| install(dir, DRIVER_NAMES).unwrap(), "", body);
}

fn faults(dir: &Path) -> Vec<String> {
    lines(dir).into_iter().filter(|line| line.starts_with("fault")).collect()
}

/// Wants one fault more than before, which says so.
fn told(dir: &Path, before: &mut usize, what: &str) {
    let faults = faults(dir);
    assert!(faults.len() == *before + 1 && faults[*before].contains(what), "{what:?} in {faults:#?}");
    *before += 1;
}

/// A GPU with its context on this thread.
fn started() -> sys::CUcontext {
    let mut context = ptr::null_mut();
    // SAFETY: room for a handle.
    unsafe {
        assert_eq!(sys::cuInit(0), Code::CUDA_SUCCESS);
        assert_eq!(sys::cuDevicePrimaryCtxRetain(&mut context, 0), Code::CUDA_SUCCESS);
        assert_eq!(sys::cuCtxSetCurrent(context), Code::CUDA_SUCCESS);
    }
    context
}

fn stream(flags: u32) -> sys::CUstream {
    let mut stream = ptr::null_mut();
    // SAFETY: room for a handle.
    assert_eq!(unsafe { sys::cuStreamCreate(&mut stream, flags) }, Code::CUDA_SUCCESS);
    stream
}

fn memory(bytes: usize) -> u64 {
    let mut address = 0;
    // SAFETY: room for an address.
    assert_eq!(unsafe { sys::cuMemAlloc_v2(&mut address, bytes) }, Code::CUDA_SUCCESS);
    address
}

fn ptx(file: &str) -> CString {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ptx").join(file).with_extension("ptx");
    CString::new(fs::read_to_string(path).unwrap()).unwrap()
}

fn load(text: &CString) -> Result<sys::CUmodule, Code> {
    let mut module = ptr::null_mut();
    // SAFETY: room for a handle; the text ends in a zero byte.
    match unsafe { sys::cuModuleLoadData(&mut module, text.as_ptr().cast()) } {
        Code::CUDA_SUCCESS => Ok(module),
        code => Err(code),
    }
}

fn function(module: sys::CUmodule, name: &str) -> Result<sys::CUfunction, Code> {
    let (mut function, name) = (ptr::null_mut(), CString::new(name).unwrap());
    // SAFETY: room for a handle; the name ends in a zero byte.
    match unsafe { sys::cuModuleGetFunction(&mut function, module, name.as_ptr()) } {
        Code::CUDA_SUCCESS => Ok(function),
        code => Err(code),
    }
}

/// `read_all(data, vectors, out)` of ceiling.cu.
fn read_all(f: sys::CUfunction, at: (u64, u64), block: u32, shared: u32, stream: sys::CUstream) -> Code {
    let (mut data, mut vectors, mut out) = (at.0, 4u64, at.1);
    let mut arguments: [*mut c_void; 3] =
        [(&raw mut data).cast(), (&raw mut vectors).cast(), (&raw mut out).cast()];
    let (arguments, extra) = (arguments.as_mut_ptr(), ptr::null_mut());
    // SAFETY: the kernel takes three arguments of eight bytes.
    unsafe { sys::cuLaunchKernel(f, 1, 1, 1, block, 1, 1, shared, stream, arguments, extra) }
}

#[test]
fn nothing_goes_before_the_start_and_without_a_context() {
    with_driver("nothing_goes_before_the_start_and_without_a_context", |dir| {
        let (mut count, mut address, mut seen) = (0, 0, 0);
        // SAFETY: room for what is given back.
        unsafe {
            assert_eq!(sys::cuDeviceGetCount(&mut count), Code::CUDA_ERROR_NOT_INITIALIZED);
            told(dir, &mut seen, "before cuInit");
            assert_eq!(sys::cuInit(0), Code::CUDA_SUCCESS);
            assert_eq!(sys::cuDeviceGetCount(&mut count), Code::CUDA_SUCCESS);
            assert_eq!(count, 1);
            assert_eq!(sys::cuMemAlloc_v2(&mut address, 16), Code::CUDA_ERROR_INVALID_CONTEXT);
            told(dir, &mut seen, "without a context");
            let context = started();
            // The context is of the thread that it was set on.
            thread::scope(|scope| {
                let code = scope.spawn(|| sys::cuCtxSynchronize()).join().unwrap();
                assert_eq!(code, Code::CUDA_ERROR_INVALID_CONTEXT);
            });
            told(dir, &mut seen, "without a context");
            assert_eq!(sys::cuDevicePrimaryCtxRelease_v2(0), Code::CUDA_SUCCESS);
            assert_eq!(sys::cuMemAlloc_v2(&mut address, 16), Code::CUDA_ERROR_CONTEXT_IS_DESTROYED);
            told(dir, &mut seen, "given back");
            assert_eq!(sys::cuCtxSetCurrent(context), Code::CUDA_ERROR_INVALID_CONTEXT);
            told(dir, &mut seen, "a context that is none");
            assert_eq!(sys::cuDevicePrimaryCtxRelease_v2(0), Code::CUDA_ERROR_INVALID_CONTEXT);
            told(dir, &mut seen, "nobody holds");
        }
    });
}

#[test]
fn memory_is_given_back_once_and_copies_stay_inside() {
    with_driver("memory_is_given_back_once_and_copies_stay_inside", |dir| {
        configure(dir, "memory=1000");
        started();
        let (stream, at, mut seen) = (stream(1), memory(600), 0);
        let mut data = [1u8; 64];
        // SAFETY: the host's ranges have the sizes that are said; the GPU's are checked.
        unsafe {
            let (mut more, mut free, mut all) = (0, 0, 0);
            assert_eq!(sys::cuMemAlloc_v2(&mut more, 500), Code::CUDA_ERROR_OUT_OF_MEMORY);
            assert_eq!(sys::cuMemAlloc_v2(&mut more, 0), Code::CUDA_ERROR_INVALID_VALUE);
            assert_eq!(sys::cuMemGetInfo_v2(&mut free, &mut all), Code::CUDA_SUCCESS);
            assert_eq!((free, all), (400, 1000));
            let write = |to, bytes| sys::cuMemcpyHtoDAsync_v2(to, data.as_ptr().cast(), bytes, stream);
            assert_eq!(write(at + 536, 64), Code::CUDA_SUCCESS);
            assert_eq!(write(at + 537, 64), Code::CUDA_ERROR_INVALID_VALUE);
            told(dir, &mut seen, "in no piece of memory");
            assert_eq!(sys::cuMemcpyDtoDAsync_v2(at, at + 10, 20, stream), Code::CUDA_ERROR_INVALID_VALUE);
            told(dir, &mut seen, "overlap");
            assert_eq!(
                sys::cuMemcpyDtoHAsync_v2(data.as_mut_ptr().cast(), at, 64, stream),
                Code::CUDA_SUCCESS
            );
            // What nobody wrote.
            assert_eq!(data, [0xff; 64]);
            assert_eq!(sys::cuMemcpyDtoH_v2(data.as_mut_ptr().cast(), at + 536, 64), Code::CUDA_SUCCESS);
            assert_eq!(data, [1; 64]);
            assert_eq!(sys::cuMemFree_v2(at + 1), Code::CUDA_ERROR_INVALID_VALUE);
            told(dir, &mut seen, "given back");
            assert_eq!(sys::cuMemFree_v2(at), Code::CUDA_SUCCESS);
            assert_eq!(sys::cuMemFree_v2(at), Code::CUDA_ERROR_INVALID_VALUE);
            told(dir, &mut seen, "given back");
        }
    });
}

#[test]
fn work_that_nobody_waits_for_is_not_done() {
    with_driver("work_that_nobody_waits_for_is_not_done", |dir| {
        started();
        let (a, b, at) = (stream(1), stream(1), memory(4));
        let mut data = [0u8; 4];
        // SAFETY: the host's ranges have the sizes that are said.
        unsafe {
            assert_eq!(sys::cuMemsetD8Async(at, 7, 4, a), Code::CUDA_SUCCESS);
            // Another stream does not see it.
            assert_eq!(sys::cuMemcpyDtoHAsync_v2(data.as_mut_ptr().cast(), at, 4, b), Code::CUDA_SUCCESS);
            assert_eq!(data, [0xff; 4]);
            let mut event = ptr::null_mut();
            assert_eq!(sys::cuEventCreate(&mut event, 2), Code::CUDA_SUCCESS);
            assert_eq!(sys::cuEventRecord(event, a), Code::CUDA_SUCCESS);
            assert_eq!(sys::cuStreamWaitEvent(b, event, 0), Code::CUDA_SUCCESS);
            assert_eq!(sys::cuMemcpyDtoHAsync_v2(data.as_mut_ptr().cast(), at, 4, b), Code::CUDA_SUCCESS);
            assert_eq!(data, [7; 4]);
        }
        clean(dir);
    });
}

#[test]
fn handles_are_of_their_kind_and_alive() {
    with_driver("handles_are_of_their_kind_and_alive", |dir| {
        started();
        let (a, at, mut seen) = (stream(1), memory(64), 0);
        let module = load(&ptx("ceiling")).unwrap();
        let f = function(module, "read_all").unwrap();
        assert_eq!(function(module, "read_none").unwrap_err(), Code::CUDA_ERROR_NOT_FOUND);
        // SAFETY: the driver checks handles here.
        unsafe {
            assert_eq!(
                read_all(f, (at, at), 512, 64, a.wrapping_byte_add(4)),
                Code::CUDA_ERROR_INVALID_HANDLE
            );
            told(dir, &mut seen, "no stream");
            assert_eq!(read_all(a.cast(), (at, at), 512, 64, a), Code::CUDA_ERROR_INVALID_HANDLE);
            told(dir, &mut seen, "no function");
            assert_eq!(sys::cuModuleUnload(module), Code::CUDA_SUCCESS);
            assert_eq!(read_all(f, (at, at), 512, 64, a), Code::CUDA_ERROR_INVALID_HANDLE);
            told(dir, &mut seen, "after its module was unloaded");
            assert_eq!(sys::cuModuleUnload(module), Code::CUDA_ERROR_INVALID_HANDLE);
            told(dir, &mut seen, "no module");
            assert_eq!(sys::cuStreamDestroy_v2(a), Code::CUDA_SUCCESS);
            assert_eq!(sys::cuStreamSynchronize(a), Code::CUDA_ERROR_INVALID_HANDLE);
            told(dir, &mut seen, "no stream");
            assert_eq!(sys::cuGraphLaunch(f.cast(), ptr::null_mut()), Code::CUDA_ERROR_INVALID_HANDLE);
            told(dir, &mut seen, "no executable graph");
            let mut milliseconds = 0.0;
            let mut event = ptr::null_mut();
            assert_eq!(sys::cuEventCreate(&mut event, 2), Code::CUDA_SUCCESS);
            let elapsed = sys::cuEventElapsedTime(&mut milliseconds, event, event);
            assert_eq!(elapsed, Code::CUDA_ERROR_INVALID_HANDLE);
            told(dir, &mut seen, "an event that has none");
        }
    });
}

#[test]
fn launches_are_what_a_kernel_was_compiled_for() {
    with_driver("launches_are_what_a_kernel_was_compiled_for", |dir| {
        configure(dir, "shared=65536");
        started();
        let (a, at, out, mut seen) = (stream(1), memory(64), memory(4), 0);
        let f = function(load(&ptx("ceiling")).unwrap(), "read_all").unwrap();
        assert_eq!(read_all(f, (at, out), 1024, 128, a), Code::CUDA_ERROR_INVALID_VALUE);
        told(dir, &mut seen, "compiled for 512 threads");
        assert_eq!(read_all(f, (at, out), 0, 128, a), Code::CUDA_ERROR_INVALID_VALUE);
        told(dir, &mut seen, "compiled for 512 threads");
        assert_eq!(read_all(f, (at, out), 512, 49_153, a), Code::CUDA_ERROR_INVALID_VALUE);
        told(dir, &mut seen, "where 49152 were asked for");
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function is loaded.
        unsafe {
            assert_eq!(sys::cuFuncSetAttribute(f, attribute, 65_537), Code::CUDA_ERROR_INVALID_VALUE);
            assert_eq!(sys::cuFuncSetAttribute(f, attribute, 65_536), Code::CUDA_SUCCESS);
            assert_eq!(read_all(f, (at, out), 512, 65_536, a), Code::CUDA_SUCCESS);
            assert_eq!(sys::cuStreamSynchronize(a), Code::CUDA_SUCCESS);
            // Beyond its memory: nothing is said of it before somebody waits, and then by every call.
            assert_eq!(read_all(f, (at + 32, out), 512, 128, a), Code::CUDA_SUCCESS);
            assert_eq!(sys::cuStreamSynchronize(a), Code::CUDA_ERROR_ILLEGAL_ADDRESS);
            told(dir, &mut seen, "outside of every buffer");
            assert_eq!(sys::cuMemFree_v2(at), Code::CUDA_ERROR_ILLEGAL_ADDRESS);
        }
    });
}

#[test]
fn a_launch_with_attributes_is_a_launch() {
    with_driver("a_launch_with_attributes_is_a_launch", |dir| {
        for (settings, expected) in [
            ("", Code::CUDA_SUCCESS),
            // Programmatic launches are Hopper's.
            ("capability=8.9", Code::CUDA_ERROR_NOT_SUPPORTED),
        ] {
            configure(dir, settings);
            started();
            let (a, data, out) = (stream(1), memory(64), memory(4));
            let f = function(load(&ptx("ceiling")).unwrap(), "read_all").unwrap();
            let (mut at, mut vectors, mut to) = (data, 4u64, out);
            let mut arguments: [*mut c_void; 3] =
                [(&raw mut at).cast(), (&raw mut vectors).cast(), (&raw mut to).cast()];
            // SAFETY: zeros are a value of the union; the kernel takes three arguments of eight bytes.
            unsafe {
                let mut attribute: sys::CUlaunchAttribute = mem::zeroed();
                attribute.id =
                    sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
                attribute.value.programmaticStreamSerializationAllowed = 1;
                let config = sys::CUlaunchConfig {
                    gridDimX: 1,
                    gridDimY: 1,
                    gridDimZ: 1,
                    blockDimX: 512,
                    blockDimY: 1,
                    blockDimZ: 1,
                    sharedMemBytes: 128,
                    hStream: a,
                    attrs: &mut attribute,
                    numAttrs: 1,
                };
                let launched = sys::cuLaunchKernelEx(&config, f, arguments.as_mut_ptr(), ptr::null_mut());
                assert_eq!(launched, expected);
                assert_eq!(sys::cuStreamSynchronize(a), Code::CUDA_SUCCESS);
                let mut sum = [0u8; 4];
                assert_eq!(sys::cuMemcpyDtoH_v2(sum.as_mut_ptr().cast(), out, 4), Code::CUDA_SUCCESS);
                // Sixteen words of ones cancel.
                let ran = if launched == Code::CUDA_SUCCESS { [0; 4] } else { [0xff; 4] };
                assert_eq!(sum, ran);
            }
            clean(dir);
        }
    });
}

/// A call, by what is written down of it, with a stream and some memory.
type Call = (&'static str, Box<dyn Fn(sys::CUstream, u64) -> Code>);

/// What may not be called while a stream records, each of which spoils the recording.
fn forbidden() -> Vec<Call> {
    let text = ptx("ceiling");
    // SAFETY: room for what is given back; the host's ranges have the sizes that are said.
    unsafe {
        vec![
            ("cuMemAlloc", Box::new(|_, _| sys::cuMemAlloc_v2(&mut 0, 16))),
            ("cuMemFree", Box::new(|_, at| sys::cuMemFree_v2(at))),
            (
                "loading a module",
                Box::new(move |_, _| load(&text).map_or_else(|code| code, |_| Code::CUDA_SUCCESS)),
            ),
            ("cuMemcpyHtoD", Box::new(|_, at| sys::cuMemcpyHtoD_v2(at, [0u8; 4].as_ptr().cast(), 4))),
        ]
    }
}

/// What spoils a recording in every mode: waiting for it.
fn waiting() -> Vec<Call> {
    // SAFETY: the host's ranges have the sizes that are said.
    unsafe {
        vec![
            ("cuStreamSynchronize", Box::new(|stream, _| sys::cuStreamSynchronize(stream))),
            ("cuCtxSynchronize", Box::new(|_, _| sys::cuCtxSynchronize())),
            (
                "a copy from the host",
                Box::new(|stream, at| sys::cuMemcpyHtoDAsync_v2(at, [0u8; 4].as_ptr().cast(), 4, stream)),
            ),
            (
                "a copy to the host",
                Box::new(|stream, at| sys::cuMemcpyDtoHAsync_v2([0u8; 4].as_mut_ptr().cast(), at, 4, stream)),
            ),
        ]
    }
}

#[test]
fn what_a_capture_forbids_ends_it() {
    with_driver("what_a_capture_forbids_ends_it", |dir| {
        started();
        let a = stream(1);
        let mut refused = 0;
        let all = [Mode::CU_STREAM_CAPTURE_MODE_GLOBAL, Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL];
        for (mode, call) in
            all.into_iter().flat_map(|mode| forbidden().into_iter().map(move |call| (mode, call))).chain(
                all.into_iter()
                    .chain([Mode::CU_STREAM_CAPTURE_MODE_RELAXED])
                    .flat_map(|mode| waiting().into_iter().map(move |call| (mode, call))),
            )
        {
            let at = memory(16);
            // SAFETY: room for a handle.
            unsafe {
                assert_eq!(sys::cuStreamBeginCapture_v2(a, mode), Code::CUDA_SUCCESS);
                let code = call.1(a, at);
                assert_eq!(code, Code::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "{} {mode:?}", call.0);
                let mut graph = ptr::null_mut();
                let end = sys::cuStreamEndCapture(a, &mut graph);
                assert_eq!(end, Code::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "{} {mode:?}", call.0);
                assert!(graph.is_null());
                // The stream goes on, and so does the GPU.
                assert_eq!(sys::cuStreamSynchronize(a), Code::CUDA_SUCCESS);
                assert_eq!(sys::cuMemFree_v2(at), Code::CUDA_SUCCESS);
            }
            refused += 1;
            let said: Vec<String> =
                lines(dir).into_iter().filter(|line| line.starts_with("refused")).collect();
            assert!(said.len() == refused && said[refused - 1].contains(call.0), "{said:#?}");
        }
        clean(dir);
    });
}

#[test]
fn a_relaxed_capture_allows_what_needs_no_waiting() {
    with_driver("a_relaxed_capture_allows_what_needs_no_waiting", |dir| {
        started();
        let a = stream(1);
        // SAFETY: room for a handle.
        unsafe {
            let relaxed = Mode::CU_STREAM_CAPTURE_MODE_RELAXED;
            assert_eq!(sys::cuStreamBeginCapture_v2(a, relaxed), Code::CUDA_SUCCESS);
            assert_eq!(sys::cuStreamBeginCapture_v2(a, relaxed), Code::CUDA_ERROR_ILLEGAL_STATE);
            let at = memory(16);
            load(&ptx("ceiling")).unwrap();
            assert_eq!(sys::cuMemsetD8Async(at, 3, 16, a), Code::CUDA_SUCCESS);
            let mut graph = ptr::null_mut();
            assert_eq!(sys::cuStreamEndCapture(a, &mut graph), Code::CUDA_SUCCESS);
            assert_eq!(sys::cuStreamEndCapture(a, &mut graph), Code::CUDA_ERROR_ILLEGAL_STATE);
        }
        clean(dir);
    });
}

#[test]
fn a_graph_does_what_was_recorded_each_time_it_is_launched() {
    with_driver("a_graph_does_what_was_recorded_each_time_it_is_launched", |dir| {
        started();
        let (a, at) = (stream(1), memory(16));
        let mut data = [0u8; 16];
        // SAFETY: room for what is given back.
        unsafe {
            let mode = Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
            assert_eq!(sys::cuStreamBeginCapture_v2(a, mode), Code::CUDA_SUCCESS);
            assert_eq!(sys::cuMemcpyDtoDAsync_v2(at + 8, at, 8, a), Code::CUDA_SUCCESS);
            assert_eq!(sys::cuMemsetD8Async(at, 5, 8, a), Code::CUDA_SUCCESS);
            // Another thread cannot end it.
            thread::scope(|scope| {
                let stream = a as usize;
                let ended = scope.spawn(move || {
                    started();
                    sys::cuStreamEndCapture(stream as sys::CUstream, &mut ptr::null_mut())
                });
                assert_eq!(ended.join().unwrap(), Code::CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
            });
            let (mut graph, mut executable) = (ptr::null_mut(), ptr::null_mut());
            assert_eq!(sys::cuStreamEndCapture(a, &mut graph), Code::CUDA_SUCCESS);
            assert_eq!(sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0), Code::CUDA_SUCCESS);
            assert_eq!(sys::cuGraphDestroy(graph), Code::CUDA_SUCCESS);
            for expected in [[0xff; 8], [5; 8]] {
                assert_eq!(sys::cuGraphLaunch(executable, a), Code::CUDA_SUCCESS);
                assert_eq!(
                    sys::cuMemcpyDtoHAsync_v2(data.as_mut_ptr().cast(), at, 16, a),
                    Code::CUDA_SUCCESS
                );
                assert_eq!((&data[..8], &data[8..]), (&[5; 8][..], &expected[..]));
            }
            assert_eq!(sys::cuGraphExecDestroy(executable), Code::CUDA_SUCCESS);
        }
        clean(dir);
    });
}

#[test]
fn what_a_context_holds_at_its_end_is_a_leak() {
    with_driver("what_a_context_holds_at_its_end_is_a_leak", |dir| {
        started();
        stream(1);
        memory(16);
        memory(16);
        load(&ptx("ceiling")).unwrap();
        // SAFETY: the context is held once.
        assert_eq!(unsafe { sys::cuDevicePrimaryCtxRelease_v2(0) }, Code::CUDA_SUCCESS);
        let leaks: Vec<String> = lines(dir).into_iter().filter(|line| line.starts_with("leak")).collect();
        assert_eq!(leaks, ["leak 1 of stream", "leak 1 of module", "leak 2 of piece of memory"]);
    });
}

#[test]
fn ptx_is_for_this_driver_and_this_gpu() {
    with_driver("ptx_is_for_this_driver_and_this_gpu", |dir| {
        let text = ptx("gate");
        let newer = CString::new(text.to_str().unwrap().replace("sm_80", "sm_90a")).unwrap();
        for (settings, text, expected) in [
            ("", &text, Ok(())),
            ("", &newer, Ok(())),
            ("driver=12030", &text, Err(Code::CUDA_ERROR_UNSUPPORTED_PTX_VERSION)),
            ("driver=13000;capability=10.0", &text, Ok(())),
            ("capability=7.5", &text, Err(Code::CUDA_ERROR_NO_BINARY_FOR_GPU)),
            ("capability=10.0", &newer, Err(Code::CUDA_ERROR_NO_BINARY_FOR_GPU)),
            ("", &CString::new("no PTX").unwrap(), Err(Code::CUDA_ERROR_INVALID_PTX)),
            ("refuse=silu_gate", &text, Err(Code::CUDA_ERROR_INVALID_PTX)),
        ] {
            configure(dir, settings);
            started();
            assert_eq!(load(text).map(|_| ()), expected, "{settings}");
        }
    });
}

#[test]
fn the_embedded_ptx_takes_what_its_sources_take() {
    with_driver("the_embedded_ptx_takes_what_its_sources_take", |dir| {
        started();
        let mut kernels = 0;
        for file in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../ptx")).unwrap() {
            let path = file.unwrap().path();
            let file = path.display();
            let text = CString::new(fs::read_to_string(&path).unwrap()).unwrap();
            let module = load(&text).unwrap();
            for entry in text.to_str().unwrap().split(".entry ").skip(1) {
                let name = entry.split('(').next().unwrap();
                assert!(function(module, name).is_ok(), "{file}/{name}: {:?}", faults(dir));
                kernels += 1;
            }
        }
        assert!(kernels > 50, "{kernels}");
        clean(dir);
    });
}
