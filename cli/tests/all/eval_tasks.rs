//! Questions put to a model at the program, and to its base.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;

use crate::support::{fails, ok, path, tinylm};
use llmpress_formats::Checkpoint;
use llmpress_model::{Model, Skips, Tokenizer, Unobserved};
use serde_json::{Value, json};

fn eval(args: &[&str]) -> Value {
    let args: Vec<&str> =
        ["eval", "tasks"].into_iter().chain(args.iter().copied()).chain(["--json"]).collect();
    serde_json::from_str(&ok(&args)).unwrap()
}

/// Questions of different lengths, made from the text of tinylm.
fn questions(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(tinylm().join("eval.txt")).unwrap();
    let words: Vec<&str> = text.split_whitespace().collect();
    let run = |first: usize, count: usize| words[first..first + count].join(" ");
    let mut all = Vec::new();
    for i in 0..12 {
        let (first, context) = (100 + 211 * i, 5 + 7 * (i % 4));
        let mut choices: Vec<String> =
            (0..3).map(|other| run(5000 + 97 * (3 * i + other), 2 + other)).collect();
        choices.insert(i % 4, run(first + context, 3));
        all.push(json!({"context": run(first, context), "choices": choices, "answer": i % 4, "id": i}));
        all.push(json!({"text": run(first, 20), "target": run(first + 20, 1)}));
    }
    let lines: Vec<String> = all.iter().map(Value::to_string).collect();
    std::fs::write(path, lines.join("\n")).unwrap();
    all
}

/// The sum of the log-probabilities of an ending, and whether all of it is likeliest: one token after the other, by the definition.
fn by_definition(model: &Model, tokenizer: &Tokenizer, context: &str, ending: &str) -> (f64, bool) {
    let before = tokenizer.encode(context).unwrap();
    let whole = tokenizer.encode(&format!("{context} {ending}")).unwrap();
    let ids: Vec<u32> = before.iter().chain(&whole[before.len()..]).copied().collect();
    let mut cache = model.cache(ids.len());
    let hidden = model.hidden(&ids, &mut cache, &Skips::new(), &mut Unobserved).unwrap();
    let logits = model.logits(&hidden).unwrap();
    let (mut sum, mut greedy) = (0.0, true);
    for at in before.len()..ids.len() {
        let row: Vec<f64> = logits.token(at - 1).map(f64::from).collect();
        let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let all = largest + row.iter().map(|x| (x - largest).exp()).sum::<f64>().ln();
        sum += row[ids[at] as usize] - all;
        greedy &= row[ids[at] as usize] == largest;
    }
    (sum, greedy)
}

#[test]
fn answers_are_those_of_the_definition() {
    let dir = tempfile::tempdir().unwrap();
    let (data, answers) = (dir.path().join("set.jsonl"), dir.path().join("answers.jsonl"));
    let set = questions(&data);
    let report = eval(&[path(&tinylm()), "--data", path(&data), "--answers", path(&answers)]);
    let model = Model::open(Arc::new(Checkpoint::open(&tinylm()).unwrap())).unwrap();
    let tokenizer = Tokenizer::open(&tinylm()).unwrap();
    let lines = std::fs::read_to_string(&answers).unwrap();
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), set.len());
    let (mut right, mut normalised, mut said) = (0, 0, 0);
    for (question, line) in set.iter().zip(&lines) {
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let (context, endings) = match question.get("choices") {
            Some(choices) => (&question["context"], choices.as_array().unwrap().iter().map(text).collect()),
            None => (&question["text"], vec![text(&question["target"])]),
        };
        let mut scores = Vec::new();
        for (number, ending) in endings.iter().enumerate() {
            let (sum, greedy) = by_definition(&model, &tokenizer, context.as_str().unwrap(), ending);
            let found = line["model"]["log_likelihoods"][number].as_f64().unwrap();
            assert!((found - sum).abs() < 1e-4 * (1.0 + sum.abs()), "{found} {sum}");
            assert_eq!(line["model"]["greedy"][number], greedy);
            scores.push((sum, sum / ending.chars().count() as f64, greedy));
        }
        let best = |of: fn(&(f64, f64, bool)) -> f64| {
            (0..scores.len()).max_by(|a, b| of(&scores[*a]).total_cmp(&of(&scores[*b]))).unwrap()
        };
        if let Some(answer) = question.get("answer") {
            right += usize::from(best(|s| s.0) as u64 == answer.as_u64().unwrap());
            normalised += usize::from(best(|s| s.1) as u64 == answer.as_u64().unwrap());
        } else {
            said += usize::from(scores[0].2);
        }
    }
    let share = |value: &Value, of: usize| {
        assert!((value["value"].as_f64().unwrap() - of as f64 / 12.0).abs() < 1e-9)
    };
    share(&report["choice"]["accuracy"], right);
    share(&report["choice"]["accuracy_normalised"], normalised);
    share(&report["cloze"]["accuracy"], said);
    let p = right as f64 / 12.0;
    let error = (p * (1.0 - p) / 11.0).sqrt();
    assert!((report["choice"]["accuracy"]["standard_error"].as_f64().unwrap() - error).abs() < 1e-9);
}

