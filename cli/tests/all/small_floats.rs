//! Checkpoints of FP8, NVFP4 and MXFP4: kept as they are by whoever only stores, numbers for everything that needs them.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::support::{T, checkpoint, fails, ok, path, t, tinylm};
use llmpress_formats::{Checkpoint, Dtype};
use llmpress_model::{Model, Skips, Unobserved, Weights};

/// The checkpoints that those tools wrote, without what they decode to; with it the matrix that each stores.
fn sources(dir: &Path) -> Vec<(String, PathBuf, String, Vec<u8>)> {
    let written = Path::new(env!("CARGO_MANIFEST_DIR")).join("../formats/tests/small_floats");
    let mut sources = Vec::new();
    for entry in std::fs::read_dir(&written).unwrap().map(Result::unwrap).filter(|e| e.path().is_dir()) {
        let name = entry.file_name().into_string().unwrap();
        let source = dir.join(&name);
        std::fs::create_dir(&source).unwrap();
        for file in ["config.json", "model.safetensors", "hf_quant_config.json"] {
            if entry.path().join(file).exists() {
                std::fs::copy(entry.path().join(file), source.join(file)).unwrap();
            }
        }
        let expected = std::fs::read(entry.path().join("expected.safetensors")).unwrap();
        let expected = safetensors::SafeTensors::deserialize(&expected).unwrap();
        let (weight, view) = expected.tensors().remove(0);
        sources.push((name, source, weight, view.data().to_vec()));
    }
    assert!(sources.len() >= 11);
    sources
}

/// Words as they are compared: modelopt gives minus zero no sign, which the standard and all others do.
fn words(name: &str, bytes: &[u8]) -> Vec<u16> {
    let unsigned = |word: u16| if name == "nvfp4-modelopt" && word == 1 << 15 { 0 } else { word };
    bytes.chunks_exact(2).map(|b| unsigned(u16::from_le_bytes([b[0], b[1]]))).collect()
}

#[test]
fn whoever_only_stores_small_floats_keeps_them_and_reads_their_numbers() {
    let dir = tempfile::tempdir().unwrap();
    for (name, source, weight, expected) in sources(dir.path()) {
        let (out, back) = (dir.path().join(format!("{name}-out")), dir.path().join(format!("{name}-back")));
        ok(&["convert", path(&source), path(&out), "--to", "archive"]);
        ok(&["verify", path(&out), "--against", path(&source)]);
        let numbers = Checkpoint::open_dequantised(&out).unwrap();
        assert!(words(&name, &numbers.read_tensor(&weight).unwrap()) == words(&name, &expected), "{name}");
        ok(&["convert", path(&source), path(&out), "--to", "planes", "--force"]);
        ok(&["verify", path(&out), "--against", path(&source)]);
        let numbers = Checkpoint::open_dequantised(&out).unwrap();
        assert!(words(&name, &numbers.read_tensor(&weight).unwrap()) == words(&name, &expected), "{name}");
        let inspected = ok(&["inspect", path(&out), "--json"]);
        assert!(
            inspected.contains("\"bits_per_weight\"")
                && inspected.contains("1x") | inspected.contains("e4m3")
        );
        ok(&["restore", path(&out), path(&back)]);
        ok(&["verify", path(&back), "--against", path(&source)]);
        for file in ["config.json", "hf_quant_config.json"] {
            let [a, b] = [&source, &back].map(|dir| std::fs::read(dir.join(file)).ok());
            assert!(a == b, "{name} {file}");
        }
        let [a, b] = [&source, &back].map(|dir| Checkpoint::open(dir).unwrap());
        assert!(a.tensors().keys().eq(b.tensors().keys()), "{name}");
        for tensor in a.tensors().keys() {
            assert!(a.read_tensor(tensor).unwrap() == b.read_tensor(tensor).unwrap(), "{name} {tensor}");
        }
    }
}

