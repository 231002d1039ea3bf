//! `llmpress eval`: how well a model predicts a text, and how far it is from its base.

use std::path::Path;

use llmpress_model::Skips;
use llmpress_pipeline::{Counted, Progress};
use llmpress_validation::{Distribution, Divergence, Perplexity, Protocol, kl_divergence, perplexity};
use serde::Serialize;

use crate::Outcome;
use crate::args::{BosChoice, EvalCommand, KldArgs, PerplexityArgs, ProtocolArgs};
use crate::models::{Loaded, check_batch, check_length, in_pool};
use crate::progress::Bar;
use crate::report::{Failure, Output, bytes, table};
use crate::text::read_text;

pub(crate) fn run(command: &EvalCommand, output: Output) -> Outcome {
    match command {
        EvalCommand::Ppl(args) => in_pool(args.protocol.jobs, || ppl(args, output)),
        EvalCommand::Kld(args) => in_pool(args.protocol.jobs, || kld(args, output)),
        EvalCommand::Tasks(args) => in_pool(args.jobs, || crate::eval_tasks::run(args, output)),
    }
}

/// A result and what it was measured on.
#[derive(Serialize)]
struct Report<T> {
    model: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    base: Option<String>,
    text: String,
    text_bytes: usize,
    text_tokens: usize,
    seconds: f64,
    tokens_per_second: f64,
    peak_memory_bytes: u64,
    #[serde(flatten)]
    result: T,
}

/// A text as ids, and how it is cut.
pub(crate) struct Text {
    pub(crate) ids: Vec<u32>,
    pub(crate) bytes: usize,
    pub(crate) protocol: Protocol,
    pub(crate) windows: usize,
}

impl Text {
    /// Reads and encodes a text for `model`, and checks that it fits: before any work.
    pub(crate) fn read(
        path: &Path,
        model: &Loaded,
        args: &ProtocolArgs,
        output: Output,
    ) -> Result<Self, Failure> {
        let text = read_text(path)?;
        let ids = model.tokenizer.encode(&text)?;
        let bos = match args.bos {
            BosChoice::Auto => model.tokenizer.bos().filter(|_| model.tokenizer.adds_bos()),
            BosChoice::Never => None,
        };
        let protocol = Protocol { window: args.window, stride: args.stride, limit: args.limit, bos };
        let windows = protocol.windows(ids.len())?;
        model.check_ids(&ids)?;
        check_length(&*model.model, args.window.saturating_add(usize::from(bos.is_some())), output);
        Ok(Self { ids, bytes: text.len(), protocol, windows })
    }

    /// How it was cut, for people.
    pub(crate) fn describe(&self) -> String {
        let Protocol { window, stride, bos, .. } = self.protocol;
        let stride = stride.map(|s| format!(", stride {s}")).unwrap_or_default();
        let bos = bos.map_or(", no BOS".to_owned(), |id| format!(", each after BOS (id {id})"));
        format!("{} windows of {window} tokens{stride}{bos}", self.windows)
    }
}

fn ppl(args: &PerplexityArgs, output: Output) -> Outcome {
    check_batch(args.protocol.device.device, args.protocol.batch)?;
    let model = Loaded::open(&args.model, args.protocol.device, output)?;
    let text = Text::read(&args.protocol.text, &model, &args.protocol, output)?;
    let bar = Bar::of("ppl", text.windows as u64, Counted::Windows, output);
    let (none, batch) = (Skips::new(), args.protocol.batch);
    let result = perplexity(&*model.model, &none, &text.ids, text.bytes, text.protocol, batch, &mut |_| {
        bar.advance(1)
    });
    let seconds = bar.finish();
    let result: Perplexity = result?;
    let read = text.windows * text.protocol.window;
    let report = Report {
        model: args.model.display().to_string(),
        base: None,
        text: args.protocol.text.display().to_string(),
        text_bytes: text.bytes,
        text_tokens: text.ids.len(),
        seconds,
        tokens_per_second: read as f64 / seconds,
        peak_memory_bytes: crate::memory::peak().unwrap_or(0),
        result,
    };
    output.result(&report, || {
        let r = &report.result;
        format!(
            "{} on {}: {}, {} tokens scored\n\
             perplexity      {:.4} +- {:.4}\n\
             nats a token    {:.5} +- {:.5}\n\
             bits a byte     {:.5}\n\
             {:.1} s, {:.0} tokens/s, peak memory {}\n",
            args.model.display(),
            args.protocol.text.display(),
            text.describe(),
            r.scored_tokens,
            r.perplexity,
            r.perplexity_standard_error,
            r.nats_per_token,
            r.nats_per_token_standard_error,
            r.bits_per_byte,
            seconds,
            report.tokens_per_second,
            bytes(report.peak_memory_bytes),
        )
    });
    Ok(())
}

fn kld(args: &KldArgs, output: Output) -> Outcome {
    check_batch(args.protocol.device.device, args.protocol.batch)?;
    let model = Loaded::open(&args.model, args.protocol.device, output)?;
    let base = Loaded::open(&args.base, args.protocol.device, output)?;
    // The base's tokenizer: the question is what became of the base.
    let text = Text::read(&args.protocol.text, &base, &args.protocol, output)?;
    model.check_ids(&text.ids)?;
    let bar = Bar::of("kld", text.windows as u64, Counted::Windows, output);
    let (none, batch) = (Skips::new(), args.protocol.batch);
    let result =
        kl_divergence(&*base.model, &*model.model, &none, &text.ids, text.protocol, batch, &mut |_| {
            bar.advance(1)
        });
    let seconds = bar.finish();
    let result: Divergence = result?;
    let report = Report {
        model: args.model.display().to_string(),
        base: Some(args.base.display().to_string()),
        text: args.protocol.text.display().to_string(),
        text_bytes: text.bytes,
        text_tokens: text.ids.len(),
        seconds,
        tokens_per_second: (2 * text.windows * text.protocol.window) as f64 / seconds,
        peak_memory_bytes: crate::memory::peak().unwrap_or(0),
        result,
    };
    output.result(&report, || {
        let r = &report.result;
        let row = |name: &str, d: &Distribution| {
            let values = [d.mean, d.standard_error, d.min, d.median, d.p90, d.p99, d.p999, d.max];
            std::iter::once(name.to_owned()).chain(values.map(|v| format!("{v:.6}"))).collect::<Vec<_>>()
        };
        let head = ["", "mean", "+-", "min", "median", "90 %", "99 %", "99.9 %", "max"].map(str::to_owned);
        format!(
            "{} against {} on {}: {}, {} tokens scored\n\n{}\n\
             same top token        {:.4} +- {:.4} %\n\
             RMS change of p       {:.6}\n\
             perplexity            {:.4}, base {:.4}\n\
             ln of their ratio     {:.6} +- {:.6}\n\
             {:.1} s, {:.0} tokens/s, peak memory {}\n",
            args.model.display(),
            args.base.display(),
            args.protocol.text.display(),
            text.describe(),
            r.scored_tokens,
            table(&[head.to_vec(), row("KL(base || model)", &r.kl), row("change of p", &r.delta_p)]),
            r.same_top * 100.0,
            r.same_top_standard_error * 100.0,
            r.delta_p_rms,
            r.perplexity,
            r.base_perplexity,
            r.ln_perplexity_ratio,
            r.ln_perplexity_ratio_standard_error,
            seconds,
            report.tokens_per_second,
            bytes(report.peak_memory_bytes),
        )
    });
    Ok(())
}
