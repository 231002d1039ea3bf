//! Pruning from the command line: rank, convert, prove, restore.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::Path;

use crate::support::{self, ok, path, run, tinylm};
use serde_json::Value;

fn calib() -> String {
    path(&tinylm().join("calib.txt")).to_owned()
}

fn convert(out: &Path, to: &str, more: &[&str]) {
    let (model, calib) = (tinylm(), calib());
    let mut args = vec!["convert", path(&model), path(out), "--to", to, "--quiet"];
    if !more.contains(&"--ranking") && !to.contains("random") && !to.contains("last") {
        args.extend(["--calib", calib.as_str(), "--calib-windows", "1", "--calib-window", "48"]);
    }
    args.extend(more);
    ok(&args);
}

fn json_file(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn pruned_checkpoints_are_proven_against_their_source() {
    let dir = tempfile::tempdir().unwrap();
    let model = tinylm();
    let text = path(&model.join("eval.txt")).to_owned();
    for (to, more, has_lists) in [
        ("drop:attn=2+dfloat11", &[][..], true),
        ("drop:mlp=1", &["--portable"], false),
        ("drop:block=2+fixed12", &[], false),
        ("drop:joint=4,iterative+planes", &[], true),
        ("finercut:2,distance=js", &[], true),
        ("drop:random=3,seed=2", &[], true),
        ("drop:last=2+dfloat11", &[], false),
    ] {
        let out = dir.path().join(to.replace([':', ',', '=', '+'], "_"));
        convert(&out, to, more);
        let config = json_file(&out.join("config.json"));
        assert_eq!(config["drop_attn_list"].is_array(), has_lists, "{to}");
        let found = ok(&[
            "verify",
            path(&out),
            "--against",
            path(&model),
            "--logits",
            "--text",
            &text,
            "--limit",
            "1",
        ]);
        assert!(found.contains("pruned") && found.matches("bit-identical").count() == 2, "{to}: {found}");
        assert!(json_file(&out.join("pruning.json"))["removed"].is_array());
        let manifest = json_file(&out.join("llmpress.json"));
        assert_eq!(manifest["dropped"].as_object().unwrap().is_empty(), to == "drop:mlp=1", "{to}");
        // A plain checkpoint of what is left, with the same words.
        if to.contains('+') {
            let back = out.with_extension("back");
            ok(&["restore", path(&out), path(&back), "--quiet"]);
            assert!(ok(&["verify", path(&back), "--against", path(&out)]).contains("bit-identical"));
            assert_eq!(json_file(&back.join("config.json"))["drop_attn_list"], config["drop_attn_list"]);
        }
    }
    let blocks = json_file(&dir.path().join("drop_block_2_fixed12/config.json"));
    assert_eq!(blocks["num_hidden_layers"], 6);
    assert_eq!(json_file(&dir.path().join("drop_last_2_dfloat11/config.json"))["num_hidden_layers"], 7);
}

#[test]
fn prunings_of_families_with_names_of_their_own_are_proven_against_their_source() {
    let dir = tempfile::tempdir().unwrap();
    let golden = tinylm().join("../../model/tests/golden");
    for (family, layers) in [
        ("cohere2", "num_hidden_layers"),
        ("gemma2", "num_hidden_layers"),
        ("glm4", "num_hidden_layers"),
        ("gpt2", "n_layer"),
        ("olmo2", "num_hidden_layers"),
        ("smollm3", "num_hidden_layers"),
        ("starcoder2", "num_hidden_layers"),
    ] {
        let source = golden.join(family);
        for (to, more) in [
            ("drop:random=2,seed=2+planes", &[][..]),
            ("drop:random=2,seed=2+planes", &["--portable"]),
            ("drop:last=2+planes", &[]),
        ] {
            let out = dir.path().join(format!("{family}-{}-{}", &to[5..9], more.len()));
            ok(&[&["convert", path(&source), path(&out), "--to", to, "--quiet"], more].concat());
            let found = ok(&["verify", path(&out), "--against", path(&source)]);
            assert!(found.contains("pruned") && found.contains("bit-identical"), "{family} {to}: {found}");
        }
        let count = |dir: &Path| json_file(&dir.join("config.json"))[layers].as_u64().unwrap();
        assert_eq!(count(&dir.path().join(format!("{family}-last-0"))) + 1, count(&source), "{family}");
    }
}

#[test]
fn a_ranking_is_saved_drawn_and_used_again() {
    let dir = tempfile::tempdir().unwrap();
    let (model, calib) = (tinylm(), calib());
    let (ranking, picture) = (dir.path().join("r.json"), dir.path().join("r.svg"));
    let rank = [
        "rank",
        path(&model),
        "--by",
        "finercut:3",
        "--calib",
        &calib,
        "--calib-windows",
        "1",
        "--calib-window",
        "48",
    ];
    let files = ["--out", path(&ranking), "--svg", path(&picture), "--json"];
    let printed: Value = serde_json::from_str(&ok(&[&rank[..], &files].concat())).unwrap();
    assert_eq!(printed, json_file(&ranking));
    assert_eq!(printed["removed"].as_array().unwrap().len(), 3);
    assert!(std::fs::read_to_string(&picture).unwrap().contains("Jensen-Shannon divergence"));
    // The same search, and the same ranking read, give the same bytes.
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    convert(&a, "finercut:2", &["--ranking", path(&ranking)]);
    convert(&b, "finercut:2", &[]);
    let shard = "model-00001-of-00001.safetensors";
    assert_eq!(std::fs::read(a.join(shard)).unwrap(), std::fs::read(b.join(shard)).unwrap());
    // Going on from a finished search costs nothing and changes nothing.
    let resumed = [&rank[..], &["--out", path(&ranking), "--resume", "--json"]].concat();
    assert_eq!(serde_json::from_str::<Value>(&ok(&resumed)).unwrap(), printed);
    // A plan shows what goes, and is carried out.
    let plan = dir.path().join("plan.json");
    let planned = ["plan", path(&model), "--to", "finercut:2+dfloat11", "--ranking", path(&ranking)];
    assert!(ok(&planned).contains("pruned: "));
    std::fs::write(&plan, ok(&[&planned[..], &["--json"]].concat())).unwrap();
    let c = dir.path().join("c");
    ok(&["convert", path(&model), path(&c), "--plan", path(&plan), "--quiet"]);
    assert!(ok(&["verify", path(&c), "--against", path(&model)]).contains("bit-identical"));
    // A recipe names layers itself.
    let recipe = dir.path().join("recipe.toml");
    std::fs::write(&recipe, "to = \"fixed12\"\n[prune]\nattention = [6, 7]\nmlp = [7]\n").unwrap();
    let d = dir.path().join("d");
    ok(&["convert", path(&model), path(&d), "--recipe", path(&recipe), "--quiet"]);
    assert_eq!(json_file(&d.join("config.json"))["drop_attn_list"], serde_json::json!([6, 7]));
    assert!(ok(&["verify", path(&d), "--against", path(&model)]).contains("bit-identical"));
}

#[test]
fn chains_of_prunings_are_proven_against_their_source() {
    let dir = tempfile::tempdir().unwrap();
    let model = tinylm();
    let text = path(&model.join("eval.txt")).to_owned();
    let source = llmpress_formats::Checkpoint::open(&model).unwrap();
    let tensors =
        |part: &str| source.tensors().keys().filter(|n| n.contains(".layers.0.") && n.contains(part)).count();
    let (attention, all) = (tensors("self_attn") + tensors("input_layernorm"), tensors(""));
    for (number, (to, gone)) in [
        ("drop:attn=2+drop:mlp=1+dfloat11", 2 * attention + (all - attention)),
        // Layers are renumbered in between: what goes is told by the names of the source all the same.
        ("drop:block=2+drop:attn=2+drop:block=1+fixed12", 2 * all + 2 * attention + all),
        ("drop:mlp=1,portable+drop:attn=1", attention),
    ]
    .into_iter()
    .enumerate()
    {
        let out = dir.path().join(number.to_string());
        convert(&out, to, &[]);
        let prove =
            ["verify", path(&out), "--against", path(&model), "--logits", "--text", &text, "--limit", "1"];
        let found = ok(&prove);
        assert!(found.matches("bit-identical").count() == 2, "{to}: {found}");
        let manifest = json_file(&out.join("llmpress.json"));
        assert_eq!(
            manifest["recipe"]["passes"].as_array().unwrap().len(),
            to.matches("drop").count(),
            "{to}"
        );
        let dropped = manifest["dropped"].as_object().unwrap();
        assert_eq!(dropped.len(), gone, "{to}");
        assert!(dropped.keys().all(|name| source.tensors().contains_key(name)), "{to}");
        assert!(json_file(&out.join("pruning.json"))["removed"].is_array());
        assert!(json_file(&out.join("pruning-2.json"))["removed"].is_array());
    }
    // A recipe says the same.
    let recipe = dir.path().join("recipe.toml");
    std::fs::write(&recipe, "passes = [\"drop:attn=2\", \"drop:mlp=1\"]\nto = \"dfloat11\"\n").unwrap();
    let (out, calib) = (dir.path().join("by-recipe"), calib());
    ok(&[
        "convert",
        path(&model),
        path(&out),
        "--recipe",
        path(&recipe),
        "--calib",
        &calib,
        "--calib-windows",
        "1",
        "--calib-window",
        "48",
        "--quiet",
    ]);
    support::same_files(&out, &dir.path().join("0"));
}

#[test]
fn calibration_texts_are_any_number_of_files_and_a_seed_draws_from_all() {
    let dir = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(calib()).unwrap();
    let (first, rest) = text.split_at(text.find("\n\n").unwrap());
    let (one, two) = (dir.path().join("one.txt"), dir.path().join("two.jsonl"));
    std::fs::write(&one, first).unwrap();
    std::fs::write(&two, serde_json::json!({"text": rest}).to_string()).unwrap();
    let rank = |more: &[&str]| {
        let (model, one, two) = (tinylm(), path(&one).to_owned(), path(&two).to_owned());
        let args = ["rank", path(&model), "--by", "drop:attn", "--calib", &one, "--calib", &two, "--json"];
        ok(&[&args[..], &["--calib-windows", "2", "--calib-window", "32"], more].concat())
    };
    let first = rank(&[]);
    assert_eq!(rank(&["--calib-seed", "3"]), rank(&["--calib-seed", "3"]));
    assert!(
        rank(&["--calib-seed", "3"]) != first && rank(&["--calib-seed", "4"]) != rank(&["--calib-seed", "3"])
    );
}

#[test]
fn plans_need_no_text_and_one_with_open_passes_is_no_job() {
    let dir = tempfile::tempdir().unwrap();
    let model = tinylm();
    let text = ok(&["plan", path(&model), "--to", "drop:attn=2+finercut:25%+dfloat11"]);
    for words in ["2 of 8 attentions go", "4 of 14 sub-layers go", "forward passes over 10 windows", "memory"]
    {
        assert!(text.contains(words), "{text}");
    }
    let plan = dir.path().join("plan.json");
    std::fs::write(&plan, ok(&["plan", path(&model), "--to", "drop:attn=2+dfloat11", "--json"])).unwrap();
    let out = dir.path().join("out");
    let error = support::fails(&["convert", path(&model), path(&out), "--plan", path(&plan)]);
    assert!(error.contains("still to be worked out") && !out.exists(), "{error}");
}

#[test]
fn mistakes_are_said_before_anything_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let (model, calib) = (tinylm(), calib());
    let out = dir.path().join("out");
    let refused = |more: &[&str]| {
        let output = run(&[&["convert", path(&model), path(&out)], more].concat());
        assert!(matches!(output.status.code(), Some(1 | 2)), "{more:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    for (more, words) in [
        (
            &["--to", "drop:attn=9", "--calib", &calib, "--calib-windows", "1"][..],
            "9 attentions cannot be removed: there are 8",
        ),
        (&["--to", "finercut:17", "--calib", &calib], "17 sub-layers cannot be removed: there are 16"),
        (&["--to", "drop:attn=2", "--calib", &calib, "--calib-windows", "100000"], "give a longer text"),
        (&["--to", "drop:attn=2"], "give one with --calib"),
        (&["--to", "drop:heads=2", "--calib", &calib], "no such target"),
        (&["--to", "dfloat11", "--calib", &calib], "for prunings"),
        (&["--to", "dfloat11", "--portable"], "for prunings"),
        (&["--to", "dfloat11+drop:attn=2", "--calib", &calib], "comes last"),
        (&["--to", "drop:attn=2", "--calib-windows", "3"], "goes with --calib"),
        (&["--to", "drop:attn=2", "--calib", path(&dir.path().join("none.txt"))], "none.txt"),
    ] {
        let error = refused(more);
        assert!(error.contains(words), "{more:?}: {error}");
        assert!(!out.exists());
    }
    let other = dir.path().join("r.json");
    ok(&[
        "rank",
        path(&model),
        "--by",
        "drop:attn",
        "--calib",
        &calib,
        "--calib-windows",
        "1",
        "--out",
        path(&other),
        "--quiet",
    ]);
    let error = refused(&["--to", "drop:mlp=2", "--ranking", path(&other)]);
    assert!(error.contains("ranks by drop:attn, not by drop:mlp"), "{error}");
    let recipe = dir.path().join("recipe.toml");
    std::fs::write(&recipe, "to = \"raw\"\n[prune]\nattention = [8]\n").unwrap();
    assert!(refused(&["--recipe", path(&recipe)]).contains("no layer 8"));
}

#[test]
fn rank_resumes_only_the_model_it_began_with() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    std::fs::create_dir(&model).unwrap();
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"] {
        std::fs::copy(tinylm().join(name), model.join(name)).unwrap();
    }
    let (out, calib) = (dir.path().join("r.json"), calib());
    let rank = |count: &str| {
        let by = format!("finercut:{count}");
        let more = ["--calib-windows", "1", "--calib-window", "16", "--resume", "--quiet"];
        run(&[&["rank", path(&model), "--by", &by, "--calib", &calib, "--out", path(&out)], &more[..]]
            .concat())
    };
    assert!(rank("1").status.success());
    let first = std::fs::read(&out).unwrap();
    assert!(rank("1").status.success());
    // Other weights under the same names and shapes: neither gone on with nor called done.
    let mut bytes = std::fs::read(model.join("model.safetensors")).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(model.join("model.safetensors"), bytes).unwrap();
    for count in ["1", "2"] {
        let output = rank(count);
        assert_eq!(output.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&output.stderr).contains("another model"));
        assert_eq!(std::fs::read(&out).unwrap(), first);
    }
}

