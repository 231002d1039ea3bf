//! Jinja as `transformers` sets it up, with a bounded budget of steps and text.
//!
//! ```text
//! source --> environment (filters, methods, globals) --> messages --> prompt
//! ```
//!
//! The budget does not bound everything: parsing recurses, and comparisons and some filters are not counted. So a
//! template that is not trusted is rendered in a [child](super::child).

use std::collections::BTreeMap;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{AutoEscape, Environment, ErrorKind, Output, State, context};

use super::Message;

const NAME: &str = "chat template";
/// A step, or 64 bytes of text, costs 1: enough for prompts of some 10 MB.
const FUEL: u64 = 1 << 20;
/// Takes the deepest list of lists that the fuel pays for: they are dropped recursively.
const STACK_BYTES: usize = 512 << 20;

/// Renders on a thread with room for deep values. The error says what is wrong with the template.
pub(super) fn render(
    source: &str,
    tokens: &BTreeMap<String, String>,
    messages: &[Message],
    add_generation_prompt: bool,
) -> Result<String, String> {
    let render = || render_here(source, tokens, messages, add_generation_prompt);
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, render);
        let thread = thread.map_err(|e| format!("no thread to render the chat template: {e}"))?;
        thread.join().unwrap_or_else(|_| Err("the chat template fails".to_owned()))
    })
}

fn render_here(
    source: &str,
    tokens: &BTreeMap<String, String>,
    messages: &[Message],
    add_generation_prompt: bool,
) -> Result<String, String> {
    let mut environment = environment();
    for (name, token) in tokens {
        environment.add_global(name.clone(), token.as_str());
    }
    environment
        .add_template_owned(NAME, without_generation_tags(source))
        .map_err(|e| describe("is no valid chat template", &e))?;
    let value = |m: &Message| Value::from_pairs([("role", m.role.as_str()), ("content", m.content.as_str())]);
    let messages: Value = messages.iter().map(value).collect();
    let context = context! { messages, add_generation_prompt, tools => (), documents => () };
    let rendered = environment.get_template(NAME).and_then(|t| t.render(context));
    rendered.map_err(|e| describe("the chat template fails", &e))
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.unwrap_or_default());
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_fuel(Some(FUEL));
    environment.set_formatter(print_as_python);
    environment.set_unknown_method_callback(python_method);
    environment.add_filter("tojson", crate::python_json::tojson);
    environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", strftime_now);
    environment
}

/// Python's own notation of lists is not Jinja's; and a small list of lists can be large as text.
fn print_as_python(output: &mut Output, state: &mut State, value: &Value) -> Result<(), minijinja::Error> {
    match value.kind() {
        ValueKind::None => Ok(output.write_str("None")?),
        ValueKind::Bool => Ok(output.write_str(if value.is_true() { "True" } else { "False" })?),
        ValueKind::Seq | ValueKind::Map | ValueKind::Iterable => Err(minijinja::Error::new(
            ErrorKind::InvalidOperation,
            "prints a list or a mapping as it is: write it with the filter tojson",
        )),
        _ => minijinja::escape_formatter(output, state, value),
    }
}

/// Methods of Python's strings, lists and dictionaries. Those whose result can be far larger than what they
/// are given go through the filters, which ask for the budget first.
fn python_method(
    state: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, minijinja::Error> {
    let all = |args: &[Value]| std::iter::once(value).chain(args).cloned().collect::<Vec<Value>>();
    match (value.as_str(), method, args) {
        (Some(_), "replace", [_, _]) => state.apply_filter("replace", &all(args)),
        (Some(_), "replace", [old, new, count]) => {
            let count = Value::from(Kwargs::from_iter([("count", count.clone())]));
            state.apply_filter("replace", &all(&[old.clone(), new.clone(), count]))
        }
        (Some(_), "join", [items]) => state.apply_filter("join", &[items.clone(), value.clone()]),
        (Some(_), "replace" | "join" | "format", _) => Err(ErrorKind::UnknownMethod.into()),
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args),
    }
}

/// The time in UTC, in the notation of C's `strftime`.
fn strftime_now(format: &str) -> Result<String, minijinja::Error> {
    jiff::fmt::strtime::format(format, &jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC))
        .map_err(|e| minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {e}")))
}

/// `{% generation %}` only marks what is trained on; as a condition that holds, it keeps its white space
/// control.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, tag)) = rest.split_once("{%") {
        out.push_str(before);
        out.push_str("{%");
        rest = tag;
        let Some((inside, _)) = tag.split_once("%}") else { continue };
        let word = inside.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let condition = match word {
            "generation" => "if true",
            "endgeneration" => "endif",
            _ => continue,
        };
        out.push_str(&inside.replace(word, condition));
        rest = &tag[inside.len()..];
    }
    out.push_str(rest);
    out
}

/// What went wrong, and in which line of the template.
fn describe(what: &str, error: &minijinja::Error) -> String {
    let line = error.line().map(|line| format!(" in line {line}")).unwrap_or_default();
    let detail = match error.kind() {
        ErrorKind::OutOfFuel => "it does not end in time".to_owned(),
        kind => error.detail().map_or_else(|| kind.to_string(), str::to_owned),
    };
    format!("{what}{line}: {detail}")
}
