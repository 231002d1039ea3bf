//! Quantised checkpoints at the program: made, looked at, verified, restored, run.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use crate::support::{self, fails, ok, path, tinylm};
#[test]
fn a_quantised_model_is_verified_by_its_errors_restored_and_run() {
    let dir = tempfile::tempdir().unwrap();
    let (out, back, source) = (dir.path().join("out"), dir.path().join("back"), tinylm());
    ok(&["convert", path(&source), path(&out), "--to", "rtn:w8,g128+planes"]);
    assert!(ok(&["verify", path(&out)]).contains("every digest is right"));
    let found = ok(&["verify", path(&out), "--against", path(&source)]);
    assert!(found.contains("19 bit-identical, 56 quantised with a relative error of 0.00"), "{found}");
    assert!(found.contains("model.layers.7.mlp.down_proj.weight"), "{found}");
    let json = ok(&["verify", path(&out), "--against", path(&source), "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let worst = &json["comparison"]["quantised"]["tensors"][0];
    assert!(worst["relative"].as_f64().unwrap() < 0.01 && worst["max_abs"].as_f64().unwrap() > 0.0);
    let inspected = ok(&["inspect", path(&out)]);
    assert!(inspected.contains("w8,g128") && inspected.contains("8.250"), "{inspected}");
    let rows: serde_json::Value =
        serde_json::from_str(&ok(&["inspect", path(&out), "--tensors", "--json"])).unwrap();
    assert_eq!(rows["quantised"]["w8,g128"]["weights"], 6_291_456);
    let of_q =
        rows["tensors"].as_array().unwrap().iter().find(|t| t["unit"].as_str().unwrap().contains("q_proj"));
    assert_eq!(of_q.unwrap()["bits_per_weight"], 8.25);
    ok(&["restore", path(&out), path(&back)]);
    assert!(ok(&["verify", path(&back), "--against", path(&out)]).contains("bit-identical"));
    let text = source.join("eval.txt");
    let perplexity = |model: &std::path::Path| -> f64 {
        let args =
            ["eval", "ppl", path(model), "--text", path(&text), "--window", "256", "--limit", "2", "--json"];
        serde_json::from_str::<serde_json::Value>(&ok(&args)).unwrap()["perplexity"].as_f64().unwrap()
    };
    let (base, quantised, dense) = (perplexity(&source), perplexity(&out), perplexity(&back));
    assert!((quantised / base - 1.0).abs() < 0.005, "{base} {quantised}");
    assert!((quantised / dense - 1.0).abs() < 0.001, "{dense} {quantised}");
    let refused = fails(&[
        "verify",
        path(&out),
        "--against",
        path(&source),
        "--logits",
        "--text",
        path(&text),
        "--limit",
        "1",
    ]);
    assert!(refused.contains("quantised") && refused.contains("eval kld"), "{refused}");
}

#[test]
fn a_rotated_model_is_verified_in_the_basis_of_its_source_restored_and_run() {
    let dir = tempfile::tempdir().unwrap();
    let (out, back, source) = (dir.path().join("out"), dir.path().join("back"), tinylm());
    let text = source.join("eval.txt");
    let calib = source.join("calib.txt");
    let to = "abq:w8a8,rotate,qkv8";
    let args = ["convert", path(&source), path(&out), "--to", to, "--calib", path(&calib)];
    ok(&[&args[..], &["--calib-windows", "8", "--calib-window", "64"]].concat());
    let found = ok(&["verify", path(&out), "--against", path(&source)]);
    // Norms were folded into what reads them, and are back but for rounding.
    assert!(found.contains("3 bit-identical, 72 quantised with a relative error of 0.0"), "{found}");
    let inspected = ok(&["inspect", path(&out)]);
    assert!(inspected.contains("rotation of down") && inspected.contains("quantize of qkv"), "{inspected}");
    ok(&["restore", path(&out), path(&back)]);
    let perplexity = |model: &std::path::Path| -> f64 {
        let args =
            ["eval", "ppl", path(model), "--text", path(&text), "--window", "256", "--limit", "2", "--json"];
        serde_json::from_str::<serde_json::Value>(&ok(&args)).unwrap()["perplexity"].as_f64().unwrap()
    };
    let (base, quantised, dense) = (perplexity(&source), perplexity(&out), perplexity(&back));
    assert!((quantised / base - 1.0).abs() < 0.01, "{base} {quantised}");
    assert!((dense / base - 1.0).abs() < 0.01, "{base} {dense}");
    // Only its own readers know what is to be done online.
    let export = dir.path().join("export");
    let refused = fails(&["export", path(&out), path(&export), "--as", "compressed-tensors"]);
    assert!(refused.contains("online transformation rotation of residual"), "{refused}");
    assert!(!export.exists());
}

#[test]
fn scales_that_are_learned_are_said_and_undone() {
    let dir = tempfile::tempdir().unwrap();
    let (out, back, source) = (dir.path().join("out"), dir.path().join("back"), tinylm());
    let (calib, text) = (source.join("calib.txt"), source.join("eval.txt"));
    let to = "abq:w2,learn=block,scale,steps=100";
    let args = ["convert", path(&source), path(&out), "--to", to, "--calib", path(&calib)];
    ok(&[&args[..], &["--calib-windows", "32", "--calib-window", "128"]].concat());
    let inspected = ok(&["inspect", path(&out)]);
    assert!(
        inspected.contains("scale of attention_norm") && inspected.contains("scale of up"),
        "{inspected}"
    );
    // Norms that were scaled are back but for rounding, and errors are those of the source's basis.
    let found = ok(&["verify", path(&out), "--against", path(&source)]);
    assert!(found.contains("quantised with a relative error of 0."), "{found}");
    ok(&["restore", path(&out), path(&back)]);
    let perplexity = |model: &std::path::Path| -> f64 {
        let args =
            ["eval", "ppl", path(model), "--text", path(&text), "--window", "256", "--limit", "2", "--json"];
        serde_json::from_str::<serde_json::Value>(&ok(&args)).unwrap()["perplexity"].as_f64().unwrap()
    };
    let (base, quantised, dense) = (perplexity(&source), perplexity(&out), perplexity(&back));
    assert!(quantised < 2.0 * base && (dense / quantised - 1.0).abs() < 0.01, "{base} {quantised} {dense}");
}

#[test]
fn epochs_and_seed_are_written_into_the_recipe_of_a_quantiser_that_learns() {
    let dir = tempfile::tempdir().unwrap();
    let (out, source) = (dir.path().join("out"), tinylm());
    let calib = source.join("calib.txt");
    let text = ["--calib", path(&calib), "--samples", "16", "--seq-len", "32"];
    let convert = |to: &'static str, more: &[&'static str]| -> Vec<&str> {
        [&["convert", path(&source), path(&out), "--to", to], &text[..], more].concat()
    };
    let refused = fails(&convert("rtn:w4", &["--epochs", "2"]));
    assert!(refused.contains("rtn:w4 learns nothing: say rtn:w4,learn"), "{refused}");
    let output = support::run(&convert("dfloat11", &["--epochs", "2"]));
    let refused = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(2) && refused.contains("for a quantiser that learns"), "{refused}");
    ok(&convert("abq:w4,learn,steps=7", &["--epochs", "2", "--seed", "5"]));
    let manifest = std::fs::read_to_string(out.join("llmpress.json")).unwrap();
    assert!(manifest.contains("gptq:w4,learn,epochs=2,seed=5"), "{manifest:.600}");
}

