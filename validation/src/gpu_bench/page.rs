//! The report as a page: Markdown, with tables.

use std::collections::BTreeMap;

use super::findings::ModelSpeed;
use super::goals::Measure;
use super::report::{Outcome, Report, RunState};
use crate::Rate;

/// A table: the head, then the rows.
fn table(page: &mut String, head: &[&str], rows: impl Iterator<Item = Vec<String>>) {
    let line = |cells: &[String]| {
        // A bar would end a cell, a line break the row.
        let cells: Vec<String> =
            cells.iter().map(|c| c.replace('|', "\\|").replace(['\n', '\r'], " ")).collect();
        format!("| {} |\n", cells.join(" | "))
    };
    page.push_str(&line(&head.iter().map(|&h| h.to_owned()).collect::<Vec<_>>()));
    page.push_str(&format!("|{}\n", "---|".repeat(head.len())));
    rows.for_each(|row| page.push_str(&line(&row)));
    page.push('\n');
}

fn rate(rate: &Rate, digits: usize) -> String {
    format!("{:.*} ({:.*}-{:.*})", digits, rate.median, digits, rate.min, digits, rate.max)
}

fn gigabytes(bytes: Option<u64>) -> String {
    bytes.map_or("-".to_owned(), |bytes| format!("{:.2} GB", bytes as f64 / 1e9))
}

/// The whole page.
pub(super) fn page(report: &Report) -> String {
    let mut page = String::from("# Checks and measurements on a GPU\n\n");
    head(&mut page, report);
    steps(&mut page, report);
    goals(&mut page, report);
    speeds(&mut page, report);
    kernels(&mut page, report);
    proofs(&mut page, report);
    checks(&mut page, report);
    page
}

fn head(page: &mut String, report: &Report) {
    let count = |outcome: Outcome| report.steps.iter().filter(|s| s.outcome == outcome).count();
    let state = match report.state {
        RunState::Running => "Not finished when this was written",
        RunState::Finished => "Finished",
        RunState::Interrupted => "Interrupted",
    };
    let reached = report.goals.iter().filter(|g| g.reached == Some(true)).count();
    let measured = report.goals.iter().filter(|g| g.measured.is_some()).count();
    page.push_str(&format!(
        "{state}: of {} steps {} held, {} failed, {} ran out of time, {} did not run. Of {} goals {measured} were measured and \
         {reached} reached. {:.0} of {:.0} s.\n\n",
        report.steps.len() - count(Outcome::NotAskedFor),
        count(Outcome::Held),
        count(Outcome::Failed),
        count(Outcome::TimedOut) + count(Outcome::Interrupted),
        count(Outcome::NotRun) + count(Outcome::Waiting),
        report.goals.len(),
        report.seconds,
        report.budget_s,
    ));
    page.push_str("Measured on:\n\n");
    let mut rows = vec![
        ("program", report.version.clone()),
        ("date", format!("{} to {}", report.started, report.written)),
        ("device", report.device.clone()),
    ];
    match &report.card {
        None => rows.push(("GPU", "none was found".to_owned())),
        Some(card) => {
            rows.push((
                "GPU",
                format!(
                    "{}, compute capability {}, {} multiprocessors, {}",
                    card.name,
                    card.compute_capability,
                    card.multiprocessors,
                    gigabytes(Some(card.memory_bytes))
                ),
            ));
            rows.push(("driver", format!("supports CUDA {}", card.driver_cuda)));
            rows.extend(card.nvidia_smi.iter().map(|lines| ("nvidia-smi", lines.replace('\n', "; "))));
            rows.extend(
                card.kernels_loaded_s
                    .iter()
                    .map(|s| ("kernels", format!("all compiled by the driver in {s:.1} s"))),
            );
        }
    }
    if let Some(ceilings) = &report.ceilings {
        rows.push(("read ceiling", format!("{} GB/s", rate(&ceilings.read_gbps, 0))));
        rows.push(("copy ceiling", format!("{} GB/s, read and written", rate(&ceilings.copy_gbps, 0))));
    }
    rows.extend(report.no_cublas.iter().map(|why| ("cuBLAS", format!("not measured: {why}"))));
    table(page, &["", ""], rows.into_iter().map(|(name, value)| vec![name.to_owned(), value]));
}

fn steps(page: &mut String, report: &Report) {
    page.push_str("## Steps\n\n");
    let rows = report.steps.iter().map(|step| {
        vec![
            step.name.clone(),
            step.shows.clone(),
            step.outcome.text().to_owned(),
            format!("{:.1} of {:.0}", step.seconds, step.limit_s),
            step.reason.clone().unwrap_or_default(),
        ]
    });
    table(page, &["step", "what it shows", "", "seconds", "why"], rows);
}

