//! `llmpress render-chat-template`: the child process in which a chat template is rendered. Not for people.

use std::process::Command;

use llmpress_model::serve_chat_template;

use crate::Outcome;
use crate::report::Failure;

/// The name of the verb.
pub(crate) const NAME: &str = "render-chat-template";

pub(crate) fn run() -> Outcome {
    Ok(serve_chat_template()?)
}

/// This program as that child.
pub(crate) fn child() -> Result<Command, Failure> {
    let mut command = Command::new(crate::itself::program()?);
    command.arg(NAME);
    Ok(command)
}
