//! cuBLAS beside the kernels: found by each of its names, recorded, and said to be missing.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod support;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use llmpress_driver_standin::{CUBLAS_NAMES, DRIVER_NAMES, hide, install};
use llmpress_kernels::gpu::cublas::{Cublas, Output};
use llmpress_kernels::gpu::cuda::Cuda;
use llmpress_kernels::gpu::{Error, Gpu};
use support::{child, clean, lines};

/// A machine with cuBLAS by one name, and nothing that can be loaded by the others.
fn only(name: &str) -> impl FnOnce(&Path) {
    let others: Vec<&str> = CUBLAS_NAMES.iter().filter(|other| **other != name).copied().collect();
    move |dir| {
        install(dir, DRIVER_NAMES).unwrap();
        hide(dir, &others).unwrap();
        if CUBLAS_NAMES.contains(&name) {
            install(dir, &[name]).unwrap();
        }
    }
}

fn wide(word: u16) -> f32 {
    f32::from_bits(u32::from(word) << 16)
}

#[test]
fn it_is_found_by_each_name_the_newest_first() {
    let test = "it_is_found_by_each_name_the_newest_first";
    // The child does not know what it was started for: the newest that is not hidden.
    let newest = |dir: &Path| {
        let there = |name: &&&str| fs::metadata(dir.join(name)).unwrap().len() > 1000;
        let newest = CUBLAS_NAMES.iter().find(there).unwrap();
        let cuda = Cuda::open(0).unwrap();
        assert_eq!(Cublas::open(&cuda).unwrap().name(), *newest);
        drop(cuda);
        clean(dir);
    };
    for name in CUBLAS_NAMES {
        child(test, only(name), "", newest);
    }
    let all = |dir: &Path| {
        install(dir, DRIVER_NAMES).unwrap();
        install(dir, CUBLAS_NAMES).unwrap();
    };
    child(test, all, "", newest);
}

#[test]
fn without_it_its_names_are_said() {
    child("without_it_its_names_are_said", only("none"), "", |_| {
        let error = Cublas::open(&Cuda::open(0).unwrap()).unwrap_err();
        assert!(matches!(error, Error::Unavailable(_)));
        let text = error.to_string();
        assert!(CUBLAS_NAMES.iter().all(|name| text.contains(name)), "{text}");
    });
}

#[test]
fn a_library_that_lacks_a_function_is_an_error() {
    let prepare = |dir: &Path| {
        install(dir, DRIVER_NAMES).unwrap();
        hide(dir, &CUBLAS_NAMES[1..]).unwrap();
        // Any other library.
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let libc = maps
            .lines()
            .filter_map(|line| line.split_whitespace().nth(5))
            .find(|path| path.contains("libc.so"));
        symlink(libc.unwrap(), dir.join(CUBLAS_NAMES[0])).unwrap();
    };
    child("a_library_that_lacks_a_function_is_an_error", prepare, "", |_| {
        let error = Cublas::open(&Cuda::open(0).unwrap()).unwrap_err().to_string();
        assert!(error.contains(CUBLAS_NAMES[0]) && error.contains("lacks the function cublas"), "{error}");
    });
}

#[test]
fn products_are_right_and_can_be_recorded_with_a_workspace() {
    let test = "products_are_right_and_can_be_recorded_with_a_workspace";
    child(test, only("libcublas.so.12"), "", |dir| {
        let cuda = Cuda::open(0).unwrap();
        let mut cublas = Cublas::open(&cuda).unwrap();
        let gpu = Gpu::new(cuda);
        let (n, k, m, ldx) = (5, 8, 3, 64);
        let word = |i: usize| (((i * 37 % 19) as f32 / 4.0 - 2.0).to_bits() >> 16) as u16;
        let w: Vec<u16> = (0..n * k).map(word).collect();
        let x: Vec<u16> = (0..m * ldx).map(|i| word(i + 5)).collect();
        let expected: Vec<f32> = (0..m * n)
            .map(|at| {
                let (token, row) = (at / n, at % n);
                (0..k).map(|i| wide(w[row * k + i]) * wide(x[token * ldx + i])).sum()
            })
            .collect();
        let (w, x) = (gpu.upload(&w).unwrap(), gpu.upload(&x).unwrap());
        let y = gpu.allocate(4 * m * n).unwrap();
        let product =
            |cublas: &Cublas, output| cublas.product(w.view(), x.view(), y.view(), output, n, k, m, ldx);
        product(&cublas, Output::F32).unwrap();
        assert_eq!(y.view().read::<f32>(m * n).unwrap(), expected);
        product(&cublas, Output::Bf16).unwrap();
        let rounded: Vec<f32> = y.view().read::<u16>(m * n).unwrap().into_iter().map(wide).collect();
        assert!(rounded.iter().zip(&expected).all(|(a, b)| (a - b).abs() <= b.abs() / 256.0));
        clean(dir);
        // It would allocate in the middle of the recording.
        assert!(gpu.capture(|| product(&cublas, Output::F32)).is_err());
        let faults = lines(dir).iter().filter(|line| line.starts_with("fault")).count();
        cublas.take_workspace(&gpu).unwrap();
        let mut graph = gpu.capture(|| product(&cublas, Output::F32)).unwrap();
        y.view().write(&vec![0f32; m * n]).unwrap();
        graph.replay().unwrap();
        assert_eq!(y.view().read::<f32>(m * n).unwrap(), expected);
        drop((graph, cublas, w, x, y));
        drop(gpu);
        let wrong: Vec<String> =
            lines(dir).into_iter().filter(|l| l.starts_with("fault") || l.starts_with("leak")).collect();
        assert_eq!((faults, wrong.len()), (1, 1), "{wrong:#?}");
    });
}
