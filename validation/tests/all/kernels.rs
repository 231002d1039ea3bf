//! The benchmarks of kernels measure all of them and know right from wrong.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use llmpress_emulator::Emulator;
use llmpress_kernels::gpu::{Error, Gpu};
use llmpress_validation::{
    CpuKernelReport, KernelOptions, KernelReport, KernelShape, bench_cpu_kernels, bench_kernels,
};

#[test]
fn every_kernel_is_measured_and_checked() {
    let gpu = Gpu::new(Emulator::new());
    let options = KernelOptions {
        shapes: vec![
            KernelShape { name: "a".to_owned(), n: 40, k: 72 },
            KernelShape { name: "b".to_owned(), n: 16, k: 125 },
        ],
        tokens: vec![1, 9],
        runs: 2,
        working_set: 8 << 10,
    };
    let absent = || Err(Error::Unavailable("not here".to_owned()));
    let mut said = Vec::new();
    let report = bench_kernels(&gpu, absent(), &options, &mut |line| said.push(line.to_owned())).unwrap();
    assert_eq!(said, ["ceilings", "a 40 x 72", "b 16 x 125"]);
    assert_eq!(report.no_cublas.as_deref(), Some("not here"));
    let kernels: Vec<(&str, &str, usize)> =
        report.rows.iter().map(|r| (r.shape.as_str(), r.kernel.as_str(), r.m)).collect();
    // Fours are kept of whole ones only.
    let sparse = |shape| if shape == "a" { &["sparse24", "sparse24 fixed12"][..] } else { &[] };
    let codes = ["abq w4a16 g128", "abq w2a16 g128", "abq w2a8", "abq w4a8", "abq w4a4"];
    let of = |shape| {
        let decoders = [(shape, "decode dfloat11", 0), (shape, "decode fixed12", 0)];
        let products = [&["dense", "fixed12"], sparse(shape), &codes].concat();
        let of_tokens = |tokens| products.clone().into_iter().map(move |kernel| (shape, kernel, tokens));
        decoders.into_iter().chain(of_tokens(1)).chain(of_tokens(9)).collect::<Vec<_>>()
    };
    assert_eq!(kernels, [of("a"), of("b")].concat());
    for row in &report.rows {
        assert!(row.correct, "{row:?}");
        assert!(row.microseconds.median > 0.0 && row.gbps > 0.0 && row.share_of_read_ceiling > 0.0);
        assert_eq!(row.block.is_some(), row.m > 0);
    }
    assert_eq!(gpu.allocated().0, 0, "everything is given back");
    // What is printed can be read again: `bench gpu` does.
    let printed = serde_json::to_string(&report).unwrap();
    assert_eq!(serde_json::from_str::<KernelReport>(&printed).unwrap(), report);
}

#[test]
fn every_product_of_the_processor_is_measured_beside_bf16_and_checked() {
    let options = KernelOptions {
        shapes: vec![
            KernelShape { name: "a".to_owned(), n: 70, k: 200 },
            KernelShape { name: "b".to_owned(), n: 16, k: 128 },
        ],
        tokens: vec![1, 16],
        runs: 2,
        working_set: 100 << 10,
    };
    let mut said = Vec::new();
    let report = bench_cpu_kernels(&options, &mut |line| said.push(line.to_owned()));
    assert_eq!(said, ["ceilings", "a 70 x 200", "b 16 x 128"]);
    let kernels: Vec<(&str, &str, usize)> =
        report.rows.iter().map(|r| (r.shape.as_str(), r.kernel.as_str(), r.m)).collect();
    let products = [
        "bf16",
        "abq w4a16 g128",
        "abq w2a8 g128",
        "abq w4a8 g128",
        "abq w4a4 g128",
        "abq w8a8 g64",
        "abq w8a16 g64",
        "sparse24",
        "sparse24 fixed12",
        "sparse24 w4 g64",
    ];
    let of = |shape, tokens| products.map(|kernel| (shape, kernel, tokens));
    assert_eq!(kernels, [of("a", 1), of("a", 16), of("b", 1), of("b", 16)].concat());
    for row in &report.rows {
        assert!(row.correct, "{row:?}");
        assert!(row.microseconds.median > 0.0 && row.gbps > 0.0 && row.share_of_read_ceiling > 0.0);
        assert!(row.speed_against_bf16 > 0.0);
    }
    let printed = serde_json::to_string(&report).unwrap();
    assert_eq!(serde_json::from_str::<CpuKernelReport>(&printed).unwrap().rows, report.rows);
}