#[test]
fn restoring_small_floats_gives_a_plain_checkpoint_of_their_numbers() {
    let dir = tempfile::tempdir().unwrap();
    for (name, source, weight, expected) in sources(dir.path()) {
        let plain = dir.path().join(format!("{name}-plain"));
        ok(&["restore", path(&source), path(&plain)]);
        let checkpoint = Checkpoint::open(&plain).unwrap();
        assert!(words(&name, &checkpoint.read_tensor(&weight).unwrap()) == words(&name, &expected), "{name}");
        assert_eq!(checkpoint.tensors().len(), 2, "{name}");
        assert!(!std::fs::read_to_string(plain.join("config.json")).unwrap().contains("quantization_config"));
        assert!(!plain.join("hf_quant_config.json").exists());
        ok(&["diff", path(&plain), path(&source)]);
        ok(&["verify", path(&plain), "--against", path(&source)]);
    }
}

/// The byte of an E4M3 whose magnitude is nearest.
fn e4m3(value: f32, magnitudes: &[f32]) -> u8 {
    let at = magnitudes.partition_point(|m| *m < value.abs()).min(magnitudes.len() - 1);
    let below = at.saturating_sub(1);
    let nearer = if value.abs() - magnitudes[below] < magnitudes[at] - value.abs() { below } else { at };
    nearer as u8 | if value < 0.0 { 128 } else { 0 }
}

/// The example as FP8 with a scale for every block of 128 x 128 of the linears.
pub(crate) fn fp8_model(dir: &Path) {
    let source = Checkpoint::open(&tinylm()).unwrap();
    let magnitude = |byte: u8| match byte >> 3 {
        0 => f32::from(byte) * 2f32.powi(-9),
        exponent => (1.0 + f32::from(byte & 7) / 8.0) * 2f32.powi(i32::from(exponent) - 7),
    };
    let magnitudes: Vec<f32> = (0..127).map(magnitude).collect();
    let mut tensors: Vec<T> = Vec::new();
    for (name, tensor) in source.tensors() {
        let bytes = source.read_tensor(name).unwrap();
        if !name.contains("_proj") {
            tensors.push(t(name, tensor.dtype, &tensor.shape, bytes));
            continue;
        }
        let value = |b: &[u8]| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
        let values: Vec<f32> = bytes.chunks_exact(2).map(value).collect();
        let [rows, cols] = [tensor.shape[0] as usize, tensor.shape[1] as usize];
        let (lines, groups) = (rows.div_ceil(128), cols.div_ceil(128));
        let mut scales = vec![0f32; lines * groups];
        for (at, value) in values.iter().enumerate() {
            let scale = &mut scales[at / cols / 128 * groups + at % cols / 128];
            *scale = scale.max(value.abs() / 448.0);
        }
        let code = |(at, value): (usize, &f32)| {
            e4m3(value / scales[at / cols / 128 * groups + at % cols / 128], &magnitudes)
        };
        let codes = values.iter().enumerate().map(code).collect();
        tensors.push(t(name, Dtype::F8_E4M3, &tensor.shape, codes));
        let bytes = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
        tensors.push(t(&format!("{name}_scale_inv"), Dtype::F32, &[lines as u64, groups as u64], bytes));
    }
    let text = std::fs::read_to_string(tinylm().join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
    config["quantization_config"] =
        serde_json::json!({"quant_method": "fp8", "weight_block_size": [128, 128]});
    checkpoint(dir, &config.to_string(), &tensors);
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        if tinylm().join(file).exists() {
            std::fs::copy(tinylm().join(file), dir.join(file)).unwrap();
        }
    }
}

