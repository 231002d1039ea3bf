//! Checkpoints that other tools quantised: their codes are taken over, or their numbers given back.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::support::{LLAMA, T, checkpoint, fails, ok, path, t, tiny_llama, tinylm};
use llmpress_formats::{Checkpoint, Dtype, Encoding};
use llmpress_model::{Model, Skips, Unobserved, Weights};

const WEIGHT: &str = "model.layers.0.self_attn.q_proj.weight";

/// The checkpoints that those tools wrote, without what they decode to.
fn sources(dir: &Path) -> Vec<(String, PathBuf, Vec<u8>)> {
    let written = Path::new(env!("CARGO_MANIFEST_DIR")).join("../formats/tests/foreign");
    let mut sources = Vec::new();
    for entry in std::fs::read_dir(&written).unwrap().map(Result::unwrap).filter(|e| e.path().is_dir()) {
        let name = entry.file_name().into_string().unwrap();
        let source = dir.join(&name);
        std::fs::create_dir(&source).unwrap();
        for file in ["config.json", "model.safetensors"] {
            std::fs::copy(entry.path().join(file), source.join(file)).unwrap();
        }
        let expected = std::fs::read(entry.path().join("expected.safetensors")).unwrap();
        let expected =
            safetensors::SafeTensors::deserialize(&expected).unwrap().tensor(WEIGHT).unwrap().data().to_vec();
        sources.push((name, source, expected));
    }
    assert!(sources.len() >= 10);
    sources
}

#[test]
fn codes_are_taken_over_without_changing_a_number() {
    let dir = tempfile::tempdir().unwrap();
    for (name, source, expected) in sources(dir.path()) {
        let (out, back) = (dir.path().join(format!("{name}-out")), dir.path().join(format!("{name}-back")));
        ok(&["convert", path(&source), path(&out), "--to", "abq"]);
        ok(&["verify", path(&out)]);
        ok(&["verify", path(&out), "--against", path(&source)]);
        let converted = Checkpoint::open(&out).unwrap();
        assert!(converted.read_tensor(WEIGHT).unwrap() == expected, "{name}");
        let unit = converted.unit_of(converted.tensor(WEIGHT).unwrap()).unwrap();
        // Columns that are spread over groups have no home there.
        assert_eq!(matches!(unit.encoding(), Encoding::Abq(_)), name != "gptq-act-order", "{name}");
        let manifest = std::fs::read_to_string(out.join("llmpress.json")).unwrap();
        assert_eq!(manifest.contains("act-order"), name == "gptq-act-order", "{name}");
        for config in [&out, &back] {
            if config == &back {
                ok(&["restore", path(&source), path(&back)]);
            }
            assert!(
                !std::fs::read_to_string(config.join("config.json")).unwrap().contains("quantization_config")
            );
        }
        assert!(Checkpoint::open(&back).unwrap().read_tensor(WEIGHT).unwrap() == expected, "{name}");
        ok(&["diff", path(&back), path(&source)]);
    }
}

#[test]
fn whoever_only_stores_tensors_gets_them_back_as_the_tool_packed_them() {
    let dir = tempfile::tempdir().unwrap();
    for (name, source, _) in sources(dir.path()) {
        let (out, back) = (dir.path().join(format!("{name}-out")), dir.path().join(format!("{name}-back")));
        ok(&["convert", path(&source), path(&out), "--to", "planes"]);
        ok(&["verify", path(&out), "--against", path(&source)]);
        ok(&["restore", path(&out), path(&back)]);
        ok(&["verify", path(&back), "--against", path(&source)]);
        let [a, b] = [&source, &back].map(|dir| std::fs::read(dir.join("config.json")).unwrap());
        assert!(a == b && Checkpoint::open(&back).unwrap().tensors().len() > 2, "{name}");
    }
}

#[test]
fn abq_without_widths_is_for_what_is_quantised_already() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("s");
    checkpoint(&source, LLAMA, &tiny_llama());
    let error = fails(&["convert", path(&source), path(&dir.path().join("o")), "--to", "abq"]);
    assert!(error.contains("abq:w4"), "{error}");
    assert!(!dir.path().join("o").exists());
}

