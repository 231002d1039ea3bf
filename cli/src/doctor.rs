//! `llmpress doctor`: what there is to run models on, and what is missing.

use std::time::Instant;

use llmpress_kernels::cpu::instruction_set;
use llmpress_kernels::gpu::cuda::{Cuda, DeviceInfo, devices};
use llmpress_kernels::gpu::modules;
use llmpress_kernels::gpu::proof::{self, Proof};
use serde::Serialize;

use crate::Outcome;
use crate::args::DoctorArgs;
use crate::gpu_memory::ModelNeeds;
use crate::report::{Failure, Output, bytes};

#[derive(Serialize)]
struct Report {
    version: &'static str,
    threads: usize,
    cpu_kernels: &'static str,
    gpu_modules: Vec<&'static str>,
    gpus: Vec<Gpu>,
    /// Why there is no GPU to run on.
    #[serde(skip_serializing_if = "Option::is_none")]
    no_gpu: Option<String>,
    /// What the model that was asked about takes of a GPU's memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<ModelNeeds>,
}

#[derive(Serialize)]
struct Gpu {
    ordinal: usize,
    name: String,
    compute_capability: String,
    multiprocessors: u32,
    memory_bytes: usize,
    driver_cuda: String,
    /// Seconds in which the driver compiled every kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    kernels_loaded_s: Option<f64>,
    /// Why the kernels do not run there.
    #[serde(skip_serializing_if = "Option::is_none")]
    fault: Option<String>,
    /// How each kernel did against its reference.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    proofs: Vec<Proof>,
}

pub(crate) fn run(args: &DoctorArgs, output: Output) -> Outcome {
    let model = args.model.as_ref().map(|dir| ModelNeeds::of(dir, args.context)).transpose()?;
    let (gpus, no_gpu) = match devices() {
        Ok(found) => (found.into_iter().map(|info| examine(info, args.prove, output)).collect(), None),
        Err(error) => (Vec::new(), Some(error.to_string())),
    };
    let report = Report {
        version: env!("CARGO_PKG_VERSION"),
        threads: rayon::current_num_threads(),
        cpu_kernels: instruction_set(),
        gpu_modules: modules(),
        gpus,
        no_gpu,
        model,
    };
    output.result(&report, || text(&report));
    if !args.prove {
        return Ok(());
    }
    let wrong: usize = report.gpus.iter().map(|gpu| gpu.proofs.iter().filter(|p| !p.holds()).count()).sum();
    match (report.no_gpu, report.gpus.iter().find_map(|gpu| gpu.fault.clone())) {
        (Some(why), _) | (None, Some(why)) => Err(Failure::Findings(format!("nothing is proven: {why}"))),
        _ if wrong > 0 => Err(Failure::Findings(format!("{wrong} results of kernels are wrong"))),
        _ => Ok(()),
    }
}

/// Loads every kernel: what the driver refuses is found here, not in the middle of a run. Proves each against its reference
/// where that is asked for.
fn examine(info: DeviceInfo, prove: bool, output: Output) -> Gpu {
    let start = Instant::now();
    let mut proofs = Vec::new();
    let loaded = info.check().and_then(|()| Cuda::open(info.ordinal)).and_then(|cuda| {
        modules().into_iter().try_for_each(|file| cuda.load(file))?;
        let seconds = start.elapsed().as_secs_f64();
        if prove {
            proofs = proof::prove(&llmpress_kernels::gpu::Gpu::new(cuda), &mut |proof| {
                if let Some(fault) = &proof.fault {
                    output.progress(&format!("{}, {}: {fault}", proof.kernel, proof.shape));
                }
            })?;
        }
        Ok(seconds)
    });
    Gpu {
        proofs,
        ordinal: info.ordinal,
        name: info.name,
        compute_capability: format!("{}.{}", info.capability.0, info.capability.1),
        multiprocessors: info.multiprocessors,
        memory_bytes: info.memory,
        driver_cuda: format!("{}.{}", info.driver.0, info.driver.1),
        fault: loaded.as_ref().err().map(ToString::to_string),
        kernels_loaded_s: loaded.ok(),
    }
}

fn text(report: &Report) -> String {
    let mut lines = vec![
        format!("llmpress {}", report.version),
        format!("processor: {} threads, kernels for {}", report.threads, report.cpu_kernels),
        format!("GPU kernels built in: {}", report.gpu_modules.join(", ")),
    ];
    lines.extend(report.gpus.iter().map(|gpu| {
        let found = match (&gpu.fault, gpu.kernels_loaded_s) {
            (None, Some(seconds)) => {
                let right = gpu.proofs.iter().filter(|proof| proof.holds()).count();
                let proven = match gpu.proofs.len() {
                    0 => String::new(),
                    all => format!(", {right} of {all} results are right"),
                };
                format!("every kernel loads ({seconds:.1} s){proven}: --device cuda:{}", gpu.ordinal)
            }
            (fault, _) => format!("CANNOT BE USED: {}", fault.as_deref().unwrap_or_default()),
        };
        format!(
            "GPU {}: {}, compute capability {}, {} multiprocessors, {}; the driver supports CUDA {}; {found}",
            gpu.ordinal,
            gpu.name,
            gpu.compute_capability,
            gpu.multiprocessors,
            bytes(gpu.memory_bytes as u64),
            gpu.driver_cuda,
        )
    }));
    lines.extend(report.no_gpu.iter().map(|why| format!("no GPU: {why}")));
    let mut text = lines.join("\n") + "\n";
    if let Some(model) = &report.model {
        let memory: Vec<u64> = report.gpus.iter().map(|gpu| gpu.memory_bytes as u64).collect();
        text += &format!("\n{}", model.text(&memory));
    }
    text
}
