//! `llmpress plan`: what a conversion would do.

use std::collections::BTreeMap;
use std::sync::Arc;

use llmpress_kernels::gpu::cuda::devices;
use llmpress_pipeline::{Plan, Rate, Uncovered, Workload};
use serde::Serialize;

use crate::Outcome;
use crate::args::{Device, PlanArgs};
use crate::cache_size::CacheSize;
use crate::convert::warn_of_rankings;
use crate::gpu_memory::ModelNeeds;
use crate::passes::{describe, forecast};
use crate::recipe::request;
use crate::report::{Failure, Output, bytes, percent, table};

pub(crate) fn run(args: &PlanArgs, output: Output) -> Outcome {
    let context = args.context.unwrap_or(CONTEXT);
    let mut gpu = match args.device {
        None => None,
        Some(Device::Cuda(_)) => Some(ModelNeeds::of(&args.dir, context)?),
        Some(Device::Cpu) => {
            return Err(Failure::Usage(
                "--device is for GPUs: on a processor a model takes its stored size, and some MiB a thread"
                    .to_owned(),
            ));
        }
    };
    if let Some(gpu) = gpu.as_ref().filter(|_| args.recipe.to.is_none() && args.recipe.recipe.is_none()) {
        output.result(gpu, || gpu.text(&memory(args.device)));
        return Ok(());
    }
    let request = request(&args.recipe, args.cut.without_text())?;
    warn_of_rankings(&request, output)?;
    let (mut plan, checkpoint) = Plan::forecast(&args.dir, &request, args.recipe.max_shard_size)?;
    if args.named.is_some() {
        plan.source = args.named.clone();
    }
    if let Some(uncovered) = Uncovered::of(&checkpoint, &plan) {
        output.warn(&uncovered.to_string());
    }
    let budget = plan.budget(&checkpoint, args.jobs.map(usize::from), args.max_memory)?;
    let dropped = checkpoint.dropped().len();
    let checkpoint = Arc::new(checkpoint);
    if let Some(gpu) = &mut gpu {
        gpu.add("as planned", plan.on_gpu(checkpoint.clone(), context)?);
    }
    // What does not run here has none.
    let cache = plan.cache(checkpoint).ok().flatten().map(CacheSize::new);
    let rate = args.core_rate.map_or(Rate::Measured, Rate::Stated);
    let workload =
        args.workers.map(|workers| Workload::of(&plan, workers, budget.jobs, rate, args.storage_rate));
    let planned =
        Planned { plan: &plan, workload: workload.as_ref(), cache: cache.as_ref(), gpu: gpu.as_ref() };
    output.result(&planned, || {
        let mut text = String::new();
        if args.tensors {
            let mut rows =
                vec![["unit", "method", "tensors", "source", "expected"].map(str::to_owned).to_vec()];
            for unit in plan.units() {
                rows.push(vec![
                    unit.name.clone(),
                    unit.method.name().to_owned(),
                    unit.tensors.len().to_string(),
                    bytes(unit.source_bytes),
                    bytes(unit.expected_bytes),
                ]);
            }
            text.push_str(&table(&rows));
            text.push('\n');
        }
        let mut methods: BTreeMap<&str, (usize, usize, u64, u64)> = BTreeMap::new();
        for unit in plan.units() {
            let sum = methods.entry(unit.method.name()).or_default();
            sum.0 += 1;
            sum.1 += unit.tensors.len();
            sum.2 += unit.source_bytes;
            sum.3 += unit.expected_bytes;
        }
        let mut rows = vec![["method", "units", "tensors", "source", "expected"].map(str::to_owned).to_vec()];
        for (method, (units, tensors, source, expected)) in methods {
            rows.push(vec![
                method.to_owned(),
                units.to_string(),
                tensors.to_string(),
                bytes(source),
                bytes(expected),
            ]);
        }
        text.push_str(&table(&rows));
        text.push_str(&format!(
            "\n{} shards, {} -> about {} ({})\ndisk needed: about {}\nmemory: at most {} with {} jobs\n",
            plan.shards.len(),
            bytes(plan.source_bytes),
            bytes(plan.expected_bytes),
            percent(plan.expected_bytes, plan.source_bytes),
            bytes(plan.expected_bytes),
            bytes(budget.peak_bytes),
            budget.jobs,
        ));
        let mut open = plan.passes.iter();
        for pass in &plan.recipe.passes {
            text.push_str(&match pass.is_settled() {
                true => format!("{}\n", describe(pass)),
                false => open.next().map(forecast).unwrap_or_default(),
            });
        }
        if !plan.recipe.passes.is_empty() && plan.passes.is_empty() {
            text.push_str(&format!("{dropped} tensors go\n"));
        }
        text.push_str(&workload.as_ref().map(crate::workload::text).unwrap_or_default());
        text.push_str(&cache.as_ref().map(CacheSize::text).unwrap_or_default());
        if let Some(gpu) = &gpu {
            text.push_str(&format!("\n{}", gpu.text(&memory(args.device))));
        }
        text
    });
    Ok(())
}

/// Tokens that a GPU has to hold where nobody says.
const CONTEXT: usize = 4096;

/// A plan, and what its output takes of a GPU.
#[derive(Serialize)]
struct Planned<'a> {
    #[serde(flatten)]
    plan: &'a Plan,
    #[serde(skip_serializing_if = "Option::is_none")]
    workload: Option<&'a Workload>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cache: Option<&'a CacheSize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu: Option<&'a ModelNeeds>,
}

/// The memory of the GPU that is asked about, if it is there.
fn memory(device: Option<Device>) -> Vec<u64> {
    let Some(Device::Cuda(ordinal)) = device else { return Vec::new() };
    let found = devices().ok().and_then(|all| all.into_iter().nth(ordinal));
    found.map(|gpu| gpu.memory as u64).into_iter().collect()
}
