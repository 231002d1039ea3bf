//! Learning at the program: what is told on the way, the record, and a loss that is no number.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::Path;

use crate::support::{ok, path, run, tinylm};
use serde_json::Value;

/// Few and short windows: no text to learn from, but learning goes the whole way.
const SHORT: [&str; 4] = ["--calib-windows", "16", "--calib-window", "16"];

fn convert<'a>(model: &'a Path, out: &'a Path, calib: &'a Path, to: &'a str) -> Vec<&'a str> {
    [&["convert", path(model), path(out), "--to", to, "--calib", path(calib)], &SHORT[..]].concat()
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for file in std::fs::read_dir(from).unwrap().map(|f| f.unwrap().path()).filter(|f| f.is_file()) {
        std::fs::copy(&file, to.join(file.file_name().unwrap())).unwrap();
    }
}

#[test]
fn each_loss_is_told_with_its_block_as_text_and_as_objects_and_kept_in_a_record() {
    let dir = tempfile::tempdir().unwrap();
    let (model, calib) = (tinylm(), tinylm().join("calib.txt"));
    let (out, other) = (dir.path().join("out"), dir.path().join("other"));
    // One matrix by itself: it quantises what it shares to other bits.
    let rule = ["--rule", r"model\.layers\.7\.mlp\.up_proj\.weight=gptq:w2,learn,steps=2"];
    let args = [&convert(&model, &out, &calib, "gptq:w2a8,learn,steps=2")[..], &rule].concat();
    let output = run(&args);
    assert!(output.status.success());
    let text = String::from_utf8(output.stderr).unwrap();
    for what in
        ["layer 1 of 8: attention: loss 0.", "layer 8 of 8: model.layers.7.mlp.up_proj.weight: loss 0."]
    {
        assert!(text.contains(what), "{what}: {text}");
    }
    let args = [&convert(&model, &other, &calib, "gptq:w2a8,learn,steps=2")[..], &rule, &["--json"]].concat();
    let output = run(&args);
    assert!(output.status.success());
    let told = String::from_utf8(output.stderr).unwrap();
    let told: Vec<Value> = told.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    // Attention and MLP of eight layers, the last MLP as three matrices.
    assert_eq!(told.len(), 18);
    let done = told.iter().map(|line| line["done"].as_f64().unwrap());
    assert!(done.clone().is_sorted() && done.clone().all(|done| (0.0..=1.0).contains(&done)));
    let record = std::fs::read_to_string(other.join("learning.jsonl")).unwrap();
    let record: Vec<Value> = record.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(told.iter().all(|line| line["layers"] == 8));
    assert_eq!(told.iter().map(|line| line["learned"].clone()).collect::<Vec<_>>(), record);
    let matrices: Vec<&Value> = record.iter().filter(|line| line["what"] == "matrix").collect();
    assert_eq!(matrices.len(), 3);
    assert!(matrices.iter().all(|line| line["after"].as_f64() <= line["before"].as_f64()));
    for picture in ["learning-loss.svg", "learning-error.svg"] {
        let svg = std::fs::read_to_string(out.join(picture)).unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("layer"), "{picture}");
        assert!(std::fs::read_to_string(other.join(picture)).unwrap() == svg, "{picture}");
    }
    assert!(ok(&["verify", path(&out)]).contains("every digest is right"));
    // Checked like any other file.
    std::fs::write(out.join("learning.jsonl"), "").unwrap();
    let damaged = run(&["verify", path(&out)]);
    let damaged = String::from_utf8_lossy(&damaged.stdout).into_owned();
    assert!(damaged.contains("learning.jsonl"), "{damaged}");
}

#[test]
fn a_loss_that_is_no_number_keeps_the_start_and_the_summary_names_block_and_setting() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out, same) = (dir.path().join("model"), dir.path().join("out"), dir.path().join("same"));
    copy(&tinylm(), &model);
    // The last MLP overflows: each of its outputs is a sum of numbers of 1e38.
    let shard = model.join("model.safetensors");
    let down = "model.layers.7.mlp.down_proj.weight";
    let component = {
        let file = llmpress_formats::ShardFile::open(&shard).unwrap();
        let component = file.component(file.header().get(down).unwrap());
        (component.file_offset() as usize, component.bytes() as usize)
    };
    let mut bytes = std::fs::read(&shard).unwrap();
    for weight in bytes[component.0..][..component.1].chunks_exact_mut(2) {
        let bits = u16::from_le_bytes([weight[0], weight[1]]);
        weight.copy_from_slice(&((bits & 0x807f) | 253 << 7).to_le_bytes());
    }
    std::fs::write(&shard, bytes).unwrap();
    let calib = tinylm().join("calib.txt");
    let summary = ok(&convert(&model, &out, &calib, "gptq:w2,learn,steps=2,seed=5"));
    for words in [
        "not as asked for: model.layers.7.mlp.down_proj.weight: as gptq left it",
        "learning the MLP of layer 7 was NaN or infinite at the start (steps=2, seed=5)",
    ] {
        assert!(summary.contains(words), "{summary}");
    }
    assert!(!summary.contains("model.layers.6"), "{summary}");
    let record = std::fs::read_to_string(out.join("learning.jsonl")).unwrap();
    let last: Value = serde_json::from_str(record.lines().last().unwrap()).unwrap();
    assert!(last["before"].is_null() && last["after"].is_null() && last["taken"] == false, "{last}");
    // Its start: what plain error feedback makes of it after the same blocks.
    let rule = r".*layers\.7\.mlp\..*=gptq:w2";
    let args = convert(&model, &same, &calib, "gptq:w2,learn,steps=2,seed=5");
    ok(&[&args[..], &["--rule", rule]].concat());
    let [a, b] = [&out, &same].map(|dir| llmpress_formats::Checkpoint::open(dir).unwrap());
    for name in ["gate", "up", "down"].map(|name| format!("model.layers.7.mlp.{name}_proj.weight")) {
        for component in a.units()[&name].components().keys() {
            assert!(a.view(&name, component).unwrap() == b.view(&name, component).unwrap(), "{name}");
        }
    }
}

#[test]
fn a_rule_that_matches_nothing_is_refused_before_an_output_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out, calib) = (tinylm(), dir.path().join("out"), tinylm().join("calib.txt"));
    for to in ["gptq:w2", "rtn:w4", "drop:attn=1", "drop:attn=1+rtn:w4", "planes"] {
        let mut args = vec!["convert", path(&model), path(&out), "--to", to, "--rule", "nothing.*=raw"];
        if to != "rtn:w4" && to != "planes" {
            args.extend([&["--calib", path(&calib)], &SHORT[..]].concat());
        }
        let output = run(&args);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(error.contains("nothing.*") && error.contains("matches no tensor"), "{to}: {error}");
        assert!(!output.status.success() && !out.exists(), "{to}");
    }
}
