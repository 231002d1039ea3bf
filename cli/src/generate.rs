//! `llmpress generate`: text from any checkpoint.

use std::time::Instant;

use llmpress_formats::Error;
use llmpress_model::{ChatTemplate, Engine, Generation, Message, Sampling};
use serde::Serialize;

use crate::Outcome;
use crate::args::GenerateArgs;
use crate::models::{Loaded, check_length, in_pool};
use crate::report::{Failure, Output, bytes, is_stdout_lost, print};

pub(crate) fn run(args: &GenerateArgs, output: Output) -> Outcome {
    in_pool(args.jobs, || generate(args, output))
}

#[derive(Serialize)]
struct Report<'a> {
    prompt_tokens: usize,
    tokens: &'a [u32],
    text: &'a str,
    /// `eos` or `length`.
    stopped_by: &'static str,
    time_to_first_token_s: f64,
    tokens_per_second: f64,
}

fn generate(args: &GenerateArgs, output: Output) -> Outcome {
    let Loaded { model, tokenizer } = &Loaded::open(&args.model, args.device, output)?;
    advise_weights(&**model, output);
    let ids = prompt_ids(args, tokenizer)?;
    if ids.is_empty() {
        return Err(Failure::Usage("--prompt is empty: give some text to go on from".to_owned()));
    }
    check_length(&**model, ids.len().saturating_add(args.max_new_tokens), output);
    let sampling =
        Sampling { temperature: args.temperature, top_k: args.top_k, top_p: args.top_p, seed: args.seed };
    let start = Instant::now();
    let mut generation = Generation::start(&**model, &ids, args.max_new_tokens, sampling)?;
    let mut tokens = Vec::new();
    let mut text = String::new();
    let mut stream = tokenizer.decode_stream();
    let (mut first, mut stopped_by) = (0.0, "length");
    for _ in 0..args.max_new_tokens {
        let id = generation.next_token()?;
        if tokens.is_empty() {
            first = start.elapsed().as_secs_f64();
        }
        tokens.push(id);
        if tokenizer.eos().contains(&id) && !args.ignore_eos {
            stopped_by = "eos";
            break;
        }
        if let Some(piece) = stream.push(id)? {
            if !output.json {
                print(&piece);
                if is_stdout_lost() {
                    break;
                }
            }
            text.push_str(&piece);
        }
    }
    if let Some(rest) = stream.finish()? {
        if !output.json {
            print(&rest);
        }
        text.push_str(&rest);
    }
    let later = start.elapsed().as_secs_f64() - first;
    let tokens_per_second = tokens.len().saturating_sub(1) as f64 / later.max(1e-9);
    let report = Report {
        prompt_tokens: ids.len(),
        tokens: &tokens,
        text: &text,
        stopped_by,
        time_to_first_token_s: first,
        tokens_per_second,
    };
    output.result(&report, || "\n".to_owned());
    output.progress(&format!(
        "{} tokens read, {} generated; first after {first:.2} s, then {tokens_per_second:.1} tokens/s",
        ids.len(),
        tokens.len()
    ));
    Ok(())
}

/// Tells where every token costs a decoding of the weights that memory would spare.
fn advise_weights(model: &dyn Engine, output: Output) {
    let plain = model.decoded_bytes();
    let Some(available) = crate::memory::available().filter(|_| plain > 0) else { return };
    // fixed12 takes three quarters; some memory is left for everything else.
    let (choice, needed) = match available {
        n if n / 8 * 7 >= plain => ("bf16", plain),
        n if n / 8 * 7 >= plain / 4 * 3 => ("fixed12", plain / 4 * 3),
        _ => return,
    };
    output.progress(&format!(
        "the weights are decoded for every token: --weights {choice} is faster and takes {} of memory ({} are available)",
        bytes(needed),
        bytes(available)
    ));
}

fn prompt_ids(args: &GenerateArgs, tokenizer: &llmpress_model::Tokenizer) -> Result<Vec<u32>, Failure> {
    if !args.chat {
        return Ok(tokenizer.encode_prompt(&args.prompt, tokenizer.adds_bos())?);
    }
    let template = ChatTemplate::open(&args.model)?.ok_or_else(|| {
        Error::Invalid(format!("{} has no chat template: leave out --chat", args.model.display()))
    })?;
    let system = args.system.iter().map(|text| Message { role: "system".to_owned(), content: text.clone() });
    let user = Message { role: "user".to_owned(), content: args.prompt.clone() };
    let messages: Vec<Message> = system.chain([user]).collect();
    // The template writes the BOS itself where the model wants one.
    Ok(tokenizer.encode(&template.render_in(crate::render_chat_template::child()?, &messages, true)?)?)
}