#[test]
fn what_was_taken_over_is_exported_as_it_came_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    for (name, source, expected) in sources(dir.path()) {
        let format = if name.starts_with("gptq") { "gptq" } else { "compressed-tensors" };
        let (ours, out) = (dir.path().join(format!("{name}-abq")), dir.path().join(format!("{name}-out")));
        ok(&["convert", path(&source), path(&ours), "--to", "abq"]);
        if name == "gptq-act-order" {
            assert!(
                fails(&["export", path(&ours), path(&out), "--as", format])
                    .contains("nothing that is quantised")
            );
            continue;
        }
        ok(&["export", path(&ours), path(&out), "--as", format]);
        ok(&["verify", path(&out), "--against", path(&ours)]);
        ok(&["verify", path(&out), "--against", path(&source)]);
        if format == "gptq" {
            // Zero points lie anywhere here: runtimes must be told to look at them.
            assert!(std::fs::read_to_string(out.join("config.json")).unwrap().contains("\"sym\": false"));
        }
        let exported = Checkpoint::open_dequantised(&out).unwrap();
        assert!(exported.read_tensor(WEIGHT).unwrap() == expected, "{name}");
        let again = ok(&["export", path(&ours), path(&out), "--as", format, "--resume", "--json"]);
        assert!(again.contains("\"resumed_shards\": 1"), "{again}");
        if name == "awq-g32" {
            continue;
        }
        let [a, b] = [&source, &out].map(|dir| Checkpoint::open(dir).unwrap());
        assert!(a.tensors().keys().eq(b.tensors().keys()), "{name}");
        for tensor in a.tensors().keys() {
            assert_eq!(a.tensors()[tensor].shape, b.tensors()[tensor].shape, "{name} {tensor}");
            assert!(a.read_tensor(tensor).unwrap() == b.read_tensor(tensor).unwrap(), "{name} {tensor}");
        }
    }
}

/// A llama whose weights reach twice as far on one side, another one in every row.
fn lopsided() -> Vec<T> {
    let mut tensors = tiny_llama();
    for tensor in tensors.iter_mut().filter(|tensor| tensor.shape.len() == 2) {
        let cols = tensor.shape[1] as usize;
        for (at, word) in tensor.bytes.chunks_exact_mut(2).enumerate() {
            let value = [-1.0f32, 0.0, 1.0, 2.0][(at * 7 + at / cols) % 4]
                * if (at / cols).is_multiple_of(3) { -0.5 } else { 0.5 };
            word.copy_from_slice(&((value.to_bits() >> 16) as u16).to_le_bytes());
        }
    }
    tensors
}

#[test]
fn scales_below_zero_are_exported_as_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    checkpoint(&source, LLAMA, &lopsided());
    for (to, formats) in [
        ("grid:w2,symmetric", &["compressed-tensors", "gptq"][..]),
        ("grid:w3,g32,int", &["compressed-tensors"]),
        ("grid:w2,g32,symmetric", &["compressed-tensors", "gptq"]),
        ("grid:w2a8,symmetric", &["compressed-tensors"]),
    ] {
        let ours = dir.path().join("ours");
        ok(&["convert", path(&source), path(&ours), "--to", to, "--force"]);
        let checkpoint = Checkpoint::open(&ours).unwrap();
        let scales = checkpoint.packed_rows(WEIGHT, 0..64).unwrap().scale().iter().collect::<Vec<f32>>();
        let either = scales.iter().any(|s| *s < 0.0) && scales.iter().any(|s| *s > 0.0);
        assert!(either || to.contains("int"), "{to}: {scales:?}");
        if to.starts_with("grid:w2") {
            // No weight is cut off; a zero may be one below zero.
            let [found, weights] = [&ours, &source].map(|dir| {
                let bytes = Checkpoint::open(dir).unwrap().read_tensor(WEIGHT).unwrap();
                let value = |b: &[u8]| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
                bytes.chunks_exact(2).map(value).collect::<Vec<f32>>()
            });
            assert_eq!(found, weights, "{to}");
        }
        for format in formats {
            let (out, back) = (dir.path().join("out"), dir.path().join("back"));
            ok(&["export", path(&ours), path(&out), "--as", format, "--force"]);
            ok(&["verify", path(&out), "--against", path(&ours)]);
            // And they come in again.
            ok(&["convert", path(&out), path(&back), "--to", "abq", "--force"]);
            let back = Checkpoint::open(&back).unwrap();
            assert!(
                back.packed_rows(WEIGHT, 0..64).unwrap().scale().iter().eq(scales.iter().copied()),
                "{to} {format}"
            );
            for tensor in checkpoint.tensors().keys() {
                assert!(
                    back.read_tensor(tensor).unwrap() == checkpoint.read_tensor(tensor).unwrap(),
                    "{to} {format} {tensor}"
                );
            }
        }
    }
}