fn goals(page: &mut String, report: &Report) {
    page.push_str(
        "## Goals\n\nSet for an H100 80GB HBM3 with a cold cache, launches included; the prototypes were measured there.\n\n",
    );
    let rows = report.goals.iter().map(|result| {
        let goal = &result.goal;
        let value = |x: f64| match goal.measure {
            Measure::TimesCublas => format!("{x:.2} x cuBLAS"),
            Measure::OutputGbps => format!("{x:.0} GB/s of output"),
        };
        vec![
            goal.kernel.to_owned(),
            format!("{} {} x {}", goal.matrix, goal.n, goal.k),
            if goal.m == 0 { "-".to_owned() } else { goal.m.to_string() },
            goal.prototype.map_or("-".to_owned(), value),
            value(goal.at_least),
            result.measured.map_or("not measured".to_owned(), value),
            match result.reached {
                None => "-",
                Some(true) => "reached",
                Some(false) => "MISSED",
            }
            .to_owned(),
        ]
    });
    table(page, &["kernel", "matrix", "tokens", "prototype", "goal", "measured", ""], rows);
}

fn speeds(page: &mut String, report: &Report) {
    page.push_str("## A model of 8B shapes\n\n");
    if report.speeds.is_empty() {
        page.push_str("Not measured.\n\n");
        return;
    }
    page.push_str("Random weights, one sequence: a prompt of 512 tokens, then 128 one at a time.\n\n");
    let plain = report.speeds.iter().find(|speed| speed.weights == "bf16");
    let rows = report.speeds.iter().map(|speed| {
        let against = |of: fn(&ModelSpeed) -> f64| {
            plain.map_or("-".to_owned(), |plain| format!("{:.2}", of(speed) / of(plain)))
        };
        vec![
            speed.weights.clone(),
            speed.layers.to_string(),
            rate(&speed.prefill_tokens_per_s, 0),
            against(|s| s.prefill_tokens_per_s.median),
            rate(&speed.decode_tokens_per_s, 1),
            against(|s| s.decode_tokens_per_s.median),
            format!("{:.1} ms", speed.time_to_first_token_s * 1e3),
            gigabytes(speed.gpu_bytes),
            gigabytes(speed.gpu_peak_bytes),
        ]
    });
    let head = [
        "weights",
        "layers",
        "prefill, tokens/s",
        "x bf16",
        "decode, tokens/s",
        "x bf16",
        "first token",
        "weights on the GPU",
        "peak",
    ];
    table(page, &head, rows);
}

fn kernels(page: &mut String, report: &Report) {
    page.push_str("## Kernels\n\n");
    if report.kernels.is_empty() {
        page.push_str("Not measured.\n\n");
        return;
    }
    page.push_str(
        "Cold cache, recorded graphs, median (range) of the replays; GB/s of bytes read and written.\n\n",
    );
    let rows = report.kernels.iter().map(|row| {
        vec![
            format!("{} x {}", row.n, row.k),
            if row.m == 0 { "-".to_owned() } else { row.m.to_string() },
            row.kernel.clone(),
            rate(&row.microseconds, 1),
            format!("{:.0}", row.gbps),
            format!("{:.0} %", row.share_of_read_ceiling * 100.0),
            row.speed_against_cublas.map_or("-".to_owned(), |x| format!("{x:.2}")),
            row.block.clone().unwrap_or_default(),
            if row.correct { String::new() } else { "WRONG".to_owned() },
        ]
    });
    table(page, &["matrix", "tokens", "kernel", "us", "GB/s", "of read", "x cuBLAS", "block", ""], rows);
}

fn proofs(page: &mut String, report: &Report) {
    page.push_str("## Proofs\n\n");
    if report.proofs.is_empty() {
        page.push_str("None was made.\n\n");
        return;
    }
    let mut kernels: BTreeMap<&str, Vec<_>> = BTreeMap::new();
    for proof in &report.proofs {
        kernels.entry(&proof.kernel).or_default().push(proof);
    }
    let rows = kernels.into_iter().map(|(kernel, proofs)| {
        let exact = proofs.iter().filter(|p| p.exact).count();
        let near = proofs.len() - exact;
        let worst = proofs.iter().filter(|p| !p.exact).filter_map(|p| p.worst).reduce(f64::max);
        let faults: Vec<String> =
            proofs.iter().filter_map(|p| Some(format!("{}: {}", p.shape, p.fault.as_ref()?))).collect();
        vec![
            kernel.to_owned(),
            exact.to_string(),
            near.to_string(),
            worst.map_or("-".to_owned(), |w| format!("{w:.3}")),
            if faults.is_empty() { "none".to_owned() } else { faults.join("; ") },
        ]
    });
    let head =
        ["kernel", "shapes, bit for bit", "shapes, near", "largest error of what rounding allows", "faults"];
    table(page, &head, rows);
}

fn checks(page: &mut String, report: &Report) {
    page.push_str("## Checks\n\n");
    let rows = report.steps.iter().flat_map(|step| {
        step.checks.iter().map(|check| {
            vec![
                step.name.clone(),
                check.what.clone(),
                if check.held { "holds" } else { "DOES NOT HOLD" }.to_owned(),
                check.found.clone(),
            ]
        })
    });
    table(page, &["step", "what", "", "found"], rows);
}
