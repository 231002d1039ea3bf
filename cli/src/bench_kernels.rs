//! `llmpress bench kernels`: a GPU's kernels against cuBLAS and its own limits; the processor's against BF16.

use std::collections::BTreeMap;
use std::path::Path;

use llmpress_formats::{Checkpoint, Dtype, Error};
use llmpress_kernels::gpu::Gpu;
use llmpress_kernels::gpu::cublas::Cublas;
use llmpress_kernels::gpu::cuda::Cuda;
use llmpress_validation::{
    CpuKernelReport, KernelOptions, KernelReport, KernelShape, Rate, bench_cpu_kernels, bench_kernels,
};

use crate::Outcome;
use crate::args::{BenchKernelsArgs, Device};
use crate::models::device_failure;
use crate::report::{Failure, Output, table};

/// The matrices of Llama 3 8B.
const LLAMA_3_8B: [(&str, usize, usize); 4] =
    [("qkv", 6144, 4096), ("o", 4096, 4096), ("gate_up", 28672, 4096), ("down", 4096, 14336)];

pub(crate) fn run(args: &BenchKernelsArgs, output: Output) -> Outcome {
    let options = KernelOptions {
        shapes: shapes(args)?,
        tokens: args.tokens.clone(),
        runs: usize::from(args.runs),
        working_set: usize::try_from(args.working_set).unwrap_or(usize::MAX),
    };
    let Device::Cuda(ordinal) = args.device else {
        return of_processor(args, &options, output);
    };
    let cuda = Cuda::open(ordinal).map_err(device_failure)?;
    let name = cuda.info().name.clone();
    let cublas = Cublas::open(&cuda);
    let gpu = Gpu::new(cuda);
    let report =
        bench_kernels(&gpu, cublas, &options, &mut |line| output.progress(line)).map_err(device_failure)?;
    output.result(&report, || text(&name, args, &report));
    judged(report.rows.iter().map(|row| row.correct))
}

fn judged(correct: impl Iterator<Item = bool>) -> Outcome {
    match correct.filter(|correct| !correct).count() {
        0 => Ok(()),
        wrong => Err(Failure::Findings(format!("{wrong} kernels gave wrong results"))),
    }
}

fn of_processor(args: &BenchKernelsArgs, options: &KernelOptions, output: Output) -> Outcome {
    let report = bench_cpu_kernels(options, &mut |line| output.progress(line));
    output.result(&report, || text_of_processor(args, &report));
    judged(report.rows.iter().map(|row| row.correct))
}

fn text_of_processor(args: &BenchKernelsArgs, report: &CpuKernelReport) -> String {
    let head = ["matrix", "tokens", "kernel", "us", "range", "GB/s", "of read", "x bf16", ""];
    let mut lines = vec![head.map(str::to_owned).to_vec()];
    lines.extend(report.rows.iter().map(|row| {
        vec![
            format!("{} {}x{}", row.shape, row.n, row.k),
            row.m.to_string(),
            row.kernel.clone(),
            format!("{:.0}", row.microseconds.median),
            format!("{:.0}-{:.0}", row.microseconds.min, row.microseconds.max),
            format!("{:.1}", row.gbps),
            format!("{:.0} %", row.share_of_read_ceiling * 100.0),
            format!("{:.2}", row.speed_against_bf16),
            if row.correct { String::new() } else { "WRONG".to_owned() },
        ]
    }));
    let read = &report.read_gbps;
    format!(
        "one thread, {}, cold cache, median of {} rounds; GB/s of weights\nread {:.1} GB/s ({:.1}-{:.1})\n\n{}",
        report.instructions,
        args.runs,
        read.median,
        read.min,
        read.max,
        table(&lines)
    )
}

fn shapes(args: &BenchKernelsArgs) -> Result<Vec<KernelShape>, Failure> {
    if let Some(dir) = &args.model {
        return of_model(dir);
    }
    if !args.shape.is_empty() {
        let one = |&(n, k): &(usize, usize)| KernelShape { name: "given".to_owned(), n, k };
        return Ok(args.shape.iter().map(one).collect());
    }
    Ok(LLAMA_3_8B.iter().map(|&(name, n, k)| KernelShape { name: name.to_owned(), n, k }).collect())
}

/// The distinct shapes of a checkpoint's matrices, each named by the first module that has it.
fn of_model(dir: &Path) -> Result<Vec<KernelShape>, Failure> {
    let checkpoint = Checkpoint::open(dir)?;
    let mut shapes = BTreeMap::new();
    for (name, tensor) in checkpoint.tensors() {
        let &[n, k] = &*tensor.shape else { continue };
        if tensor.dtype == Dtype::BF16 && k > 0 && k.is_multiple_of(8) && n > 0 {
            let module = name.strip_suffix(".weight").unwrap_or(name).rsplit('.').next().unwrap_or(name);
            shapes.entry((n as usize, k as usize)).or_insert_with(|| module.to_owned());
        }
    }
    if shapes.is_empty() {
        return Err(Failure::from(Error::unsupported(
            dir,
            None,
            "has no BF16 matrices whose columns are a multiple of 8",
        )));
    }
    Ok(shapes.into_iter().map(|((n, k), name)| KernelShape { name, n, k }).collect())
}

fn text(name: &str, args: &BenchKernelsArgs, report: &KernelReport) -> String {
    let rate = |r: &Rate| format!("{:.0} ({:.0}-{:.0})", r.median, r.min, r.max);
    let head = ["matrix", "tokens", "kernel", "us", "range", "GB/s", "of read", "x cuBLAS", "block", ""];
    let mut lines = vec![head.map(str::to_owned).to_vec()];
    lines.extend(report.rows.iter().map(|row| {
        vec![
            format!("{} {}x{}", row.shape, row.n, row.k),
            if row.m == 0 { "-".to_owned() } else { row.m.to_string() },
            row.kernel.clone(),
            format!("{:.1}", row.microseconds.median),
            format!("{:.1}-{:.1}", row.microseconds.min, row.microseconds.max),
            format!("{:.0}", row.gbps),
            format!("{:.0} %", row.share_of_read_ceiling * 100.0),
            row.speed_against_cublas.map_or("-".to_owned(), |s| format!("{s:.2}")),
            row.block.clone().unwrap_or_default(),
            if row.correct { String::new() } else { "WRONG".to_owned() },
        ]
    }));
    let cublas =
        report.no_cublas.as_ref().map(|why| format!("\ncuBLAS was not measured: {why}")).unwrap_or_default();
    format!(
        "{name}, cold cache, graphs, median of {} replays; GB/s of bytes read and written\n\
         read {} GB/s, copy {} GB/s{cublas}\n\n{}",
        args.runs,
        rate(&report.ceilings.read_gbps),
        rate(&report.ceilings.copy_gbps),
        table(&lines)
    )
}
