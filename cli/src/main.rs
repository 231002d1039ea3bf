//! The llmpress command.

use std::process::ExitCode;

fn main() -> ExitCode {
    llmpress_cli::main(std::env::args_os().collect(), None)
}
