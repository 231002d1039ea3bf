//! What a plan comes to on many machines, for people.

use llmpress_pipeline::{Rate, Workload};

use crate::report::bytes;

pub(crate) fn text(load: &Workload) -> String {
    let Workload { workers, cores, units, traffic, .. } = load;
    let rate = match load.rate {
        Rate::Measured => "at the rates of docs/benchmarks.md; --core-rate says another".to_owned(),
        Rate::Stated(gb) => format!("at {gb} GB/s a core, as stated"),
    };
    let idle = workers.saturating_sub(*units);
    let mut text = format!(
        "\non {workers} workers of {cores} cores: {units} units, at most {} a worker{}\n  time: {}, {} core hours {rate}\n  storage: \
         workers read {} (from caches: {}) and write {}; merge reads {}\n",
        bytes(load.most_bytes),
        if idle > 0 { format!(", none for {idle} of them") } else { String::new() },
        hours(load.hours),
        figure(load.core_hours),
        bytes(traffic.read_most),
        bytes(traffic.read_least),
        bytes(traffic.written),
        bytes(traffic.read_by_merge),
    );
    let each = |amount: u64| amount as f64 / 1e9 / (load.hours * 3600.0);
    text.push_str(&match load.storage_hours {
        Some(storage) if storage >= load.hours => {
            "  the storage takes that long: more cores do not help\n".to_owned()
        }
        Some(storage) => format!("  of which the storage is busy for {}\n", hours(storage)),
        None if load.hours > 0.0 => format!(
            "  if the storage delivers {} GB/s and takes {} GB/s; --storage-rate says what it does\n",
            figure(each(traffic.read_most)),
            figure(each(traffic.written)),
        ),
        None => String::new(),
    });
    if let Some(pass) = &load.after {
        text.push_str(&format!(
            "  before that {pass} runs on one machine, which makes the shards as well: `llmpress worker` does not take this plan\n"
        ));
    }
    text
}

fn hours(hours: f64) -> String {
    match hours {
        h if h >= 1.0 => format!("{} hours", figure(h)),
        h if h * 60.0 >= 1.0 => format!("{} minutes", figure(h * 60.0)),
        h => format!("{} seconds", figure(h * 3600.0)),
    }
}

/// Three digits.
fn figure(value: f64) -> String {
    match value {
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}
