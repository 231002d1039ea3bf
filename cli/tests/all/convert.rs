//! Conversion, proof and restoration, as a user runs them.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod base;

use crate::support::{
    self, bf16, bytes, checkpoint, fails, ok, path, run, same_files, t, tiny_llama, tinylm,
};
use llmpress_formats::{Checkpoint, Dtype};

const METHODS: [&str; 4] = ["dfloat11", "fixed12", "planes", "archive"];

#[test]
fn tinylm_converts_verifies_and_restores_by_every_method() {
    let dir = tempfile::tempdir().unwrap();
    let source = tinylm();
    for method in METHODS {
        let (out, back) = (dir.path().join(method), dir.path().join(format!("{method}-back")));
        let text = ok(&["convert", path(&source), path(&out), "--to", method]);
        assert!(text.contains("GB/s"), "{text}");
        ok(&["verify", path(&out)]);
        assert!(ok(&["verify", path(&out), "--against", path(&source)]).contains("bit-identical"));
        ok(&["restore", path(&out), path(&back)]);
        assert!(ok(&["verify", path(&back), "--against", path(&source)]).contains("bit-identical"));
        // Tensors, configuration and all other files are what they were.
        let (a, b) = (Checkpoint::open(&source).unwrap(), Checkpoint::open(&back).unwrap());
        assert!(a.tensors().keys().eq(b.tensors().keys()));
        for name in a.tensors().keys() {
            assert!(a.read_tensor(name).unwrap() == b.read_tensor(name).unwrap(), "{name}");
        }
        for file in ["config.json", "tokenizer.json", "generation_config.json"] {
            assert!(std::fs::read(source.join(file)).unwrap() == std::fs::read(back.join(file)).unwrap());
        }
        assert!(!back.join("llmpress.json").exists() && !back.join(".llmpress").exists());
    }
}

#[test]
fn the_result_does_not_depend_on_threads_memory_or_repetition() {
    let dir = tempfile::tempdir().unwrap();
    for method in METHODS {
        let first = dir.path().join(format!("{method}-0"));
        let base = ["convert", path(&tinylm()), "--to", method, "--max-shard-size", "3M"].map(str::to_owned);
        let convert = |out: &std::path::Path, more: &[&str]| {
            let mut args: Vec<&str> = base.iter().map(String::as_str).collect();
            args.insert(2, path(out));
            args.extend(more);
            ok(&args);
        };
        convert(&first, &["--jobs", "1"]);
        for (i, more) in
            [&["--jobs", "3"][..], &["--jobs", "16", "--max-memory", "64M"], &[]].iter().enumerate()
        {
            let out = dir.path().join(format!("{method}-{}", i + 1));
            convert(&out, more);
            same_files(&first, &out);
        }
    }
}

#[test]
fn a_dfloat11_directory_is_an_official_one() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out, back) = (tinylm(), dir.path().join("out"), dir.path().join("back"));
    ok(&["convert", path(&source), path(&out), "--to", "dfloat11"]);
    let config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
    let settings = &config["dfloat11_config"];
    assert_eq!(settings["threads_per_block"], serde_json::json!([512]));
    assert_eq!(settings["bytes_per_thread"], 8);
    assert_eq!(settings["pattern_dict"]["model\\.layers\\.\\d+"][0], "self_attn.q_proj");
    // Without the manifest it is what the official packer would have left.
    std::fs::remove_file(out.join("llmpress.json")).unwrap();
    assert!(ok(&["inspect", path(&out)]).contains("dfloat11 checkpoint"));
    assert!(ok(&["verify", path(&out), "--against", path(&source)]).contains("bit-identical"));
    ok(&["restore", path(&out), path(&back)]);
    assert!(ok(&["verify", path(&back), "--against", path(&source)]).contains("bit-identical"));
    assert!(
        std::fs::read(source.join("config.json")).unwrap()
            == std::fs::read(back.join("config.json")).unwrap()
    );
}

