//! What a plan comes to on many machines, from headers alone.
//!
//! ```text
//! hours = (bytes of the job with most to do, by method, over GB/s of a core) / cores
//! ```
//!
//! The time that storage takes is not in it: who plans knows what theirs delivers, and is told how much it has to.

use serde::Serialize;

use crate::{Method, Plan};

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
    /// Hours until the last worker is done, storage not counted.
    pub hours: f64,
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
    /// Of workers that share a plan by [`Plan::share`], each with so many threads.
    pub fn of(plan: &Plan, workers: usize, cores: usize, rate: Rate) -> Self {
        let core_seconds = |numbers: &[usize]| -> f64 {
            let shards = numbers.iter().filter_map(|&number| plan.shards.get(number));
            let units = shards.flat_map(|shard| &shard.units);
            units.map(|unit| unit.source_bytes as f64 / 1e9 / gb_per_second(unit.method, rate)).sum()
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
        Self {
            workers,
            cores,
            units: plan.shards.len(),
            most_units: shares.iter().map(Vec::len).max().unwrap_or(0),
            most_bytes: shares.iter().map(|share| bytes(share)).max().unwrap_or(0),
            hours: seconds / cores.max(1) as f64 / 3600.0,
            core_hours: core_seconds(&all) / 3600.0,
            rate,
            traffic: Traffic {
                read_least: plan.source_bytes,
                read_most: reads.fold(0, u64::saturating_add).saturating_add(staged.saturating_mul(2)),
                written: plan.expected_bytes.saturating_add(staged),
                read_by_merge: plan.expected_bytes,
            },
            after: plan.needs_whole_model.clone(),
        }
    }
}

/// Whether a unit is quantised by whoever makes its shard, and kept beside it until then.
fn is_quantised(plan: &Plan, method: Method) -> bool {
    plan.needs_whole_model.is_none()
        && !plan.passes.is_empty()
        && matches!(method, Method::Kept | Method::Coded)
}

fn gb_per_second(method: Method, rate: Rate) -> f64 {
    match rate {
        Rate::Stated(gb) => gb,
        Rate::Measured => method.room().gb_per_second(),
    }
}