#[test]
fn a_lossless_tensor_that_differs_and_a_changed_code_are_faults() {
    let dir = tempfile::tempdir().unwrap();
    let (out, other, source) = (dir.path().join("out"), dir.path().join("other"), tinylm());
    ok(&["convert", path(&source), path(&out), "--to", "rtn:w4"]);
    std::fs::create_dir(&other).unwrap();
    for file in std::fs::read_dir(&source).unwrap().map(|f| f.unwrap().path()) {
        std::fs::copy(&file, other.join(file.file_name().unwrap())).unwrap();
    }
    let change = |file: &std::path::Path, tensor: &str| {
        let shard = llmpress_formats::ShardFile::open(file).unwrap();
        let at = shard.component(shard.header().get(tensor).unwrap()).file_offset() as usize;
        let mut bytes = std::fs::read(file).unwrap();
        bytes[at] ^= 1;
        std::fs::write(file, bytes).unwrap();
    };
    change(&other.join("model.safetensors"), "model.norm.weight");
    let output = support::run(&["verify", path(&out), "--against", path(&other)]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!output.status.success() && text.contains("DIFFERS model.norm.weight"), "{text}");
    change(&out.join("model-00001-of-00001.safetensors"), "model.layers.2.mlp.up_proj.weight.planes");
    let output = support::run(&["verify", path(&out)]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        !output.status.success() && text.contains("up_proj.weight.planes: its bytes were changed"),
        "{text}"
    );
    assert!(text.contains("does not decode to the bytes that it stands for"), "{text}");
}