#[test]
fn all_six_components_are_those_of_the_official_packer() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    ok(&["convert", path(&tinylm()), path(&out), "--to", "dfloat11"]);
    let golden = tinylm().join("../../entropy/tests/golden/units.json");
    let units: serde_json::Value = serde_json::from_slice(&std::fs::read(golden).unwrap()).unwrap();
    let manifest = Checkpoint::open(&out).unwrap().manifest().unwrap().clone();
    let mut compared = 0;
    for unit in units.as_array().unwrap().iter().filter(|u| u["model"] == "tinylm") {
        let entry = &manifest.units[unit["unit"].as_str().unwrap()];
        for (name, component) in entry.components.iter() {
            let expected = unit["components"][name]["blake3"].as_str().unwrap();
            assert_eq!(component.blake3.to_string(), expected, "{}: {name}", unit["unit"]);
            compared += 1;
        }
    }
    assert_eq!(compared, 8 * 6);
}

#[test]
fn one_encoding_is_turned_into_another_directly() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b, c) = (dir.path().join("a"), dir.path().join("b"), dir.path().join("c"));
    ok(&["convert", path(&tinylm()), path(&a), "--to", "dfloat11"]);
    ok(&["convert", path(&a), path(&b), "--to", "fixed12"]);
    ok(&["convert", path(&b), path(&c), "--to", "planes"]);
    assert!(ok(&["verify", path(&c), "--against", path(&tinylm())]).contains("bit-identical"));
    assert!(!std::fs::read_to_string(b.join("config.json")).unwrap().contains("dfloat11_config"));
}

#[test]
fn every_dtype_and_odd_tensor_round_trips() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    let mut tensors = tiny_llama();
    for dtype in Dtype::ALL {
        let elements = 8 * 331;
        let name = format!("extra.{}", dtype.name());
        let size = dtype.byte_len(&[8, 331]).unwrap();
        assert_eq!(size, elements * u64::from(dtype.bits()) / 8);
        tensors.push(t(&name, *dtype, &[8, 331], bytes(u64::from(dtype.bits()), size as usize)));
    }
    let all_words: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    tensors.push(t("model.layers.0.mlp.extra.weight", Dtype::BF16, &[256, 256], all_words.clone()));
    tensors.push(t("all_words", Dtype::BF16, &[1, 65536], all_words));
    tensors.push(t("empty", Dtype::BF16, &[0, 64], vec![]));
    tensors.push(t("empty_f32", Dtype::F32, &[3, 0], vec![]));
    tensors.push(t("one", Dtype::BF16, &[1, 1], vec![1, 2]));
    tensors.push(t("scalar", Dtype::F32, &[], vec![0, 0, 128, 63]));
    tensors.push(t("constant", Dtype::BF16, &[100, 64], [0x80, 0x3f].repeat(6400)));
    tensors.push(t("zeros", Dtype::F32, &[100, 64], vec![0; 25600]));
    tensors.push(t("experts", Dtype::BF16, &[3, 32, 64], bf16(5, 3 * 32 * 64)));
    tensors.push(t("odd", Dtype::BF16, &[33, 131], bf16(6, 33 * 131)));
    tensors.push(t(
        "model.layers.9.self_attn.q_proj.weight",
        Dtype::BF16,
        &[64, 64],
        [0x80, 0x3f].repeat(4096),
    ));
    // An exact 16-bit copy of a component's name must not collide.
    tensors.push(t("experts.codes", Dtype::U8, &[5], vec![1, 2, 3, 4, 5]));
    checkpoint(&source, support::LLAMA, &tensors);
    for method in METHODS {
        let (out, back) = (dir.path().join(method), dir.path().join(format!("{method}-back")));
        let output = run(&["convert", path(&source), path(&out), "--to", method]);
        if method == "fixed12" {
            let error = String::from_utf8_lossy(&output.stderr);
            assert!(error.contains("experts.codes"), "a collision is refused by name: {error}");
            continue;
        }
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        ok(&["verify", path(&out)]);
        assert!(ok(&["verify", path(&out), "--against", path(&source)]).contains("bit-identical"));
        ok(&["restore", path(&out), path(&back)]);
        assert!(ok(&["verify", path(&back), "--against", path(&source)]).contains("bit-identical"));
    }
    tensors.pop();
    checkpoint(&source, support::LLAMA, &tensors);
    let out = dir.path().join("fixed12");
    ok(&["convert", path(&source), path(&out), "--to", "fixed12"]);
    assert!(ok(&["verify", path(&out), "--against", path(&source)]).contains("bit-identical"));
}

