//! `llmpress generate`: text from any checkpoint.

use std::time::Instant;

use llmpress_formats::Error;
use llmpress_model::{ChatTemplate, Engine, Generation, Message, Sampling, Tokenizer, generate_all};
use llmpress_pipeline::{Counted, Progress};
use serde::Serialize;

use crate::Outcome;
use crate::args::GenerateArgs;
use crate::models::{Loaded, check_length, in_pool};
use crate::progress::Bar;
use crate::report::{Failure, Output, bytes, is_stdout_lost, print};
use crate::text::read_text;

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
    let texts = texts(args)?;
    let Loaded { model, tokenizer } = &Loaded::open(&args.model, args.device, output)?;
    advise_weights(&**model, output);
    let prompts = prompt_ids(args, &texts, tokenizer)?;
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    check_length(&**model, longest.saturating_add(args.max_new_tokens), output);
    match &prompts[..] {
        [ids] => one(args, &**model, tokenizer, ids, output),
        _ => several(args, &**model, tokenizer, &prompts, output),
    }
}

/// The texts to go on from.
fn texts(args: &GenerateArgs) -> Result<Vec<String>, Failure> {
    let mut texts = args.prompt.clone();
    if let Some(path) = &args.prompts {
        let file = read_text(path)?;
        texts.extend(file.lines().filter(|line| !line.trim().is_empty()).map(str::to_owned));
        if texts.is_empty() {
            return Err(Failure::from(Error::corrupt(path, None, "holds no prompts: a line each")));
        }
    }
    Ok(texts)
}

fn sampling(args: &GenerateArgs) -> Sampling {
    Sampling { temperature: args.temperature, top_k: args.top_k, top_p: args.top_p, seed: args.seed }
}

/// What came after one of several prompts.
#[derive(Serialize)]
struct OfPrompt {
    prompt_tokens: usize,
    tokens: Vec<u32>,
    text: String,
    /// `eos` or `length`.
    stopped_by: &'static str,
}

#[derive(Serialize)]
struct OfAll {
    prompts: Vec<OfPrompt>,
    seconds: f64,
    /// Generated tokens of all prompts, the time for reading the prompts included.
    tokens_per_second: f64,
}

/// Goes on from several prompts at once.
fn several(
    args: &GenerateArgs,
    model: &dyn Engine,
    tokenizer: &Tokenizer,
    prompts: &[Vec<u32>],
    output: Output,
) -> Outcome {
    let ends: &[u32] = if args.ignore_eos { &[] } else { tokenizer.eos() };
    if args.batch.is_some_and(|batch| batch > 1) && !model.mixes_lengths() {
        output.warn(
            "the model's rotary embedding depends on the length of the text, so each prompt is gone on from by itself",
        );
    }
    let bar = Bar::of("generate", prompts.len() as u64, Counted::Prompts, output);
    let found =
        generate_all(model, prompts, args.max_new_tokens, sampling(args), ends, args.batch, &mut |_| {
            bar.advance(1)
        });
    let seconds = bar.finish();
    let mut all = Vec::with_capacity(prompts.len());
    for (ids, finished) in prompts.iter().zip(found?) {
        // The token that ends a text is not a part of it.
        let shown = finished.tokens.len() - usize::from(finished.ended);
        let mut stream = tokenizer.decode_stream();
        let mut text = String::new();
        for id in &finished.tokens[..shown] {
            text.extend(stream.push(*id)?);
        }
        text.extend(stream.finish()?);
        all.push(OfPrompt {
            prompt_tokens: ids.len(),
            tokens: finished.tokens,
            text,
            stopped_by: if finished.ended { "eos" } else { "length" },
        });
    }
    let tokens: usize = all.iter().map(|one| one.tokens.len()).sum();
    let report = OfAll { prompts: all, seconds, tokens_per_second: tokens as f64 / seconds.max(1e-9) };
    output.result(&report, || {
        let texts = report.prompts.iter().enumerate();
        texts.map(|(number, one)| format!("--- {}\n{}\n", number + 1, one.text)).collect()
    });
    output.progress(&format!(
        "{} prompts, {tokens} tokens generated in {seconds:.2} s: {:.1} tokens/s",
        prompts.len(),
        report.tokens_per_second
    ));
    Ok(())
}

/// Goes on from one prompt, piece by piece.
fn one(
    args: &GenerateArgs,
    model: &dyn Engine,
    tokenizer: &Tokenizer,
    ids: &[u32],
    output: Output,
) -> Outcome {
    let start = Instant::now();
    let mut generation = Generation::start(model, ids, args.max_new_tokens, sampling(args))?;
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

/// The tokens of each text.
fn prompt_ids(
    args: &GenerateArgs,
    texts: &[String],
    tokenizer: &Tokenizer,
) -> Result<Vec<Vec<u32>>, Failure> {
    let template = match args.chat {
        false => None,
        true => Some(ChatTemplate::open(&args.model)?.ok_or_else(|| {
            Error::Invalid(format!("{} has no chat template: leave out --chat", args.model.display()))
        })?),
    };
    let one = |text: &String| -> Result<Vec<u32>, Failure> {
        let Some(template) = &template else {
            return Ok(tokenizer.encode_prompt(text, tokenizer.adds_bos())?);
        };
        let system =
            args.system.iter().map(|text| Message { role: "system".to_owned(), content: text.clone() });
        let user = Message { role: "user".to_owned(), content: text.clone() };
        let messages: Vec<Message> = system.chain([user]).collect();
        // The template writes the BOS itself where the model wants one.
        Ok(tokenizer.encode(&template.render_in(
            crate::render_chat_template::child()?,
            &messages,
            true,
        )?)?)
    };
    let prompts = texts.iter().map(one).collect::<Result<Vec<_>, _>>()?;
    match prompts.iter().position(Vec::is_empty) {
        Some(number) => Err(Failure::Usage(match prompts.len() {
            1 => "--prompt is empty: give some text to go on from".to_owned(),
            _ => format!("prompt {} is empty: give some text to go on from", number + 1),
        })),
        None => Ok(prompts),
    }
}