#[test]
fn a_ranking_fits_the_model_it_was_made_of_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (ranking, old, other, calib) = (at("r.json"), at("old.json"), at("other"), calib());
    let model = tinylm();
    let rank =
        ["rank", path(&model), "--by", "drop:attn", "--calib", &calib, "--calib-windows", "1", "--quiet"];
    ok(&[&rank[..], &["--out", path(&ranking)]].concat());
    // The same layers, other weights.
    std::fs::create_dir(&other).unwrap();
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"] {
        std::fs::copy(model.join(name), other.join(name)).unwrap();
    }
    let mut bytes = std::fs::read(other.join("model.safetensors")).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(other.join("model.safetensors"), bytes).unwrap();
    let out = at("out");
    for args in [&["plan", path(&other)][..], &["convert", path(&other), path(&out)]] {
        let args = [args, &["--to", "drop:attn=2+raw", "--ranking", path(&ranking)]].concat();
        let error = support::fails(&args);
        assert!(error.contains("other weights") && error.contains("llmpress rank"), "{error}");
    }
    assert!(!out.exists());
    // The same model in another encoding is the same model.
    let packed = at("packed");
    ok(&["convert", path(&model), path(&packed), "--to", "dfloat11", "--quiet"]);
    for (number, source) in [&model, &packed].into_iter().enumerate() {
        let out = at(&number.to_string());
        ok(&[
            "convert",
            path(source),
            path(&out),
            "--to",
            "drop:attn=2+planes",
            "--ranking",
            path(&ranking),
            "--quiet",
        ]);
    }
    // A ranking of an earlier version does not say whose it is.
    let mut value = json_file(&ranking);
    value.as_object_mut().unwrap().remove("model").unwrap();
    std::fs::write(&old, value.to_string()).unwrap();
    let output = run(&["plan", path(&other), "--to", "drop:attn=2+raw", "--ranking", path(&old)]);
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("does not say which model"));
}
