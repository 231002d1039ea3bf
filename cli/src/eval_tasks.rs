//! `llmpress eval tasks`: which answers a model gives to questions, beside its base.

use llmpress_formats::write_atomic;
use llmpress_model::{Skips, Tokenizer};
use llmpress_pipeline::{Counted, Progress};
use llmpress_validation::{Flips, Question, Scored, Share, TaskFlips, TaskReport, flips, score, task_report};
use serde::Serialize;
use serde_json::{Value, json};

use crate::Outcome;
use crate::args::{BosChoice, TasksArgs};
use crate::models::{Loaded, check_batch};
use crate::progress::Bar;
use crate::report::{Failure, Output, bytes, table};
use crate::text::read_text;

/// A result and what it was measured on.
#[derive(Serialize)]
struct Report {
    model: String,
    data: String,
    questions: usize,
    bos: Option<u32>,
    #[serde(flatten)]
    result: TaskReport,
    #[serde(skip_serializing_if = "Option::is_none")]
    base: Option<Base>,
    seconds: f64,
    peak_memory_bytes: u64,
}

/// What a base answers, and what became of that.
#[derive(Serialize)]
struct Base {
    model: String,
    #[serde(flatten)]
    result: TaskReport,
    flips: TaskFlips,
}

pub(crate) fn run(args: &TasksArgs, output: Output) -> Outcome {
    check_batch(args.device.device, args.batch)?;
    let mut questions = Question::read_all(&args.data, &read_text(&args.data)?)?;
    questions.truncate(args.limit.unwrap_or(usize::MAX));
    let model = Loaded::open(&args.model, args.device, output)?;
    let base = args.base.as_ref().map(|dir| Loaded::open(dir, args.device, output)).transpose()?;
    // The base's tokenizer: the question is what became of the base.
    let tokenizer = base.as_ref().map_or(&model.tokenizer, |base| &base.tokenizer);
    let bos = match args.bos {
        BosChoice::Auto => tokenizer.bos().filter(|_| tokenizer.adds_bos()),
        BosChoice::Never => None,
    };
    let endings: usize = questions.iter().map(Question::count).sum();
    let models = 1 + usize::from(base.is_some());
    let bar = Bar::of("tasks", (endings * models) as u64, Counted::Endings, output);
    let ask = |of: &Loaded| ask(of, tokenizer, bos, &questions, args.batch, &bar);
    let scored = ask(&model).and_then(|scored| Ok((scored, base.as_ref().map(ask).transpose()?)));
    let seconds = bar.finish();
    let (scored, of_base) = scored?;
    if let Some(path) = &args.answers {
        write_answers(path, &questions, &scored, of_base.as_deref())?;
    }
    let base = args.base.as_ref().zip(of_base.as_ref()).map(|(dir, of_base)| Base {
        model: dir.display().to_string(),
        result: task_report(&questions, of_base),
        flips: flips(&questions, of_base, &scored),
    });
    let report = Report {
        model: args.model.display().to_string(),
        data: args.data.display().to_string(),
        questions: questions.len(),
        bos,
        result: task_report(&questions, &scored),
        base,
        seconds,
        peak_memory_bytes: crate::memory::peak().unwrap_or(0),
    };
    output.result(&report, || text(&report));
    Ok(())
}

fn ask(
    of: &Loaded,
    tokenizer: &Tokenizer,
    bos: Option<u32>,
    questions: &[Question],
    batch: Option<usize>,
    bar: &Bar,
) -> Result<Vec<Scored>, Failure> {
    Ok(score(&*of.model, &Skips::new(), tokenizer, bos, questions, batch, &mut |_| bar.advance(1))?)
}

/// A line a question: what each model makes of its endings.
fn write_answers(
    path: &std::path::Path,
    questions: &[Question],
    scored: &[Scored],
    base: Option<&[Scored]>,
) -> Result<(), Failure> {
    let of = |scored: &Scored| json!({"log_likelihoods": scored.log_likelihoods, "greedy": scored.greedy});
    let mut lines = String::new();
    for (number, scored) in scored.iter().enumerate().take(questions.len()) {
        let mut line = json!({"question": number, "model": of(scored)});
        if let (Some(base), Value::Object(line)) = (base.and_then(|base| base.get(number)), &mut line) {
            line.insert("base".to_owned(), of(base));
        }
        lines.push_str(&line.to_string());
        lines.push('\n');
    }
    Ok(write_atomic(path, lines.as_bytes())?)
}

/// A report for people.
fn text(report: &Report) -> String {
    let share =
        |share: &Share| format!("{:.2} +- {:.2} %", 100.0 * share.value, 100.0 * share.standard_error);
    let head = ["", "model", "base", "answers changed", "to right", "to wrong"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    let mut row = |name: &str, model: String, base: Option<(String, Option<Flips>)>| {
        let (base, flips) = base.unwrap_or_default();
        let count =
            |of: fn(&Flips) -> usize| flips.as_ref().map(|flips| of(flips).to_string()).unwrap_or_default();
        rows.push(vec![
            name.to_owned(),
            model,
            base,
            count(|f| f.changed),
            count(|f| f.to_right),
            count(|f| f.to_wrong),
        ]);
    };
    let base = report.base.as_ref();
    if let Some(choice) = &report.result.choice {
        let of = base.and_then(|base| Some((base.result.choice.as_ref()?, base.flips)));
        row(
            &format!("accuracy of {} questions", choice.questions),
            share(&choice.accuracy),
            of.map(|(base, flips)| (share(&base.accuracy), Some(flips.choice))),
        );
        row(
            "by likelihood a character",
            share(&choice.accuracy_normalised),
            of.map(|(base, flips)| (share(&base.accuracy_normalised), Some(flips.choice_normalised))),
        );
    }
    if let Some(cloze) = &report.result.cloze {
        let of = base.and_then(|base| Some((base.result.cloze.as_ref()?, base.flips)));
        row(
            &format!("accuracy of {} texts to go on from", cloze.questions),
            share(&cloze.accuracy),
            of.map(|(base, flips)| (share(&base.accuracy), Some(flips.cloze))),
        );
        let perplexity = |perplexity: f64, error: f64| format!("{perplexity:.4} +- {error:.4}");
        row(
            "perplexity of what comes",
            perplexity(cloze.perplexity, cloze.perplexity_standard_error),
            of.map(|(base, _)| (perplexity(base.perplexity, base.perplexity_standard_error), None)),
        );
    }
    if base.is_none() {
        rows.iter_mut().for_each(|row| row.truncate(2));
    }
    let against = base.map(|base| format!(" against {}", base.model)).unwrap_or_default();
    let cut = match report.result.cut {
        0 => String::new(),
        cut => format!("{cut} contexts were longer than the model was made for and lost their beginnings\n"),
    };
    format!(
        "{}{against} on {}, {} questions\n\n{}\n{cut}{:.1} s, peak memory {}\n",
        report.model,
        report.data,
        report.questions,
        table(&rows),
        report.seconds,
        bytes(report.peak_memory_bytes),
    )
}
