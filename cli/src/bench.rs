//! `llmpress bench`: ratio and speed of each lossless method on a checkpoint's own tensors.

use llmpress_formats::Checkpoint;
use llmpress_pipeline::bench::{Options, Row, bench};

use crate::Outcome;
use crate::args::{BenchArgs, BenchCommand};
use crate::report::{Failure, Output, bytes, table};

pub(crate) fn run(args: &BenchArgs, output: Output) -> Outcome {
    let dir = match (&args.command, &args.dir) {
        (Some(BenchCommand::Kernels(args)), _) => return crate::bench_kernels::run(args, output),
        (Some(BenchCommand::Gpu(args)), _) => return crate::bench_gpu::run(args, output),
        (Some(BenchCommand::Proofs(args)), _) => return crate::bench_parts::proofs(args, output),
        (Some(BenchCommand::RandomModel(args)), _) => return crate::bench_parts::random_model(args, output),
        (None, Some(dir)) => dir,
        (None, None) => return Err(Failure::Usage("DIR, kernels or gpu is missing".to_owned())),
    };
    let checkpoint = Checkpoint::open(dir)?;
    let options =
        Options { sample_bytes: args.sample, runs: usize::from(args.runs), peers: args.peer.clone() };
    let report = bench(&checkpoint, &options, &|line| output.progress(line))?;
    output.result(&report, || {
        let mut rows = vec![
            ["method", "size", "encode", "decode", "encode spread", "decode spread"]
                .map(str::to_owned)
                .to_vec(),
        ];
        let speed = |s: &llmpress_pipeline::bench::Speed| format!("{:.2} GB/s", s.median);
        let spread = |s: &llmpress_pipeline::bench::Speed| format!("{:.2}-{:.2}", s.min, s.max);
        for Row { method, share, encode, decode } in &report.rows {
            rows.push(vec![
                method.clone(),
                format!("{:.2} %", share * 100.0),
                speed(encode),
                speed(decode),
                spread(encode),
                spread(decode),
            ]);
        }
        format!(
            "{}: {} of {} tensors, one thread, {} runs; bytes of the original per second\n\n{}",
            dir.display(),
            bytes(report.sample_bytes),
            report.dtype,
            report.runs,
            table(&rows)
        )
    });
    Ok(())
}
