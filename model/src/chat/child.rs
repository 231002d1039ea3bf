//! A chat template rendered in a child process, which takes the harm that a hostile one does.
//!
//! ```text
//! parent -- source, tokens, messages (JSON) --> stdin  child: limits on memory and time, then Jinja
//! parent <-- prompt, or what is wrong (JSON) -- stdout
//! ```

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::process::{Command, ExitStatus, Stdio};

use llmpress_formats::{Error, Result};
use rustix::process::{Resource, Rlimit, setrlimit};
use serde::{Deserialize, Serialize};

use super::{Message, jinja};

/// Address space of the child, most of it the stack that deep values need.
const MEMORY: u64 = 1 << 30;
/// Seconds of processor time; common templates take some thousandths.
const SECONDS: u64 = 5;
/// More than the fuel pays for.
const MAX_ANSWER_BYTES: u64 = 256 << 20;

/// What a child is to render.
#[derive(Serialize)]
pub(super) struct Request<'a> {
    pub(super) source: &'a str,
    pub(super) tokens: &'a BTreeMap<String, String>,
    pub(super) messages: &'a [Message],
    pub(super) add_generation_prompt: bool,
}

/// The same on the other side.
#[derive(Deserialize)]
struct Received<'a> {
    #[serde(borrow)]
    source: Cow<'a, str>,
    tokens: BTreeMap<String, String>,
    messages: Vec<Message>,
    add_generation_prompt: bool,
}

/// Has a child render; the inner error says what is wrong with the template.
pub(super) fn ask(mut child: Command, request: &Request<'_>) -> Result<Result<String, String>> {
    let program = child.get_program().to_owned();
    let io = |action| move |e| Error::io(&program, action, e);
    let request = serde_json::to_vec(request).map_err(|e| Error::Invalid(format!("messages: {e}")))?;
    // A death by stack overflow or lack of memory has a message of its own, which would only confuse.
    child.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut running = child.spawn().map_err(io("start"))?;
    if let Some(mut stdin) = running.stdin.take() {
        // A child that ended early says why in its status.
        let _ = stdin.write_all(&request);
    }
    let mut answer = Vec::new();
    if let Some(stdout) = running.stdout.take() {
        let _ = stdout.take(MAX_ANSWER_BYTES).read_to_end(&mut answer);
    }
    let status = running.wait().map_err(|e| Error::io(child.get_program(), "wait for", e))?;
    Ok(match serde_json::from_slice(&answer) {
        Ok(answer) if status.success() => answer,
        _ => Err(ended(status)),
    })
}

/// Why a child gave no answer.
fn ended(status: ExitStatus) -> String {
    format!(
        "the chat template takes more than {SECONDS} s or {} MiB, or is nested too deeply ({status})",
        MEMORY >> 20
    )
}

/// Limits this process, reads one request from stdin, renders it and writes the answer to stdout: what the child of
/// [`super::ChatTemplate::render_in`] has to call, and nothing else.
///
/// # Errors
/// The limits cannot be set; no request comes; the answer cannot be written.
pub fn serve_chat_template() -> Result<()> {
    limit(Resource::Core, 0)?;
    limit(Resource::Cpu, SECONDS)?;
    limit(Resource::As, MEMORY)?;
    let mut request = Vec::new();
    std::io::stdin().read_to_end(&mut request).map_err(|e| Error::io("stdin", "read", e))?;
    let request: Received<'_> = serde_json::from_slice(&request)
        .map_err(|e| Error::Invalid(format!("no chat template was asked for: {e}")))?;
    let answer =
        jinja::render(&request.source, &request.tokens, &request.messages, request.add_generation_prompt);
    let answer = serde_json::to_vec(&answer).map_err(|e| Error::Invalid(format!("prompt: {e}")))?;
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(&answer).and_then(|()| stdout.flush()).map_err(|e| Error::io("stdout", "write", e))
}

/// A limit that holds for good; a lower one that is set already stays.
fn limit(resource: Resource, most: u64) -> Result<()> {
    let now = rustix::process::getrlimit(resource);
    let most = now.maximum.map_or(most, |maximum| maximum.min(most));
    setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) })
        .map_err(|e| Error::Limit(format!("the chat template's child cannot be limited: {e}")))
}