/// Logits of a few tokens, a row each.
fn logits(dir: &Path, weights: Weights) -> Vec<u32> {
    let mut model = Model::open(Arc::new(Checkpoint::open_dequantised(dir).unwrap())).unwrap();
    model.load(weights).unwrap();
    let ids: Vec<u32> = (0..19).map(|i| i * 37 % 4096).collect();
    let mut cache = model.cache(ids.len() + 1);
    let mut all = Vec::new();
    for ids in [&ids[..], &[7]] {
        let hidden = model.hidden(ids, &mut cache, &Skips::new(), &mut Unobserved).unwrap();
        all.extend(model.logits(&hidden).unwrap().data().iter().map(|logit| logit.to_bits()));
    }
    all
}

#[test]
fn models_in_fp8_run_and_convert_to_the_same_logits_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fp8_model(&at("fp8"));
    ok(&["restore", path(&at("fp8")), path(&at("plain"))]);
    let expected = logits(&at("plain"), Weights::Stored);
    assert!(logits(&at("fp8"), Weights::Stored) == expected && logits(&at("fp8"), Weights::Bf16) == expected);
    // Nothing is BF16 there but an embedding that is the head too.
    let error = fails(&["convert", path(&at("fp8")), path(&at("none")), "--to", "dfloat11"]);
    assert!(error.contains("--to planes") && error.contains("restore it first"), "{error}");
    for to in ["planes", "fixed12", "raw", "archive", "dfloat8"] {
        let out = at(to);
        ok(&["convert", path(&at("fp8")), path(&out), "--to", to]);
        ok(&["verify", path(&out), "--against", path(&at("fp8"))]);
        assert!(logits(&out, Weights::Stored) == expected, "{to}");
        let stored = Checkpoint::open(&out).unwrap();
        let weight = "model.layers.0.mlp.up_proj.weight";
        assert_eq!(
            stored.tensor(weight).unwrap().dtype,
            Dtype::F8_E4M3,
            "{to}: small floats stay what they are"
        );
        // And back to what it was.
        let back = at(&format!("{to}-back"));
        ok(&["restore", path(&out), path(&back)]);
        assert!(logits(&back, Weights::Stored) == expected, "{to}");
        assert_eq!(Checkpoint::open(&back).unwrap().tensor(weight).unwrap().dtype, Dtype::F8_E4M3, "{to}");
    }
    let coded = Checkpoint::open(&at("dfloat8")).unwrap();
    let of_fp8 = coded.units().values().filter(|unit| unit.encoding().name() == "dfloat8");
    let (bytes, stored) = of_fp8
        .fold((0, 0), |(bytes, stored), unit| (bytes + unit.decoded_size().1, stored + unit.stored_bytes()));
    assert!(bytes == 6_291_456 && stored * 100 < bytes * 87, "{stored} of {bytes}");
    let text = tinylm().join("eval.txt");
    let ppl = ["eval", "ppl", "--text", path(&text), "--limit", "2", "--json"];
    let of = |model: &str| {
        let model = at(model);
        let told: serde_json::Value =
            serde_json::from_str(&ok(&[&ppl[..], &[path(&model)]].concat())).unwrap();
        told["perplexity"].clone()
    };
    assert!(of("fp8").is_number() && of("fp8") == of("planes") && of("fp8") == of("plain"));
    assert!(of("fp8") == of("dfloat8"));
}

#[test]
fn passes_work_on_the_numbers_that_small_floats_stand_for() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fp8_model(&at("fp8"));
    ok(&["restore", path(&at("fp8")), path(&at("plain"))]);
    for (number, to) in ["rtn:w4,g64,symmetric", "sparse24:magnitude+fixed12"].into_iter().enumerate() {
        let (a, b) = (at(&format!("fp8-{number}")), at(&format!("plain-{number}")));
        assert!(ok(&["plan", path(&at("fp8")), "--to", to]).contains("expected"));
        ok(&["convert", path(&at("fp8")), path(&a), "--to", to]);
        ok(&["convert", path(&at("plain")), path(&b), "--to", to]);
        ok(&["diff", path(&a), path(&b)]);
        let config = std::fs::read_to_string(a.join("config.json")).unwrap();
        assert!(!config.contains("quantization_config"), "what another tool would look for is gone");
    }
}