#[test]
fn what_a_format_cannot_say_is_refused_before_any_work() {
    let dir = tempfile::tempdir().unwrap();
    for (name, source, _) in sources(dir.path()) {
        let (ours, out) = (dir.path().join(format!("{name}-abq")), dir.path().join(format!("{name}-out")));
        ok(&["convert", path(&source), path(&ours), "--to", "abq"]);
        let wanted = match name.as_str() {
            "pack-w3-sym" => None,
            "pack-w5-a8" | "int-w8-a8" => Some("quantises what it multiplies to 8 bits"),
            "gptq-act-order" => Some("nothing that is quantised"),
            _ => continue,
        };
        let arguments = ["export", path(&ours), path(&out), "--as", "gptq"];
        match wanted {
            None => {
                ok(&arguments);
                assert!(std::fs::read_to_string(out.join("config.json")).unwrap().contains("\"sym\": true"));
            }
            Some(wanted) => {
                let error = fails(&arguments);
                assert!(error.contains(wanted) && !out.exists(), "{name}: {error}");
            }
        }
    }
    let plain = dir.path().join("s");
    checkpoint(&plain, LLAMA, &tiny_llama());
    let error = fails(&["export", path(&plain), path(&dir.path().join("o")), "--as", "gptq"]);
    assert!(error.contains("nothing that is quantised"), "{error}");
}

/// Logits of a few tokens, a row each.
fn logits(checkpoint: Checkpoint, weights: Weights) -> Vec<f32> {
    let mut model = Model::open(Arc::new(checkpoint)).unwrap();
    model.load(weights).unwrap();
    let ids: Vec<u32> = (0..19).map(|i| i * 37 % 4096).collect();
    let mut cache = model.cache(ids.len() + 1);
    let mut all = Vec::new();
    // Many tokens at once, then one.
    for ids in [&ids[..], &[7]] {
        let hidden = model.hidden(ids, &mut cache, &Skips::new(), &mut Unobserved).unwrap();
        all.extend_from_slice(model.logits(&hidden).unwrap().data());
    }
    all
}

fn same(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

/// All tensors of a checkpoint as they lie there, with some in the place of others.
fn rewritten(
    source: &Path,
    out: &Path,
    config: impl Fn(&mut serde_json::Value),
    change: impl Fn(T) -> Vec<T>,
) {
    let stored = Checkpoint::open(source).unwrap();
    let tensors = stored.tensors().iter().flat_map(|(name, tensor)| {
        change(t(name, tensor.dtype, &tensor.shape, stored.read_tensor(name).unwrap()))
    });
    let mut written: serde_json::Value =
        serde_json::from_slice(&std::fs::read(source.join("config.json")).unwrap()).unwrap();
    config(&mut written);
    checkpoint(out, &written.to_string(), &tensors.collect::<Vec<T>>());
}

#[test]
fn matrices_of_other_tools_run_from_their_codes_as_abq_does() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, out) = (dir.path().join("ours"), dir.path().join("out"));
    for (to, format) in [
        ("rtn:w4,g32,int", "compressed-tensors"),
        ("rtn:w3,symmetric", "compressed-tensors"),
        ("rtn:w8a8,symmetric", "compressed-tensors"),
        ("rtn:w5a8,g64,int", "compressed-tensors"),
        ("rtn:w4,g128,symmetric", "gptq"),
    ] {
        ok(&["convert", path(&tinylm()), path(&ours), "--to", to, "--force"]);
        ok(&["export", path(&ours), path(&out), "--as", format, "--force"]);
        let expected = logits(Checkpoint::open(&ours).unwrap(), Weights::Stored);
        let exported = || Checkpoint::open_dequantised(&out).unwrap();
        assert!(same(&logits(exported(), Weights::Stored), &expected), "{to}");
        let model = Model::open(Arc::new(exported())).unwrap();
        assert_eq!(model.decoded_bytes(), 0, "{to}: nothing is decoded for a token");
        // Decoded, they are the numbers that a plain checkpoint has.
        if !to.contains("a8") {
            let plain = dir.path().join("plain");
            ok(&["restore", path(&out), path(&plain), "--force"]);
            let plain = logits(Checkpoint::open(&plain).unwrap(), Weights::Stored);
            assert!(same(&logits(exported(), Weights::Bf16), &plain), "{to}");
        }
    }
}

