//! `llmpress bench gpu`: checks and measures everything on a machine with a GPU, in bounded time.

use std::sync::atomic::{AtomicBool, Ordering};

use llmpress_validation::gpu_bench::{self, Options, Outcome, Report, RunState};

use crate::args::{BenchGpuArgs, Device};
use crate::report::{Failure, Output, table};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

pub(crate) fn run(args: &BenchGpuArgs, output: Output) -> crate::Outcome {
    let Device::Cuda(ordinal) = args.device else {
        return Err(Failure::Usage("--device: it is a GPU that is measured: cuda or cuda:N".to_owned()));
    };
    let program = crate::itself::program()?;
    let producer = crate::documents::producer();
    let revision = producer.revision.map(|r| format!(" ({r})")).unwrap_or_default();
    let options = Options {
        program,
        version: format!("{} {}{revision}", producer.name, producer.version),
        out: args.out.clone(),
        scratch: args.scratch.clone().unwrap_or_else(std::env::temp_dir),
        scratch_bytes: None,
        ordinal,
        model: args.model.clone(),
        text: args.text.clone(),
        budget: args.budget,
        layers: args.layers,
        only: args.only.clone(),
        stop_after: args.stop_after.clone(),
        force: args.force,
    };
    end_on_signals();
    let report = gpu_bench::run(&options, &INTERRUPTED, &mut |line| output.progress(line))?;
    output.result(&report, || text(args, &report));
    if report.all_held() {
        return Ok(());
    }
    let not = |step: &&gpu_bench::StepReport| !matches!(step.outcome, Outcome::Held | Outcome::NotAskedFor);
    let steps: Vec<&str> = report.steps.iter().filter(not).map(|step| &*step.name).collect();
    let steps = if steps.is_empty() { String::new() } else { format!("not held: {}", steps.join(", ")) };
    let interrupted = (report.state == RunState::Interrupted).then(|| "interrupted".to_owned());
    let what: Vec<String> = interrupted.into_iter().chain([steps]).filter(|text| !text.is_empty()).collect();
    Err(Failure::Findings(what.join("; ")))
}

/// Ctrl-C and the like end the step that runs and leave a report.
fn end_on_signals() {
    extern "C" fn note(_: libc::c_int) {
        INTERRUPTED.store(true, Ordering::Relaxed);
    }
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        #[allow(unsafe_code)]
        // SAFETY: the handler only stores to an atomic, which a signal may interrupt anything with.
        unsafe {
            libc::signal(signal, note as *const () as libc::sighandler_t);
        }
    }
}

fn text(args: &BenchGpuArgs, report: &Report) -> String {
    let mut rows = vec![["step", "", "seconds"].map(str::to_owned).to_vec()];
    rows.extend(
        report.steps.iter().map(|step| {
            vec![step.name.clone(), step.outcome.text().to_owned(), format!("{:.1}", step.seconds)]
        }),
    );
    let reached = report.goals.iter().filter(|goal| goal.reached == Some(true)).count();
    let measured = report.goals.iter().filter(|goal| goal.reached.is_some()).count();
    format!(
        "{}\n{reached} goals reached of {measured} measured and {} set; everything is in {}\n",
        table(&rows),
        report.goals.len(),
        args.out.join(gpu_bench::REPORT_PAGE).display()
    )
}
