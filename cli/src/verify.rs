//! `llmpress verify`: prove that a converted checkpoint is intact and matches its source.

use std::path::Path;

use llmpress_formats::{Base, Checkpoint, Manifest, printable};
use llmpress_pipeline::{Counted, Pass, Progress, recorded_passes, view};
use llmpress_validation::{
    Comparison, DigestReport, LogitComparison, Quantised, bit_exact, in_one_basis, logits_exact,
    verify_digests,
};
use serde::Serialize;

use crate::Outcome;
use crate::args::{BosChoice, ProtocolArgs, VerifyArgs};
use crate::eval::Text;
use crate::models::{Loaded, in_pool};
use crate::passes::describe;
use crate::progress::Bar;
use crate::report::{Failure, Output, bytes, table};

/// Tokens that both models generate.
const GREEDY_TOKENS: usize = 32;

pub(crate) fn run(args: &VerifyArgs, output: Output) -> Outcome {
    in_pool(args.jobs, || verify(args, output))
}

/// What was checked, for `--json`.
#[derive(Serialize)]
struct Report {
    #[serde(skip_serializing_if = "Option::is_none")]
    digests: Option<DigestReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    comparison: Option<Comparison>,
    #[serde(skip_serializing_if = "Option::is_none")]
    logits: Option<LogitComparison>,
}

fn verify(args: &VerifyArgs, output: Output) -> Outcome {
    let mut report = Report { digests: None, comparison: None, logits: None };
    let mut found = String::new();
    let mut faults = 0;
    // Against a source every tensor is decoded anyway; its digests are checked if there are any.
    let manifest = Manifest::read(&args.dir)?;
    let base = base(args, manifest.as_ref())?;
    if manifest.is_some() || args.against.is_none() {
        let decode = !args.no_decode && args.against.is_none();
        let stored = manifest.iter().flat_map(|m| m.shards.values()).map(|s| s.bytes);
        let decoded =
            manifest.iter().flat_map(|m| m.tensors.values()).filter_map(|t| t.dtype.byte_len(&t.shape));
        let total = stored.chain(decoded.filter(|_| decode)).fold(0, u64::saturating_add);
        let bar = Bar::new("verify", total, output);
        let digests = verify_digests(&args.dir, decode, base.as_ref(), &|n| bar.advance(n));
        let seconds = bar.finish();
        let digests = digests?;
        faults += digests.faults.len();
        found.push_str(&digests_text(args, &digests, seconds));
        report.digests = Some(digests);
    }
    // A damaged directory need not open: its faults are reported all the same.
    if let Some(against) = args.against.as_ref().filter(|_| faults == 0) {
        let mut checkpoint = Checkpoint::open_plain(&args.dir)?;
        if let Some(base) = &base {
            checkpoint = checkpoint.with_base(base)?;
        }
        let passes = match &manifest {
            Some(manifest) => recorded_passes(&manifest.recipe)?,
            None => Vec::new(),
        };
        let source = view(source(&checkpoint, against)?, &passes)?;
        if !passes.is_empty() {
            let done: Vec<String> = passes.iter().map(describe).collect();
            let dropped = source.dropped().len();
            found.push_str(&format!(
                "{}; {dropped} tensors of {} are gone\n",
                done.join("; "),
                against.display()
            ));
        }
        let (checkpoint, source) = in_one_basis(checkpoint, source)?;
        let decoded = checkpoint.tensors().values().map(|t| t.bytes).sum();
        let bar = Bar::new("compare", decoded, output);
        let comparison = bit_exact(&checkpoint, &source, &|n| bar.advance(n));
        let seconds = bar.finish();
        let comparison = comparison?;
        faults += comparison.differences.len();
        found.push_str(&comparison_text(args, against, &comparison, seconds));
        report.comparison = Some(comparison);
        let quantised = report.comparison.as_ref().is_some_and(|c| c.quantised.is_some());
        if quantised && args.text.is_some() {
            return Err(llmpress_formats::Error::Invalid(format!(
                "{}: tensors are {}, so no logit can be the same: leave --logits out; eval kld says how far they are",
                args.dir.display(),
                report.comparison.as_ref().and_then(|c| c.quantised.as_ref()).map_or_else(|| "quantised".to_owned(), what_was_done)
            ))
            .into());
        }
        // Other weights would only be found once more.
        if let Some(text) = args.text.as_ref().filter(|_| faults == 0) {
            let (comparison, line) = logits(args, against, &passes, text, output)?;
            faults += usize::from(!comparison.is_exact());
            report.logits = Some(comparison);
            found.push_str(&line);
        }
    }
    output.result(&report, || found);
    if faults > 0 {
        return Err(Failure::Findings(format!("{}: {faults} faults were found", args.dir.display())));
    }
    Ok(())
}

/// The base, where the checkpoint is stored by one and is to be decoded.
fn base(args: &VerifyArgs, manifest: Option<&Manifest>) -> Result<Option<Base>, Failure> {
    let of = manifest.and_then(|manifest| manifest.base.as_ref());
    match (&args.base, of) {
        (Some(base), Some(_)) => Ok(Some(Base::open(base)?)),
        (None, None) => Ok(None),
        (None, Some(_)) if args.no_decode => Ok(None),
        (None, Some(of)) => Err(llmpress_formats::Error::Invalid(format!(
            "{}: is stored as its difference from {} (BLAKE3 of its tensors {}): say with --base DIR where that checkpoint is, or \
             check the stored bytes alone with --no-decode",
            args.dir.display(),
            of.name,
            of.blake3
        ))
        .into()),
        (Some(_), None) => Err(llmpress_formats::Error::Invalid(format!(
            "{}: is not stored as its difference from another checkpoint: leave --base out",
            args.dir.display()
        ))
        .into()),
    }
}