#[test]
fn units_that_dfloat11_cannot_hold_stay_raw_and_the_pattern_leaves_them_out() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    let mut tensors = tiny_llama();
    let infinite = tensors.iter_mut().find(|t| t.name.contains("layers.1.mlp.up_proj")).unwrap();
    infinite.bytes[..2].copy_from_slice(&0x7f80u16.to_le_bytes());
    checkpoint(&source, support::LLAMA, &tensors);
    let text = ok(&["convert", path(&source), path(&out), "--to", "dfloat11"]);
    assert!(text.contains("model.layers.1.mlp.up_proj.weight: exponent 255 occurs"), "{text}");
    let config = std::fs::read_to_string(out.join("config.json")).unwrap();
    assert!(config.contains(r"model\\.layers\\.(?:0)"), "{config}");
    assert!(ok(&["verify", path(&out), "--against", path(&source)]).contains("bit-identical"));
}

#[test]
fn sharded_sources_open_with_and_without_an_index() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    std::fs::create_dir(&source).unwrap();
    std::fs::write(source.join("config.json"), support::LLAMA).unwrap();
    let tensors = tiny_llama();
    let mut map = serde_json::Map::new();
    for (i, part) in tensors.chunks(5).enumerate() {
        let file = format!("model-{i}.safetensors");
        std::fs::write(source.join(&file), support::safetensors(part)).unwrap();
        map.extend(part.iter().map(|t| (t.name.clone(), file.clone().into())));
    }
    for with_index in [false, true] {
        if with_index {
            let index = serde_json::json!({"metadata": {}, "weight_map": map});
            std::fs::write(source.join("model.safetensors.index.json"), index.to_string()).unwrap();
        }
        let out = dir.path().join(format!("out-{with_index}"));
        ok(&["convert", path(&source), path(&out), "--to", "dfloat11", "--max-shard-size", "40K"]);
        assert!(ok(&["verify", path(&out), "--against", path(&source)]).contains("bit-identical"));
        let shards = support::files(&out).into_keys().filter(|n| n.ends_with(".safetensors")).count();
        assert!(shards > 1, "{shards}");
    }
}

#[test]
fn recipes_pattern_files_and_plans_do_what_they_say() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    checkpoint(&source, support::LLAMA, &tiny_llama());
    let recipe = dir.path().join("recipe.toml");
    std::fs::write(&recipe, "to = \"fixed12\"\n[[rule]]\ntensors = '.*q_proj.*'\nto = \"planes\"\n").unwrap();
    let out = dir.path().join("recipe");
    ok(&["convert", path(&source), path(&out), "--recipe", path(&recipe)]);
    let done = Checkpoint::open(&out).unwrap();
    let encoding = |c: &Checkpoint, name: &str| c.unit_of(c.tensor(name).unwrap()).unwrap().encoding().name();
    assert_eq!(encoding(&done, "model.layers.0.self_attn.q_proj.weight"), "planes");
    assert_eq!(encoding(&done, "model.layers.0.self_attn.o_proj.weight"), "fixed12");

    let patterns = dir.path().join("patterns.json");
    std::fs::write(
        &patterns,
        r#"{"model\\.layers\\.0": ["mlp.up_proj", "self_attn.q_proj"], "lm_head": []}"#,
    )
    .unwrap();
    let out = dir.path().join("patterns");
    ok(&["convert", path(&source), path(&out), "--to", "dfloat11", "--pattern-file", path(&patterns)]);
    let done = Checkpoint::open(&out).unwrap();
    let unit: Vec<&str> = done.units()["model.layers.0"].parts().iter().map(|p| p.name.as_str()).collect();
    assert_eq!(unit, ["model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"]);
    assert_eq!(encoding(&done, "model.layers.1.mlp.up_proj.weight"), "raw");

    let plan = dir.path().join("plan.json");
    std::fs::write(&plan, ok(&["plan", path(&source), "--to", "dfloat11", "--json"])).unwrap();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    ok(&["convert", path(&source), path(&a), "--plan", path(&plan)]);
    ok(&["convert", path(&source), path(&b), "--to", "dfloat11"]);
    same_files(&a, &b);
    checkpoint(&source, support::LLAMA, &tiny_llama()[1..]);
    let error = fails(&["convert", path(&source), path(&dir.path().join("c")), "--plan", path(&plan)]);
    assert!(error.contains("does not fit this checkpoint"), "{error}");
}

