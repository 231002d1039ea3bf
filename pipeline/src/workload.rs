//! What a plan comes to on many machines, from headers alone.
//!
//! ```text
//! hours = the longer of (bytes of the job with most to do, by method, over GB/s of a core) / cores
//!                    and bytes read and written by all, over GB/s of the storage, where these are stated
//! ```

use llmpress_quantize::Rung;
use serde::Serialize;

use crate::recipe::Compiled;
use crate::{Method, Pass, Plan, PlannedUnit, Target};

/// Who says how fast a core is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "from", content = "gb_per_second_and_core")]
pub enum Rate {
    /// The figures of docs/benchmarks.md, by method.
    Measured,
    /// The caller: GB/s of source a core.
    Stated(f64),
}

/// Bytes that storage reads and writes for a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Traffic {
    /// Read by workers where their memory caches a shard's source.
    pub read_least: u64,
    /// Read by workers where nothing is cached: tensors are read to be surveyed, to be encoded and to be compared.
    pub read_most: u64,
    /// Written by workers.
    pub written: u64,
    /// Read by `merge`, which hashes the shards again.
    pub read_by_merge: u64,
}

/// What a plan comes to on so many machines.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Workload {
    /// Machines, or processes.
    pub workers: usize,
    /// Threads of each.
    pub cores: usize,
    /// Units, which are shards.
    pub units: usize,
    /// Units of the worker that has most of them.
    pub most_units: usize,
    /// Source bytes of the worker that has most of them.
    pub most_bytes: u64,
    /// Hours until the last worker is done.
    pub hours: f64,
    /// Hours that the storage takes of them at least, if its rate is stated: then they are not less.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub storage_hours: Option<f64>,
    /// Core hours of all of them.
    pub core_hours: f64,
    /// What that goes by.
    pub rate: Rate,
    /// What storage has to do.
    pub traffic: Traffic,
    /// A pass that one machine has to run before: the figures are of the shards after it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
}

impl Workload {
    /// Of workers that share a plan by [`Plan::share`], each with so many threads, on storage that reads and writes so many GB/s for all of
    /// them together.
    pub fn of(plan: &Plan, workers: usize, cores: usize, rate: Rate, storage: Option<f64>) -> Self {
        let speed = Speed::of(plan, rate);
        let core_seconds = |numbers: &[usize]| -> f64 {
            let shards = numbers.iter().filter_map(|&number| plan.shards.get(number));
            let units = shards.flat_map(|shard| &shard.units);
            units.map(|unit| unit.source_bytes as f64 / 1e9 / speed.gb_per_second(unit)).sum()
        };
        let bytes = |numbers: &[usize]| {
            let shards = numbers.iter().filter_map(|&number| plan.shards.get(number));
            shards.map(|shard| shard.source_bytes).fold(0, u64::saturating_add)
        };
        // Beyond one for each unit there is nothing to do.
        let shares: Vec<Vec<usize>> =
            (0..workers.min(plan.shards.len())).map(|rank| plan.share(workers, rank)).collect();
        let all: Vec<usize> = (0..plan.shards.len()).collect();
        let quantised = plan.units().filter(|unit| is_quantised(plan, unit.method));
        let staged = quantised.map(|unit| unit.expected_bytes).fold(0, u64::saturating_add);
        let reads = plan.units().map(|unit| unit.source_bytes.saturating_mul(unit.method.room().reads()));
        let seconds = shares.iter().map(|share| core_seconds(share)).fold(0.0, f64::max);
        let traffic = Traffic {
            read_least: plan.source_bytes,
            read_most: reads.fold(0, u64::saturating_add).saturating_add(staged.saturating_mul(2)),
            written: plan.expected_bytes.saturating_add(staged),
            read_by_merge: plan.expected_bytes,
        };
        let moved = traffic.read_most.saturating_add(traffic.written) as f64;
        let storage_hours = storage.map(|gb| moved / 1e9 / gb / 3600.0);
        Self {
            workers,
            cores,
            units: plan.shards.len(),
            most_units: shares.iter().map(Vec::len).max().unwrap_or(0),
            most_bytes: shares.iter().map(|share| bytes(share)).max().unwrap_or(0),
            hours: (seconds / cores.max(1) as f64 / 3600.0).max(storage_hours.unwrap_or(0.0)),
            storage_hours,
            core_hours: core_seconds(&all) / 3600.0,
            rate,
            traffic,
            after: plan.needs_whole_model.clone(),
        }
    }
}

/// Whether a unit is quantised by whoever makes its shard, and kept beside it until then.
fn is_quantised(plan: &Plan, method: Method) -> bool {
    plan.needs_whole_model.is_none()
        && !plan.passes.is_empty()
        && matches!(method, Method::Kept | Method::KeptFixed12 | Method::Coded)
}

/// GB/s of source that a core quantises by one matrix alone and then stores, as measured in docs/benchmarks.md ("On one core").
fn of_rung(rung: Rung) -> f64 {
    match rung {
        Rung::Rtn => 0.14,
        // It searches the best grid of each group; gptq goes by a text and is not spread.
        Rung::Grid | Rung::Gptq => 0.007,
    }
}

/// How fast a core is at each unit of a plan.
struct Speed<'a> {
    plan: &'a Plan,
    rate: Rate,
    /// The recipe's rules, and the rung of all that they do not name.
    rules: Option<(Compiled, Rung)>,
}

impl<'a> Speed<'a> {
    fn of(plan: &'a Plan, rate: Rate) -> Self {
        let rung = plan.passes.iter().find_map(|planned| match &planned.pass {
            Pass::Quantise(quantiser) => Some(quantiser.spec.rung),
            _ => None,
        });
        let rules = plan.recipe.compile().ok().zip(rung);
        Self { plan, rate, rules }
    }

    fn gb_per_second(&self, unit: &PlannedUnit) -> f64 {
        match (self.rate, &self.rules) {
            (Rate::Stated(gb), _) => gb,
            (Rate::Measured, Some((rules, rung))) if is_quantised(self.plan, unit.method) => {
                of_rung(match rules.rule(&unit.name) {
                    Some(Target::Quantise(quantiser)) => quantiser.spec.rung,
                    _ => *rung,
                })
            }
            (Rate::Measured, _) => unit.method.room().gb_per_second(),
        }
    }
}