#[test]
fn a_base_says_which_answers_changed() {
    let dir = tempfile::tempdir().unwrap();
    let (data, out) = (dir.path().join("set.jsonl"), dir.path().join("out"));
    questions(&data);
    ok(&["convert", path(&tinylm()), path(&out), "--to", "rtn:w2,g128"]);
    let source = tinylm();
    let same = eval(&[path(&source), "--data", path(&data), "--base", path(&source)]);
    assert_eq!(same["base"]["flips"]["choice"]["changed"], 0);
    assert_eq!(same["base"]["choice"], same["choice"]);
    let report = eval(&[path(&out), "--data", path(&data), "--base", path(&source), "--limit", "20"]);
    assert_eq!((&report["questions"], &report["choice"]["questions"]), (&json!(20), &json!(10)));
    let mut changed = 0;
    for (part, accuracy) in
        [("choice", "accuracy"), ("choice_normalised", "accuracy_normalised"), ("cloze", "accuracy")]
    {
        let flips = |name: &str| report["base"]["flips"][part][name].as_i64().unwrap();
        let kind = part.split('_').next().unwrap();
        let right = |of: &Value| (of[kind][accuracy]["value"].as_f64().unwrap() * 10.0).round() as i64;
        assert_eq!(right(&report) - right(&report["base"]), flips("to_right") - flips("to_wrong"), "{part}");
        assert!(flips("changed") >= flips("to_right") + flips("to_wrong"));
        changed += flips("changed");
    }
    assert!(changed > 0, "two bits by rounding change something");
    let text =
        ok(&["eval", "tasks", path(&out), "--data", path(&data), "--base", path(&source), "--limit", "4"]);
    assert!(text.contains("accuracy of 2 questions") && text.contains("to wrong"), "{text}");
}

#[test]
fn the_threads_and_the_order_of_questions_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (data, turned) = (dir.path().join("set.jsonl"), dir.path().join("turned.jsonl"));
    let mut set = questions(&data);
    let answers = |data: &Path, jobs: &str| {
        let out = dir.path().join("answers");
        eval(&[path(&tinylm()), "--data", path(data), "--answers", path(&out), "--jobs", jobs]);
        let lines = std::fs::read_to_string(out).unwrap();
        lines
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap()["model"].clone())
            .collect::<Vec<Value>>()
    };
    let one = answers(&data, "1");
    assert_eq!(one, answers(&data, "3"));
    set.reverse();
    let lines: Vec<String> = set.iter().map(Value::to_string).collect();
    std::fs::write(&turned, lines.join("\n")).unwrap();
    assert!(one.iter().eq(answers(&turned, "2").iter().rev()));
}

#[test]
fn contexts_that_are_too_long_lose_their_beginning_and_none_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("set.jsonl");
    let long = "word ".repeat(3000);
    std::fs::write(&data, json!({"context": long, "choices": ["word", "king"], "answer": 0}).to_string())
        .unwrap();
    let report = eval(&[path(&tinylm()), "--data", path(&data)]);
    assert_eq!((&report["cut"], &report["choice"]["accuracy"]["value"]), (&json!(1), &json!(1.0)));
    std::fs::write(&data, "{\"text\": \"\", \"target\": \"a\"}").unwrap();
    let error = fails(&["eval", "tasks", path(&tinylm()), "--data", path(&data), "--bos", "never"]);
    assert!(error.contains("question 1") && error.contains("nothing stands before"), "{error}");
    std::fs::write(&data, "{\"text\": 1, \"target\": \"a\"}").unwrap();
    let error = fails(&["eval", "tasks", path(&tinylm()), "--data", path(&data)]);
    assert!(error.contains("set.jsonl") && error.contains("line 1"), "{error}");
}
