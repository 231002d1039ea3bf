//! The llmpress command: one file a verb.

mod args;
mod bench;
mod bench_gpu;
mod bench_kernels;
mod bench_parts;
mod convert;
mod diff;
mod doctor;
mod documents;
mod eval;
mod generate;
mod inspect;
mod memory;
mod models;
mod plan;
mod progress;
mod prune;
mod rank;
mod report;
mod restore;
mod sigbus;
mod speed;
mod verify;

use std::process::ExitCode;

use args::{Cli, Command};
use clap::Parser;
use report::{Failure, Output};

fn main() -> ExitCode {
    // A reader that closes early (`| head`) ends the program quietly instead of failing a print.
    restore_sigpipe();
    let cli = Cli::parse();
    let output = Output { json: cli.json, quiet: cli.quiet };
    sigbus::install(cli.json);
    let result = match cli.command {
        Command::Inspect(args) => inspect::run(&args, output),
        Command::Plan(args) => plan::run(&args, output),
        Command::Convert(args) => convert::run(&args, output),
        Command::Rank(args) => rank::run(&args, output),
        Command::Restore(args) => restore::run(&args, output),
        Command::Verify(args) => verify::run(&args, output),
        Command::Diff(args) => diff::run(&args, output),
        Command::Eval(command) => eval::run(&command, output),
        Command::Generate(args) => generate::run(&args, output),
        Command::Bench(args) => bench::run(&args, output),
        Command::Speed(args) => speed::run(&args, output),
        Command::Doctor(args) => doctor::run(&args, output),
        Command::Completions(args) => documents::completions(&args),
        Command::Man(args) => documents::man(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output.failure(&failure);
            ExitCode::from(failure.exit_code())
        }
    }
}

fn restore_sigpipe() {
    #[allow(unsafe_code)]
    // SAFETY: called first in `main`, before any thread; installing the default action is sound.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
}

/// Shorthand for what verbs return.
type Outcome = Result<(), Failure>;