#[test]
fn a_model_with_a_quantised_cache_says_what_it_takes_runs_and_stays_with_its_own_readers() {
    let dir = tempfile::tempdir().unwrap();
    let (out, source) = (dir.path().join("out"), tinylm());
    // Eight layers with two KV heads of 64 features: 64 / 2 + 5 bytes each.
    let line = "cache: keys and values in 4 bits, 1184 bytes a token";
    let planned = ok(&["plan", path(&source), "--to", "rtn:w8,kv4"]);
    assert!(planned.contains(line), "{planned}");
    ok(&["convert", path(&source), path(&out), "--to", "rtn:w8,kv4"]);
    let inspected = ok(&["inspect", path(&out)]);
    assert!(inspected.contains("quantize of cache") && inspected.contains(line), "{inspected}");
    let inspected: serde_json::Value = serde_json::from_str(&ok(&["inspect", path(&out), "--json"])).unwrap();
    assert_eq!(inspected["cache"], serde_json::json!({"bits": 4, "bytes_per_token": 1184}));
    assert!(!ok(&["inspect", path(&source)]).contains("cache:"));
    let text = source.join("eval.txt");
    let args = ["--text", path(&text), "--window", "256", "--limit", "2", "--json"];
    let found: serde_json::Value =
        serde_json::from_str(&ok(
            &[&["eval", "kld", path(&out), "--base", path(&source)][..], &args].concat()
        ))
        .unwrap();
    let kl = found["kl"]["mean"].as_f64().unwrap();
    assert!(kl > 1e-4 && kl < 0.1, "{found}");
    ok(&["generate", path(&out), "--prompt", "The", "-n", "4"]);
    let export = dir.path().join("export");
    let refused = fails(&["export", path(&out), path(&export), "--as", "compressed-tensors"]);
    assert!(refused.contains("online transformation quantize of cache"), "{refused}");
    ok(&["verify", path(&out), "--against", path(&source)]);
}

#[test]
fn widths_out_of_range_are_refused_as_they_are_read() {
    for (to, words) in [
        ("rtn:w9", "weights of 9 bits"),
        ("gptq:w4a12", "activations of 12 bits"),
        ("abq:w4,g48", "a multiple of 32"),
        ("abq:w3*", "w3*"),
        ("abq:w4,learn,scale", "say learn=block"),
        ("abq:w4,rotate=r5", "are no rotations"),
        ("abq:w4,qkv12", "qkv12"),
        ("abq:w4,kv6", "kv6"),
        ("abq:w4,smooth,rotate", "nothing to scale"),
        ("rtn:w4+rtn:w4", "two passes quantise"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let output = support::run(&["convert", path(&tinylm()), path(&out), "--to", to]);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && error.contains(words), "{to}: {error}");
        assert!(!out.exists());
    }
}

