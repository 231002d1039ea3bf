//! The model that config.json describes, and what the stored tensors say otherwise.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::Path;

use crate::support::{self, T, bf16, fails, ok, path, run, t, tinylm};
use llmpress_formats::{Checkpoint, Dtype};
use serde_json::{Value, json};

/// tinylm's tensors.
fn tensors() -> Vec<T> {
    let checkpoint = Checkpoint::open(&tinylm()).unwrap();
    let one = |(name, tensor): (&String, &llmpress_formats::Tensor)| {
        t(name, tensor.dtype, &tensor.shape, checkpoint.read_tensor(name).unwrap())
    };
    checkpoint.tensors().iter().map(one).collect()
}

/// tinylm with other tensors and changes of its configuration.
fn model(dir: &Path, tensors: &[T], changes: &[(&str, Value)]) {
    let text = std::fs::read_to_string(tinylm().join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    changes.iter().for_each(|(key, value)| config[*key] = value.clone());
    support::checkpoint(dir, &config.to_string(), tensors);
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(tinylm().join(file), dir.join(file)).unwrap();
    }
}

/// Perplexity on a window, and what was said on stderr.
fn perplexity(dir: &Path) -> (f64, String) {
    let text = tinylm().join("eval.txt");
    let args = ["eval", "ppl", path(dir), "--text", path(&text), "--window", "128", "--limit", "1", "--json"];
    let output = run(&args);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{stderr}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    (report["perplexity"].as_f64().unwrap(), stderr)
}

#[test]
fn a_stored_head_counts_where_it_is_not_the_embedding() {
    let dir = tempfile::tempdir().unwrap();
    let mut all = tensors();
    let embedding = all.iter().find(|t| t.name == "model.embed_tokens.weight").unwrap().clone();
    let head = |bytes: Vec<u8>| t("lm_head.weight", embedding.dtype, &embedding.shape, bytes);
    let negated = embedding.bytes.chunks(2).flat_map(|w| [w[0], w[1] ^ 0x80]).collect::<Vec<u8>>();
    let (tied, _) = perplexity(&tinylm());
    all.push(head(negated));
    for (name, tie) in [("tied", json!(true)), ("untied", json!(false))] {
        let source = dir.path().join(name);
        model(&source, &all, &[("tie_word_embeddings", tie.clone())]);
        let (found, told) = perplexity(&source);
        assert!((found / tied - 1.0).abs() > 0.5, "{found} and {tied}");
        assert_eq!(
            told.contains("tie_word_embeddings") && told.contains("lm_head.weight"),
            tie == true,
            "{told}"
        );
        // Both digests and bytes tell.
        let out = dir.path().join(format!("{name}-planes"));
        ok(&["convert", path(&source), path(&out), "--to", "planes", "--quiet"]);
        let (converted, again) = perplexity(&out);
        assert_eq!((converted, again.contains("lm_head.weight")), (found, tie == true), "{again}");
    }
    *all.last_mut().unwrap() = head(embedding.bytes.clone());
    let equal = dir.path().join("equal");
    model(&equal, &all, &[]);
    let (found, told) = perplexity(&equal);
    assert_eq!((found, told.as_str()), (tied, ""));
}

#[test]
fn stored_tensors_that_the_model_does_not_use_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    let mut all = tensors();
    let unused =
        ["model.layers.0.self_attn.q_proj.bias", "model.layers.8.input_layernorm.weight", "model.extra"];
    all.extend(unused.map(|name| t(name, Dtype::BF16, &[256], bf16(1, 256))));
    all.push(t("model.layers.0.self_attn.rotary_emb.inv_freq", Dtype::F32, &[32], vec![0; 128]));
    model(&source, &all, &[]);
    let listed = ok(&["inspect", path(&source)]);
    assert!(listed.contains("not used by the model: 3 tensors"), "{listed}");
    let report: Value = serde_json::from_str(&ok(&["inspect", path(&source), "--json"])).unwrap();
    let mut sorted = unused;
    sorted.sort_unstable();
    assert_eq!(report["unused"], json!(sorted));
    let (_, told) = perplexity(&source);
    assert!(told.contains("3 stored tensors are not used") && told.contains("model.extra"), "{told}");
    // Fewer layers than there are stored.
    model(&source, &tensors(), &[("num_hidden_layers", json!(7))]);
    let (_, told) = perplexity(&source);
    assert!(told.contains("model.layers.7.input_layernorm.weight"), "{told}");
    assert!(!ok(&["inspect", path(&tinylm())]).contains("not used"));
    assert_eq!(perplexity(&tinylm()).1, "");
}