#[test]
fn rows_and_views_are_read_without_decoding_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(&tinylm()).unwrap();
    let name = "model.layers.3.mlp.gate_proj.weight";
    let whole = source.read_tensor(name).unwrap();
    let row = whole.len() / 768;
    for method in METHODS {
        let out = dir.path().join(method);
        ok(&["convert", path(&tinylm()), path(&out), "--to", method]);
        let done = Checkpoint::open(&out).unwrap();
        for rows in [0..1, 5..6, 0..768, 700..768, 15..49, 300..300] {
            let mut part = vec![0; (rows.end - rows.start) as usize * row];
            done.read_rows(name, rows.clone(), &mut part).unwrap();
            assert!(part == whole[rows.start as usize * row..rows.end as usize * row], "{method} {rows:?}");
        }
        // A buffer at an odd address.
        let mut odd = vec![0; row * 20 + 1];
        done.read_rows(name, 40..60, &mut odd[1..]).unwrap();
        assert!(odd[1..] == whole[40 * row..60 * row]);
        let tensor = done.tensor(name).unwrap();
        let unit = done.unit_of(tensor).unwrap();
        for (component, stored) in unit.components().iter() {
            assert_eq!(done.view(&tensor.unit, component).unwrap().len() as u64, stored.bytes());
        }
        assert!(done.read_rows(name, 768..769, &mut vec![0; row]).is_err());
        assert!(done.read(name, 1, &mut [0; 2]).is_err() || method == "planes", "{method}");
    }
}

#[test]
fn help_completions_and_manual_pages_are_there() {
    let dir = tempfile::tempdir().unwrap();
    assert!(ok(&["--help"]).contains("Exit codes"));
    assert!(ok(&["completions", "bash"]).contains("_llmpress"));
    ok(&["man", path(dir.path())]);
    assert!(dir.path().join("llmpress-convert.1").exists());
    assert_eq!(run(&["convert"]).status.code(), Some(2));
    assert_eq!(run(&["convert", "a", "b", "--to", "raw"]).status.code(), Some(1), "a does not exist");
    let usage = run(&["convert", path(&tinylm()), "b"]);
    assert_eq!(usage.status.code(), Some(2));
    let json = run(&["--json", "inspect", "absent"]);
    let error: serde_json::Value = serde_json::from_slice(&json.stderr).unwrap();
    assert_eq!(error["error"]["kind"], "io");
}

#[test]
fn bench_measures_every_method_and_runs_peers() {
    let dir = tempfile::tempdir().unwrap();
    let peer = dir.path().join("peer.sh");
    std::fs::write(&peer, "test -s \"$1\" && echo '{\"peer\": \"other\", \"ratio\": 0.5, \"compress_gbps\": 1.0, \"decompress_gbps\": 2.0}'\n").unwrap();
    let command = format!("sh {}", path(&peer));
    let text = ok(&["bench", path(&tinylm()), "--runs", "1", "--sample", "2M", "--peer", &command, "--json"]);
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    let methods: Vec<&str> =
        report["rows"].as_array().unwrap().iter().map(|r| r["method"].as_str().unwrap()).collect();
    assert_eq!(methods, ["copy", "zstd -3", "planes", "dfloat11", "fixed12", "archive", "other"]);
    assert!(fails(&["bench", path(&tinylm()), "--runs", "1", "--peer", "false"]).contains("failed"));
}
