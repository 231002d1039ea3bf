//! The llmpress command: one file a verb.
//!
//! ```text
//! arguments --> verb --> result, warnings, progress --> printed                  main
//!                                                   \-> told to a Listener       call: for the Python package
//! ```

#![warn(clippy::print_stderr, clippy::print_stdout)] // They panic where the stream is full or closed: see `report`.

mod args;
mod bench;
mod bench_gpu;
mod bench_kernels;
mod bench_parts;
mod cache_size;
mod call;
mod convert;
mod diff;
mod doctor;
mod documents;
mod environment;
mod eval;
mod eval_tasks;
mod export;
mod generate;
mod gpu_memory;
mod hub;
mod inspect;
mod interrupt;
mod itself;
mod memory;
mod merge;
mod models;
mod open_files;
mod passes;
mod plan;
mod progress;
mod rank;
mod recipe;
mod render_chat_template;
mod report;
mod restore;
mod share;
mod sigbus;
mod speed;
mod stop;
mod text;
mod verify;
mod version;
mod worker;
mod workload;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use args::{Cli, Command};
pub use call::{Called, Listener, call, local_checkpoint};
use clap::{CommandFactory, FromArgMatches};
pub use environment::limit_instructions;
use report::{Failure, Output};

/// The command: does what the arguments say, the first of which is its name. `itself` is the program that does so, where that is not this
/// executable: some verbs start it again.
pub fn main(arguments: Vec<OsString>, itself: Option<PathBuf>) -> ExitCode {
    itself::is(itself);
    let command = Cli::command().color(environment::colour_argument(&arguments));
    let parsed = command.try_get_matches_from(arguments).and_then(|matches| Cli::from_arg_matches(&matches));
    let cli = match parsed {
        Ok(cli) => cli,
        Err(page_or_mistake) => return documents::show(&page_or_mistake),
    };
    open_files::raise_limit();
    sigbus::install(cli.json);
    let output =
        Output { json: cli.json, quiet: cli.quiet, colours: environment::colours(cli.color), listener: None };
    let allowed = limit_instructions().map_err(Failure::Usage);
    let result = allowed.and_then(|()| run(cli.command, output));
    match result.and_then(|()| report::printed()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output.failure(&failure);
            ExitCode::from(failure.exit_code())
        }
    }
}

fn run(mut command: Command, output: Output) -> Outcome {
    let _held = hub::resolve(&mut command, output)?;
    match command {
        Command::Inspect(args) => inspect::run(&args, output),
        Command::Plan(args) => plan::run(&args, output),
        Command::Convert(args) => convert::run(&args, output),
        Command::Worker(args) => worker::run(&args, output),
        Command::Merge(args) => merge::run(&args, output),
        Command::Rank(args) => rank::run(&args, output),
        Command::Export(args) => export::run(&args, output),
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
        Command::RenderChatTemplate => render_chat_template::run(),
    }
}

/// Shorthand for what verbs return.
type Outcome = Result<(), Failure>;