#[test]
fn sequences_beyond_the_positions_of_a_model_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    model(&source, &tensors(), &[("max_position_embeddings", json!(100))]);
    let (_, told) = perplexity(&source);
    assert!(
        told.contains("128 tokens") && told.contains("100") && told.contains("max_position_embeddings"),
        "{told}"
    );
    let generated = run(&["generate", path(&source), "-p", "hi", "-n", "110"]);
    assert!(String::from_utf8_lossy(&generated.stderr).contains("max_position_embeddings"));
    let quiet = run(&["generate", path(&source), "-p", "hi", "-n", "110", "--quiet"]);
    assert!(quiet.stderr.is_empty());
}

/// Packed as GPTQ and bitsandbytes do.
#[test]
fn weights_quantised_elsewhere_are_named_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let mut gptq = Vec::new();
    let mut bits_and_bytes = Vec::new();
    for tensor in tensors() {
        let Some(module) = tensor.name.strip_suffix("_proj.weight") else {
            gptq.push(tensor.clone());
            bits_and_bytes.push(tensor);
            continue;
        };
        let (rows, cols) = (tensor.shape[0], tensor.shape[1]);
        let bytes = |n: u64| vec![0; n as usize];
        gptq.push(t(
            &format!("{module}_proj.qweight"),
            Dtype::I32,
            &[cols / 8, rows],
            bytes(cols / 2 * rows),
        ));
        let scales = (cols / 128).max(1);
        gptq.push(t(
            &format!("{module}_proj.scales"),
            Dtype::BF16,
            &[scales, rows],
            bytes(scales * rows * 2),
        ));
        bits_and_bytes.push(t(&tensor.name, Dtype::U8, &[rows * cols / 2, 1], bytes(rows * cols / 2)));
    }
    let text = tinylm().join("eval.txt");
    for (method, tensors) in [("exl2", gptq), ("bitsandbytes", bits_and_bytes)] {
        let source = dir.path().join(method);
        model(&source, &tensors, &[("quantization_config", json!({"quant_method": method, "bits": 4}))]);
        for args in [
            vec!["eval", "ppl", path(&source), "--text", path(&text)],
            vec!["generate", path(&source), "-p", "hi"],
            vec!["plan", path(&source), "--to", "dfloat11"],
        ] {
            let error = fails(&args);
            for part in [method, "quantization_config.quant_method", "original checkpoint", "dequantise"] {
                assert!(error.contains(part), "{args:?}: {error}");
            }
        }
        ok(&["convert", path(&source), path(&dir.path().join(format!("{method}-planes"))), "--to", "planes"]);
    }
    // Settings that were left behind do no harm.
    let source = dir.path().join("plain");
    model(&source, &self::tensors(), &[("quantization_config", json!({"quant_method": "gptq"}))]);
    perplexity(&source);
}

#[test]
fn dfloat11_says_what_it_does_not_cover() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    let mut all = Vec::new();
    for layer in 0..2 {
        let p = format!("model.layers.{layer}.");
        let mut add = |name: &str, shape: &[u64]| {
            all.push(t(
                &format!("{p}{name}"),
                Dtype::BF16,
                shape,
                bf16(layer, shape.iter().product::<u64>() as usize),
            ));
        };
        add("self_attn.q_proj.weight", &[64, 64]);
        add("mlp.experts.gate_up_proj", &[16, 64, 64]);
        add("mlp.experts.down_proj", &[16, 64, 32]);
    }
    support::checkpoint(&source, r#"{"model_type": "qwen3_5_moe_text", "hidden_size": 64}"#, &all);
    let out = dir.path().join("out");
    for args in [
        vec!["plan", path(&source), "--to", "dfloat11"],
        vec!["convert", path(&source), path(&out), "--to", "dfloat11"],
    ] {
        let output = run(&args);
        assert!(output.status.success());
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        for part in
            ["96.0 %", "4 BF16 tensors", "mlp.experts.gate_up_proj [16, 64, 64]", "fixed12 and planes"]
        {
            assert!(told.contains(part), "{args:?}: {told}");
        }
    }
    let tiny = tinylm();
    for args in
        [vec!["plan", path(&source), "--to", "fixed12"], vec!["plan", path(&tiny), "--to", "dfloat11"]]
    {
        assert!(!String::from_utf8_lossy(&run(&args).stderr).contains("leaves"), "{args:?}");
    }
}

