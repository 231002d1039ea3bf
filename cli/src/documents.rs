//! Completions, manual pages, and what the manifest says of this program.

use clap::CommandFactory;
use llmpress_formats::Producer;

use crate::Outcome;
use crate::args::{Cli, CompletionsArgs, ManArgs};

pub(crate) fn completions(args: &CompletionsArgs) -> Outcome {
    clap_complete::generate(args.shell, &mut Cli::command(), "llmpress", &mut std::io::stdout());
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
