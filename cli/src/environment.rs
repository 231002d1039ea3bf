//! The variables of the environment that change what the program does.

use std::ffi::OsString;
use std::io::IsTerminal;

use clap::ColorChoice;

/// Which instructions the processor's kernels and coders use.
const ISA: &str = "LLMPRESS_ISA";

/// Keeps kernels and coders to the instructions that the user allows.
///
/// # Errors
/// What is wrong with the variable that says so.
pub fn limit_instructions() -> Result<(), String> {
    let Some(name) = std::env::var_os(ISA).filter(|name| !name.is_empty()) else { return Ok(()) };
    let name = name.to_string_lossy();
    llmpress_kernels::cpu::limit_instruction_set(&name).map_err(|e| format!("{ISA}: {e}"))?;
    if name == "portable" {
        llmpress_entropy::use_portable_code_only();
    }
    Ok(())
}

/// Whether what goes to stderr is coloured.
pub(crate) fn colours(choice: ColorChoice) -> bool {
    let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    match choice {
        ColorChoice::Always => true,
        ColorChoice::Never => false,
        ColorChoice::Auto => {
            std::io::stderr().is_terminal()
                && !set("NO_COLOR")
                && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
        }
    }
}

/// `--color` as it stands among the arguments: pages and mistakes are coloured before these are understood.
pub(crate) fn colour_argument(arguments: &[OsString]) -> ColorChoice {
    let mut arguments = arguments.iter().skip(1);
    while let Some(argument) = arguments.next() {
        let value = match argument.to_str() {
            Some("--color") => arguments.next().and_then(|value| value.to_str()),
            Some(argument) => argument.strip_prefix("--color="),
            None => None,
        };
        if let Some(choice) = value.and_then(|value| value.parse().ok()) {
            return choice;
        }
    }
    ColorChoice::Auto
}