#[test]
fn awq_runs_from_its_codes() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, gptq, awq) = (dir.path().join("ours"), dir.path().join("gptq"), dir.path().join("awq"));
    ok(&["convert", path(&tinylm()), path(&ours), "--to", "rtn:w4,g128,symmetric"]);
    ok(&["export", path(&ours), path(&gptq), "--as", "gptq"]);
    let numbers = Checkpoint::open_dequantised(&gptq).unwrap();
    let nibbles = |codes: &[u8], rows: usize, lines: usize| -> Vec<u8> {
        // Eight outputs in a word: its nibbles hold 0, 2, 4, 6, 1, 3, 5, 7.
        let word = |line: usize, first: usize| {
            let each = [0, 2, 4, 6, 1, 3, 5, 7].into_iter().enumerate();
            each.fold(0u32, |word, (at, row)| {
                word | u32::from(codes[(first + row) * lines + line]) << (4 * at)
            })
        };
        let words = (0..lines).flat_map(|line| (0..rows).step_by(8).map(move |first| (line, first)));
        words.flat_map(|(line, first)| word(line, first).to_le_bytes()).collect()
    };
    let change = |tensor: T| {
        let Some((module, last)) = tensor.name.rsplit_once('.') else { return vec![tensor] };
        let name = format!("{module}.weight");
        match last {
            "qweight" | "qzeros" => {
                let codes = numbers.codes(&name).unwrap().unwrap();
                let (rows, cols, groups) = (codes.rows() as usize, codes.cols(), codes.groups());
                let lines = if last == "qweight" { cols } else { groups };
                let mut values = vec![0; rows * lines];
                match last {
                    "qweight" => codes.read_codes(0..rows as u64, &mut values).unwrap(),
                    _ => codes.read_zeros(0..rows as u64, &mut values).unwrap(),
                }
                vec![t(
                    &tensor.name,
                    Dtype::I32,
                    &[lines as u64, rows as u64 / 8],
                    nibbles(&values, rows, lines),
                )]
            }
            "g_idx" => Vec::new(),
            _ => vec![tensor],
        }
    };
    let config = |config: &mut serde_json::Value| {
        config["quantization_config"] = serde_json::json!({
            "quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": true,
        });
    };
    rewritten(&gptq, &awq, config, change);
    let opened = || Checkpoint::open_dequantised(&awq).unwrap();
    let unit = &opened().units()["model.layers.0.mlp.up_proj.weight"].encoding().name().to_owned();
    assert_eq!(unit, "awq");
    let expected = logits(Checkpoint::open(&ours).unwrap(), Weights::Stored);
    assert!(same(&logits(opened(), Weights::Stored), &expected));
}

#[test]
fn columns_that_are_spread_over_groups_run_as_the_decoded_weights_do() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    ok(&["convert", path(&tinylm()), path(&at("ours")), "--to", "rtn:w4,g64,symmetric"]);
    ok(&["export", path(&at("ours")), path(&at("gptq")), "--as", "gptq"]);
    // As many columns in each group, but not neighbours.
    let change = |mut tensor: T| {
        if tensor.name.ends_with("g_idx") {
            let groups = tensor.shape[0] as u32 / 64;
            let index = (0..tensor.shape[0] as u32).flat_map(|column| (column * 5 % groups).to_le_bytes());
            tensor.bytes = index.collect();
        }
        vec![tensor]
    };
    rewritten(&at("gptq"), &at("spread"), |_| {}, change);
    ok(&["restore", path(&at("spread")), path(&at("plain"))]);
    let plain = logits(Checkpoint::open(&at("plain")).unwrap(), Weights::Stored);
    let spread = || Checkpoint::open_dequantised(&at("spread")).unwrap();
    assert!(same(&logits(spread(), Weights::Stored), &plain));
    assert!(same(&logits(spread(), Weights::Bf16), &plain));
    assert!(!same(&logits(Checkpoint::open(&at("ours")).unwrap(), Weights::Stored), &plain), "other numbers");
}

