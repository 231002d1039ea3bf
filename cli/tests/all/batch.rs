//! Several prompts and several windows at once, from the command line.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use crate::support::{fails, ok, path, run, tinylm};
use serde_json::Value;

const PROMPTS: [&str; 3] = ["It is a truth", "Once", "The state of the world was"];

fn json(args: &[&str]) -> Value {
    let args: Vec<&str> = args.iter().copied().chain(["--json"]).collect();
    serde_json::from_str(&ok(&args)).unwrap()
}

#[test]
fn prompts_at_once_give_the_texts_of_one_by_one() {
    let model = tinylm();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("prompts.txt");
    std::fs::write(&file, format!("{}\n\n  \n{}\n", PROMPTS[1], PROMPTS[2])).unwrap();
    for drawn in [vec![], vec!["--temperature", "0.9", "--seed", "5"]] {
        let with = |more: &[&str]| -> Vec<String> {
            let base = ["generate", path(&model), "-n", "8"].into_iter();
            base.chain(drawn.iter().copied()).chain(more.iter().copied()).map(str::to_owned).collect()
        };
        let json = |more: &[&str]| json(&with(more).iter().map(String::as_str).collect::<Vec<_>>());
        let one_by_one: Vec<Value> = PROMPTS.iter().map(|prompt| json(&["--prompt", prompt])).collect();
        for batch in [vec![], vec!["--batch", "1"], vec!["--batch", "2"]] {
            let args = [&["-p", PROMPTS[0], "--prompts", path(&file)], &batch[..]].concat();
            let all = json(&args);
            let found = all["prompts"].as_array().unwrap();
            assert_eq!(found.len(), 3);
            for (found, expected) in found.iter().zip(&one_by_one) {
                for key in ["prompt_tokens", "tokens", "text", "stopped_by"] {
                    assert_eq!(found[key], expected[key], "{batch:?}");
                }
            }
            assert!(all["tokens_per_second"].as_f64().unwrap() > 0.0);
        }
    }
    let text = ok(&["generate", path(&model), "-n", "2", "-p", PROMPTS[0], "-p", PROMPTS[1]]);
    assert!(text.starts_with("--- 1\n") && text.contains("\n--- 2\n"), "{text}");
}

#[test]
fn wrong_batches_and_prompts_are_refused() {
    let model = tinylm();
    let dir = tempfile::tempdir().unwrap();
    let empty = dir.path().join("empty.txt");
    std::fs::write(&empty, "\n \n").unwrap();
    assert!(fails(&["generate", path(&model), "--prompts", path(&empty)]).contains("holds no prompts"));
    let usage = |args: &[&str]| {
        let output = run(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert!(usage(&["generate", path(&model)]).contains("--prompt"));
    usage(&["generate", path(&model), "-p", "x", "--batch", "0"]);
    let text = model.join("eval.txt");
    let eval = ["eval", "ppl", path(&model), "--text", path(&text), "--limit", "1"];
    assert!(usage(&[&eval[..], &["--batch", "2"]].concat()).contains("--device cuda"));
    ok(&[&eval[..], &["--batch", "1"]].concat());
}
