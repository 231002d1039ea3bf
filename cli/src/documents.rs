//! Completions, manual pages, and what the manifest says of this program.

use std::process::ExitCode;

use clap::CommandFactory;
use llmpress_formats::Producer;

use crate::Outcome;
use crate::args::{Cli, CompletionsArgs, ManArgs};
use crate::report::print;

/// Prints a page that was asked for (`--help`, `--version`), or what is wrong with the arguments.
pub(crate) fn show(page: &clap::Error) -> ExitCode {
    match page.print() {
        Err(e) if !page.use_stderr() && e.kind() != std::io::ErrorKind::BrokenPipe => ExitCode::FAILURE,
        _ => ExitCode::from(u8::try_from(page.exit_code()).unwrap_or(1)),
    }
}

pub(crate) fn completions(args: &CompletionsArgs) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "llmpress", &mut script);
    print(&String::from_utf8_lossy(&script));
    Ok(())
}

pub(crate) fn man(args: &ManArgs) -> Outcome {
    let io = |action| move |e| llmpress_formats::Error::io(&args.dir, action, e);
    std::fs::create_dir_all(&args.dir).map_err(io("create"))?;
    clap_mangen::generate_to(Cli::command(), &args.dir).map_err(io("write"))?;
    Ok(())
}

/// This program, its version and the revision it was built from.
pub(crate) fn producer() -> Producer {
    Producer {
        name: "llmpress".to_owned(),
        version: crate::version::VERSION.to_owned(),
        revision: crate::version::revision().map(str::to_owned),
    }
}