/// A small Gemma 3 whose decoder is described in text_config, with a matrix of a vision tower.
fn gemma(dir: &Path) {
    const HIDDEN: u64 = 64;
    let p = "language_model.model.";
    let mut all = vec![
        t(&format!("{p}embed_tokens.weight"), Dtype::BF16, &[4096, HIDDEN], bf16(1, 4096 * 64)),
        t(&format!("{p}norm.weight"), Dtype::BF16, &[HIDDEN], bf16(2, 64)),
    ];
    for layer in 0..3u64 {
        for (i, (name, shape)) in [
            ("self_attn.q_proj", vec![64, HIDDEN]),
            ("self_attn.k_proj", vec![32, HIDDEN]),
            ("self_attn.v_proj", vec![32, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, 64]),
            ("self_attn.q_norm", vec![16]),
            ("self_attn.k_norm", vec![16]),
            ("input_layernorm", vec![HIDDEN]),
            ("post_attention_layernorm", vec![HIDDEN]),
            ("pre_feedforward_layernorm", vec![HIDDEN]),
            ("post_feedforward_layernorm", vec![HIDDEN]),
            ("mlp.gate_proj", vec![128, HIDDEN]),
            ("mlp.up_proj", vec![128, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, 128]),
        ]
        .into_iter()
        .enumerate()
        {
            let count = shape.iter().product::<u64>() as usize;
            let name = format!("{p}layers.{layer}.{name}.weight");
            all.push(t(&name, Dtype::BF16, &shape, bf16(layer * 20 + i as u64, count)));
        }
    }
    // 48 x 48 weights are 36 x 64 as well.
    let vision = "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight";
    all.push(t(vision, Dtype::BF16, &[48, 48], bf16(9, 48 * 48)));
    let config = json!({
        "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {"model_type": "gemma3_text", "hidden_size": 64, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 3, "vocab_size": 4096,
            "rms_norm_eps": 1e-6, "intermediate_size": 128, "max_position_embeddings": 512, "sliding_window": 64},
        "vision_config": {"hidden_size": 48, "intermediate_size": 96}});
    support::checkpoint(dir, &serde_json::to_string_pretty(&config).unwrap(), &all);
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(tinylm().join(file), dir.join(file)).unwrap();
    }
}

#[test]
fn layers_are_removed_from_a_model_inside_of_text_config() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    gemma(&source);
    let calib = tinylm().join("calib.txt");
    for (i, (to, portable)) in [
        ("drop:block=1", false),
        ("drop:block=1", true),
        ("drop:last=2", false),
        ("drop:joint=2", false),
        ("drop:attn=1", false),
        ("drop:attn=1", true),
        ("finercut:2", false),
    ]
    .into_iter()
    .enumerate()
    {
        let out = dir.path().join(format!("out{i}"));
        let mut args = vec!["convert", path(&source), path(&out), "--to", to, "--quiet"];
        if !to.contains("last") {
            args.extend(["--calib", path(&calib), "--calib-windows", "2", "--calib-window", "64"]);
        }
        args.extend(portable.then_some("--portable"));
        ok(&args);
        let config: Value = serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
        let layers = &config["text_config"]["num_hidden_layers"];
        if to == "drop:block=1" || to == "drop:last=2" {
            assert_eq!((layers, config.get("num_hidden_layers")), (&json!(2), None), "{to}: {config}");
            assert_eq!(config["text_config"]["layer_types"].as_array().unwrap().len(), 2, "{to}: {config}");
        }
        assert_eq!(perplexity(&out).1, "", "{to}");
        let text = tinylm().join("eval.txt");
        let args = ["verify", path(&out), "--against", path(&source), "--logits", "--text", path(&text)];
        let args = [&args[..], &["--window", "64", "--limit", "1"]].concat();
        assert_eq!(ok(&args).matches("bit-identical").count(), 2, "{to}");
    }
}

/// Official directories hold no shapes.
#[test]
fn a_matrix_of_a_vision_tower_comes_back_in_its_own_shape_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out, back) = (dir.path().join("source"), dir.path().join("out"), dir.path().join("back"));
    gemma(&source);
    ok(&["convert", path(&source), path(&out), "--to", "dfloat11", "--quiet"]);
    std::fs::remove_file(out.join("llmpress.json")).unwrap();
    assert_eq!(Checkpoint::open(&out).unwrap().kind().name(), "dfloat11");
    ok(&["restore", path(&out), path(&back), "--quiet"]);
    assert!(ok(&["diff", path(&source), path(&back)]).contains("0 different, 0 not comparable"));
    let config = std::fs::read_to_string(out.join("config.json")).unwrap();
    for changed in [
        config.replace("\"hidden_size\": 48", "\"hidden_size\": 36"),
        config.replace("vision_config", "other"),
    ] {
        std::fs::write(out.join("config.json"), changed).unwrap();
        let error = fails(&["restore", path(&out), path(&dir.path().join("never")), "--quiet"]);
        assert!(error.contains("q_proj.weight") && error.contains("original checkpoint"), "{error}");
    }
}