/// Runs both models on a text.
fn logits(
    args: &VerifyArgs,
    against: &Path,
    passes: &[Pass],
    path: &Path,
    output: Output,
) -> Result<(LogitComparison, String), Failure> {
    let (model, source) = (
        Loaded::open(&args.dir, args.device, output)?,
        // What was pruned away is left out of both.
        Loaded::after(against, args.device, passes, output)?,
    );
    let protocol = ProtocolArgs {
        text: path.to_owned(),
        window: args.window,
        stride: None,
        limit: args.limit,
        bos: BosChoice::Auto,
        batch: None,
        jobs: args.jobs,
        device: args.device,
    };
    let text = Text::read(path, &source, &protocol, output)?;
    let bar = Bar::of("logits", text.windows as u64, Counted::Windows, output);
    let result =
        logits_exact(&*model.model, &*source.model, &text.ids, text.protocol, GREEDY_TOKENS, &mut |_| {
            bar.advance(1)
        });
    let seconds = bar.finish();
    let result = result?;
    let mut lines = String::new();
    if let Some((window, position, id)) = result.first {
        lines.push_str(&format!(
            "DIFFERS {} logits, the first that of token id {id} after position {position} of window {window}\n",
            result.differing
        ));
    }
    if let Some(token) = result.first_generated {
        lines.push_str(&format!("DIFFERS greedy token {token}\n"));
    }
    lines.push_str(&format!(
        "{} and {}: {} logits on {}, {} greedy tokens in {seconds:.2} s: {}\n",
        args.dir.display(),
        against.display(),
        result.logits,
        text.describe(),
        result.generated,
        if result.is_exact() { "bit-identical" } else { "THEY DIFFER" },
    ));
    Ok((result, lines))
}

fn digests_text(args: &VerifyArgs, report: &DigestReport, seconds: f64) -> String {
    let mut text = String::new();
    for fault in &report.faults {
        let tensor = fault.tensor.as_ref().map(|t| format!(": {t}")).unwrap_or_default();
        text.push_str(&format!("FAULT {}\n", printable(&format!("{}{tensor}: {}", fault.file, fault.what))));
    }
    for file in &report.unknown_files {
        text.push_str(&format!("unknown file, not checked: {}\n", printable(file)));
    }
    let found = match report.faults.len() {
        0 => "every digest is right".to_owned(),
        n => format!("{n} FAULTS"),
    };
    text.push_str(&format!(
        "{}: {} files, {} components, {} tensors decoded, {} in {seconds:.2} s: {found}\n",
        args.dir.display(),
        report.files,
        report.components,
        report.decoded,
        bytes(report.bytes),
    ));
    text
}

/// A source as the directory under test took it: matrices of other tools as they are stored, where it holds them so.
fn source(checkpoint: &Checkpoint, against: &Path) -> Result<Checkpoint, llmpress_formats::Error> {
    let (plain, numbers) = (Checkpoint::open(against)?, Checkpoint::open_dequantised(against)?);
    let packed =
        |name: &String| !numbers.tensors().contains_key(name) && checkpoint.tensors().contains_key(name);
    Ok(if plain.tensors().keys().any(packed) { plain } else { numbers })
}

fn comparison_text(args: &VerifyArgs, against: &Path, comparison: &Comparison, seconds: f64) -> String {
    let mut text = String::new();
    for difference in &comparison.differences {
        text.push_str(&format!("DIFFERS {}: {}\n", printable(&difference.tensor), difference.what));
    }
    let quantised = comparison.quantised.as_ref();
    if let Some(quantised) = quantised {
        text.push_str(&errors_table(quantised));
    }
    let found = match (comparison.differences.len(), quantised) {
        (0, None) => "bit-identical".to_owned(),
        (0, Some(quantised)) => {
            let exact = comparison.tensors - quantised.tensors.len();
            let relative = quantised.total.relative.map_or_else(|| "-".to_owned(), |r| format!("{r:.5}"));
            format!(
                "{exact} bit-identical, {} {} with a relative error of {relative}",
                quantised.tensors.len(),
                what_was_done(quantised)
            )
        }
        (n, _) => format!("{n} DIFFER"),
    };
    text.push_str(&format!(
        "{} and {}: {} tensors, {} in {seconds:.2} s: {found}\n",
        args.dir.display(),
        against.display(),
        comparison.tensors,
        bytes(comparison.bytes),
    ));
    text
}

/// What became of the tensors that are not what they were.
fn what_was_done(all: &Quantised) -> String {
    let quantised = all.tensors.len().saturating_sub(all.sparse).saturating_sub(all.trained);
    let kinds = [(quantised, "quantised"), (all.sparse, "made 2:4"), (all.trained, "trained")];
    let there: Vec<&str> = kinds.into_iter().filter(|(count, _)| *count > 0).map(|(_, what)| what).collect();
    match there.split_last() {
        Some((last, [])) => (*last).to_owned(),
        Some((last, others)) => format!("{} or {last}", others.join(", ")),
        None => String::new(),
    }
}

/// How far each quantised tensor is from what it was.
fn errors_table(quantised: &Quantised) -> String {
    let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |v| format!("{v:.3e}"));
    let mut rows =
        vec![[&what_was_done(quantised), "relative error", "max abs", "rms"].map(str::to_owned).to_vec()];
    let all = quantised.tensors.iter().map(|t| (printable(&t.tensor).to_string(), &t.norms));
    for (name, norms) in all.chain([("all".to_owned(), &quantised.total)]) {
        rows.push(vec![name, number(norms.relative), number(norms.max_abs), number(norms.rms)]);
    }
    table(&rows)
}
