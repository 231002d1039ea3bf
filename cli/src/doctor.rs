//! `llmpress doctor`: what there is to run models on, and what is missing.

use std::time::Instant;

use llmpress_kernels::cpu::instruction_set;
use llmpress_kernels::gpu::cuda::{Cuda, DeviceInfo, devices};
use llmpress_kernels::gpu::modules;
use serde::Serialize;

use crate::Outcome;
use crate::report::{Output, bytes};

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
}

pub(crate) fn run(output: Output) -> Outcome {
    let (gpus, no_gpu) = match devices() {
        Ok(found) => (found.into_iter().map(examine).collect(), None),
        Err(error) => (Vec::new(), Some(error.to_string())),
    };
    let report = Report {
        version: env!("CARGO_PKG_VERSION"),
        threads: rayon::current_num_threads(),
        cpu_kernels: instruction_set(),
        gpu_modules: modules(),
        gpus,
        no_gpu,
    };
    output.result(&report, || text(&report));
    Ok(())
}

/// Loads every kernel: what the driver refuses is found here, not in the middle of a run.
fn examine(info: DeviceInfo) -> Gpu {
    let start = Instant::now();
    let loaded = info.check().and_then(|()| Cuda::open(info.ordinal)).and_then(|cuda| {
        modules().into_iter().try_for_each(|file| cuda.load(file))?;
        Ok(start.elapsed().as_secs_f64())
    });
    Gpu {
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
                format!("every kernel loads ({seconds:.1} s): --device cuda:{}", gpu.ordinal)
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
    lines.join("\n") + "\n"
}