#[test]
fn every_export_has_a_model_card_and_keeps_what_the_source_says() {
    let dir = tempfile::tempdir().unwrap();
    let (source, ours, out) = (dir.path().join("source"), dir.path().join("ours"), dir.path().join("out"));
    std::fs::create_dir(&source).unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(tinylm().join(file), source.join(file)).unwrap();
    }
    let told = "---\nlicense: mit\nbase_model: org/first\n---\n# The model\n\nIts own words.\n";
    std::fs::write(source.join("README.md"), told).unwrap();
    ok(&["convert", path(&source), path(&ours), "--to", "rtn:w4,g32,symmetric"]);
    let report = dir.path().join("report.json");
    let text = tinylm().join("eval.txt");
    let measured = ok(&["eval", "ppl", path(&ours), "--text", path(&text), "--limit", "1", "--json"]);
    std::fs::write(&report, &measured).unwrap();
    let ppl: serde_json::Value = serde_json::from_str(&measured).unwrap();
    for format in ["compressed-tensors", "gguf", "safetensors"] {
        let mut args = vec!["export", path(&ours), path(&out), "--as", format, "--force"];
        args.extend(["--report", path(&report), "--push", "org/new"]);
        let printed = ok(&args);
        assert!(printed.contains(&format!("hf upload org/new {} .", out.display())), "{printed}");
        let card = std::fs::read_to_string(out.join("README.md")).unwrap();
        assert!(card.starts_with("---\nlicense: mit\nbase_model: org/first\ntags:\n- llmpress\n"), "{card}");
        assert!(card.ends_with("# The model\n\nIts own words.\n"), "{card}");
        assert!(card.contains(&format!("- {format}\n")) && card.contains("rtn:w4,g32,symmetric"), "{card}");
        assert!(card.contains(&format!("{:.4}", ppl["perplexity"].as_f64().unwrap())), "{card}");
        // The same job is done, another one is not.
        args[5] = "--resume";
        assert!(ok(&args).contains("1 of 1 shards were there already"));
        let error = fails(&["export", path(&ours), path(&out), "--as", format, "--resume"]);
        assert!(error.contains("another README.md"), "{error}");
    }
    // Exported again, the section is there once.
    let again = dir.path().join("again");
    ok(&["export", path(&out), path(&again), "--as", "safetensors"]);
    let card = std::fs::read_to_string(again.join("README.md")).unwrap();
    assert_eq!((card.matches("<!-- llmpress -->").count(), card.matches("Its own words").count()), (1, 1));
    let error = fails(&["export", path(&ours), path(&again), "--as", "gguf", "--report", path(&text)]);
    assert!(error.contains("eval.txt") && error.contains("no report"), "{error}");
}

#[test]
fn plain_numbers_are_exported_of_whatever_there_is() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, out, back) = (dir.path().join("ours"), dir.path().join("out"), dir.path().join("back"));
    // As `restore` has them, where there is something to restore.
    ok(&["convert", path(&tinylm()), path(&ours), "--to", "rtn:w4,g64"]);
    ok(&["export", path(&ours), path(&out), "--as", "safetensors"]);
    ok(&["restore", path(&ours), path(&back)]);
    let bytes = |dir: &Path| std::fs::read(dir.join("model.safetensors")).unwrap();
    assert!(bytes(&out) == bytes(&back));
    ok(&["verify", path(&out), "--against", path(&ours)]);
    // A plain checkpoint is copied, one that another tool quantised becomes numbers.
    ok(&["export", path(&tinylm()), path(&out), "--as", "safetensors", "--force"]);
    ok(&["verify", path(&out), "--against", path(&tinylm())]);
    let (_, source, expected) = sources(dir.path()).into_iter().find(|(name, ..)| name == "awq-g32").unwrap();
    ok(&["export", path(&source), path(&out), "--as", "safetensors", "--force"]);
    assert!(Checkpoint::open(&out).unwrap().read_tensor(WEIGHT).unwrap() == expected);
    assert!(!std::fs::read_to_string(out.join("config.json")).unwrap().contains("quantization_config"));
}