#[test]
fn a_rule_gives_a_tied_head_a_width_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let (out, same, source) = (dir.path().join("out"), dir.path().join("same"), tinylm());
    let rule = r"model\.embed_tokens\.weight=rtn:w8a8,g64";
    ok(&["convert", path(&source), path(&out), "--to", "rtn:w4a8,g128", "--rule", rule]);
    let recipe = dir.path().join("recipe.toml");
    let text = "passes = [\"rtn:w4a8,g128\"]\nto = \"raw\"\n[[rule]]\ntensors = 'model\\.embed_tokens\\.weight'\nto = \"rtn:w8a8,g64\"\n";
    std::fs::write(&recipe, text).unwrap();
    ok(&["convert", path(&source), path(&same), "--recipe", path(&recipe)]);
    for file in std::fs::read_dir(&same).unwrap().map(|file| file.unwrap()) {
        let name = file.file_name();
        assert!(std::fs::read(file.path()).unwrap() == std::fs::read(out.join(&name)).unwrap(), "{name:?}");
    }
    let rows: serde_json::Value =
        serde_json::from_str(&ok(&["inspect", path(&out), "--tensors", "--json"])).unwrap();
    let tensors = rows["tensors"].as_array().unwrap();
    let bits = |part: &str| {
        let found = tensors.iter().find(|t| t["name"].as_str().is_some_and(|name| name.contains(part)));
        found.unwrap_or_else(|| panic!("{part}: {tensors:?}"))["bits_per_weight"].as_f64().unwrap()
    };
    // Scales and offsets of 16 bits for every 64 and 128 weights.
    assert_eq!((bits("embed_tokens"), bits("layers.3.mlp.up_proj")), (8.5, 4.25));
    let file = source.join("eval.txt");
    let perplexity = |model: &std::path::Path| -> f64 {
        let args =
            ["eval", "ppl", path(model), "--text", path(&file), "--window", "256", "--limit", "2", "--json"];
        serde_json::from_str::<serde_json::Value>(&ok(&args)).unwrap()["perplexity"].as_f64().unwrap()
    };
    let rest = dir.path().join("rest");
    ok(&["convert", path(&source), path(&rest), "--to", "rtn:w4a8,g128"]);
    let (with, without) = (perplexity(&out), perplexity(&rest));
    assert!((with / without - 1.0).abs() < 0.005, "{with} {without}");
    let said = |model: &std::path::Path| ok(&["generate", path(model), "--prompt", "Once", "-n", "8"]);
    assert!(said(&out).len() > 8 && said(&out) == said(&out));
}

#[test]
fn rules_that_say_nothing_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    for (case, (rule, words)) in [
        ("lm_head.weight", "TENSORS=TO"),
        ("model.norm.weight=rtn:w9", "weights of 9 bits"),
        ("no_such_tensor=rtn:w8", "no_such_tensor"),
        ("model.norm.weight=rtn:w8", "model.norm.weight is BF16"),
    ]
    .into_iter()
    .enumerate()
    {
        let out = dir.path().join(case.to_string());
        let output =
            support::run(&["convert", path(&tinylm()), path(&out), "--to", "rtn:w4", "--rule", rule]);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && error.contains(words), "{rule}: {error}");
        assert!(!out.join("model-00001-of-00001.safetensors").exists());
    }
}

#[test]
fn a_model_runs_from_coded_codes_as_from_planes() {
    let dir = tempfile::tempdir().unwrap();
    let (planes, coded, source) = (dir.path().join("planes"), dir.path().join("coded"), tinylm());
    for to in ["rtn:w4,g128", "rtn:w2*a8"] {
        ok(&["convert", path(&source), path(&planes), "--to", to, "--force"]);
        ok(&["convert", path(&source), path(&coded), "--to", to, "--entropy-code", "--force"]);
        assert!(ok(&["verify", path(&coded)]).contains("every digest is right"));
        let against = ok(&["verify", path(&coded), "--against", path(&planes)]);
        assert!(against.contains("bit-identical"), "{against}");
        let text = source.join("eval.txt");
        let perplexity = |model: &std::path::Path| -> String {
            let args = [
                "eval",
                "ppl",
                path(model),
                "--text",
                path(&text),
                "--window",
                "128",
                "--limit",
                "1",
                "--json",
            ];
            serde_json::from_str::<serde_json::Value>(&ok(&args)).unwrap()["perplexity"].to_string()
        };
        assert_eq!(perplexity(&planes), perplexity(&coded), "{to}");
        let bits = |model: &std::path::Path| -> f64 {
            let json = ok(&["inspect", path(model), "--json"]);
            let json: serde_json::Value = serde_json::from_str(&json).unwrap();
            json["quantised"].as_object().unwrap().values().next().unwrap()["bits_per_weight"]
                .as_f64()
                .unwrap()
        };
        assert!(bits(&coded) < bits(&planes) * 0.97, "{to}: {} {}", bits(&coded), bits(&planes));
    }
    let error =
        fails(&["convert", path(&source), path(&dir.path().join("o")), "--to", "planes", "--entropy-code"]);
    assert!(error.contains("--entropy-code"), "{error}");
}
