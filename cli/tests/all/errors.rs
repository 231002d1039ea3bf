//! Bad input: each mistake has its own error, which names the file and says what to do, and nothing is
//! left half-written.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::Path;

use crate::support::{
    self, LLAMA, T, bf16, checkpoint, fails, path, random, run, safetensors, t, tiny_llama,
};
use llmpress_formats::Dtype;

/// Converts a directory made by `make` and returns the error.
fn error(make: impl FnOnce(&Path)) -> String {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    std::fs::create_dir(&source).unwrap();
    make(&source);
    let text = fails(&["convert", path(&source), path(&out), "--to", "dfloat11"]);
    assert!(!out.join("llmpress.json").exists());
    text
}

fn with_file(dir: &Path, bytes: &[u8]) {
    std::fs::write(dir.join("config.json"), LLAMA).unwrap();
    std::fs::write(dir.join("model.safetensors"), bytes).unwrap();
}

/// A file with this header and so many bytes of data.
fn raw(header: &str, data: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.resize(file.len() + data, 0);
    file
}

fn wants(text: &str, fragments: &[&str]) {
    for fragment in fragments {
        assert!(text.contains(fragment), "{fragment:?} is not in: {text}");
    }
}

#[test]
fn headers_that_break_the_format() {
    let one = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"a.weight":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    let two = |a: &str, b: &str| {
        let entry = |n: &str, o: &str| format!(r#""{n}":{{"dtype":"U8","shape":[4],"data_offsets":{o}}}"#);
        format!("{{{},{}}}", entry("a", a), entry("b", b))
    };
    let cases: Vec<(Vec<u8>, &[&str])> = vec![
        (vec![], &["model.safetensors", "too few"]),
        (vec![1, 2, 3], &["too few"]),
        (u64::MAX.to_le_bytes().to_vec(), &["at most 100000000"]),
        (100_000_001u64.to_le_bytes().to_vec(), &["at most 100000000"]),
        ([&1000u64.to_le_bytes()[..], b"{}"].concat(), &["claims a header of 1000 bytes", "cut short"]),
        (raw("[]", 0), &["does not start with '{'"]),
        (raw("{\"a\"", 0), &["not valid"]),
        (raw("{\"a\": 1}", 0), &["not valid"]),
        (raw(&one("BF16", "[2,2]", "[0,8]"), 4), &["a.weight", "cut short", "download"]),
        (raw(&one("BF16", "[2,2]", "[0,8]"), 12), &["its tensors end at"]),
        (raw(&one("BF16", "[2,2]", "[0,6]"), 6), &["a.weight", "has 6 bytes where [2, 2] of BF16 needs 8"]),
        (raw(&one("BF17", "[2]", "[0,4]"), 4), &["a.weight", "unknown dtype \"BF17\""]),
        (raw(&one("BF16", "[2]", "[4,0]"), 4), &["a.weight", "backwards"]),
        (
            raw(&one("BF16", "[18446744073709551615,4]", "[0,8]"), 8),
            &["a.weight", "no whole number of bytes"],
        ),
        (raw(&one("BF16", "[-1]", "[0,8]"), 8), &["not valid"]),
        (raw(&one("F4", "[3]", "[0,2]"), 2), &["no whole number of bytes"]),
        (raw(&one("U8", "[4]", "[4,8]"), 8), &["a.weight", "leaves a hole"]),
        (raw(&two("[0,4]", "[2,6]"), 6), &["b: overlaps"]),
        (raw(&two("[0,4]", "[6,10]"), 10), &["b: leaves a hole"]),
        (
            raw(
                r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#,
                2,
            ),
            &["a: stands in the header twice"],
        ),
        (raw(r#"{"__metadata__":{"a":1}}"#, 0), &["not valid"]),
    ];
    for (bytes, fragments) in cases {
        wants(&error(|dir| with_file(dir, &bytes)), fragments);
    }
}

#[test]
fn every_truncated_prefix_and_random_damage_is_refused_or_harmless() {
    let file = safetensors(&tiny_llama()[..3]);
    let dir = tempfile::tempdir().unwrap();
    let mut next = random(3);
    for _ in 0..60 {
        let len = next() as usize % file.len();
        with_file(dir.path(), &file[..len]);
        fails(&["inspect", path(dir.path())]);
    }
    let header = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    for _ in 0..60 {
        let mut changed = file.clone();
        let place = next() as usize % header;
        changed[place] = next() as u8;
        with_file(dir.path(), &changed);
        let output = run(&["inspect", path(dir.path())]);
        assert!(matches!(output.status.code(), Some(0 | 1)));
    }
}

#[test]
fn directories_and_indexes_that_do_not_fit() {
    let index =
        |dir: &Path, text: &str| std::fs::write(dir.join("model.safetensors.index.json"), text).unwrap();
    let shard =
        |dir: &Path, name: &str, tensors: &[T]| std::fs::write(dir.join(name), safetensors(tensors)).unwrap();
    let a = || t("a.weight", Dtype::BF16, &[4], bf16(1, 4));
    let b = || t("b.weight", Dtype::BF16, &[4], bf16(2, 4));
    wants(&error(|_| {}), &["holds no safetensors files"]);
    wants(
        &error(|d| std::fs::write(d.join("tf_model.h5"), "x").unwrap()),
        &["tf_model.h5", "convert them to safetensors"],
    );
    wants(
        &error(|d| std::fs::write(d.join("pytorch_model.bin"), "x").unwrap()),
        &["pytorch_model.bin", "is no whole zip file"],
    );
    wants(
        &error(|d| index(d, r#"{"weight_map": {"a.weight": "model-1.safetensors"}}"#)),
        &["model-1.safetensors", "is missing", "1 tensors, such as a.weight"],
    );
    for bad in ["../model.safetensors", "/etc/model.safetensors", "", "..", "a\\\\b"] {
        let text = error(|d| {
            shard(d, "model.safetensors", &[a()]);
            index(d, &format!(r#"{{"weight_map": {{"a.weight": "{bad}"}}}}"#));
        });
        wants(&text, &["a.weight", "not a file of this directory"]);
    }
    let named = |map: &str| {
        error(|d| {
            shard(d, "1.safetensors", &[a()]);
            shard(d, "2.safetensors", &[b()]);
            index(d, &format!(r#"{{"weight_map": {map}}}"#));
        })
    };
    wants(
        &named(r#"{"a.weight": "1.safetensors", "c.weight": "2.safetensors"}"#),
        &["c.weight", "nearest name is"],
    );
    wants(&named(r#"{"a.weight": "2.safetensors", "b.weight": "1.safetensors"}"#), &["correct the index"]);
    wants(&named(r#"{"a.weight": "1.safetensors", "a.weight": "2.safetensors"}"#), &["listed twice"]);
    wants(&named("[]"), &["not a valid index"]);
    wants(&named("{"), &["index.json", "not a valid index"]);
    let unlisted = error(|d| {
        shard(d, "1.safetensors", &[a(), b()]);
        index(d, r#"{"weight_map": {"a.weight": "1.safetensors"}}"#);
    });
    wants(&unlisted, &["b.weight", "not listed by the index"]);
    let twice = error(|d| {
        shard(d, "1.safetensors", &[a()]);
        shard(d, "2.safetensors", &[a()]);
    });
    wants(&twice, &["a.weight", "is also in 1.safetensors"]);
    wants(&fails(&["inspect", "no/such/place"]), &["no/such/place", "No such file"]);
    let file = tempfile::NamedTempFile::new().unwrap();
    wants(&fails(&["inspect", path(file.path())]), &["give the directory"]);
}

#[test]
fn configurations_and_dtypes_that_do_not_fit() {
    let config = |text: &'static str| error(move |d| checkpoint(d, text, &tiny_llama()));
    wants(&config("{"), &["config.json", "not valid JSON"]);
    wants(&config("[1]"), &["config.json", "must hold a JSON object"]);
    let absent = error(|d| {
        checkpoint(d, LLAMA, &tiny_llama());
        std::fs::remove_file(d.join("config.json")).unwrap();
    });
    wants(&absent, &["config.json is missing"]);
    let f32s =
        error(|d| checkpoint(d, LLAMA, &[t("model.layers.0.a.weight", Dtype::F32, &[4, 4], vec![0; 64])]));
    wants(&f32s, &["holds BF16", "1 F32 (such as model.layers.0.a.weight)", "--to planes"]);
    let no_blocks = error(|d| {
        checkpoint(d, "{\"model_type\": \"new\"}", &[t("a.weight", Dtype::BF16, &[64, 64], bf16(1, 4096))])
    });
    wants(&no_blocks, &["no BF16 linears in repeated blocks", "--pattern-file"]);
    // An architecture that nobody listed goes by the generic rule.
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("s"), dir.path().join("o"));
    let tensors = [t("net.h.0.mixer.in.weight", Dtype::BF16, &[128, 64], bf16(1, 8192))];
    checkpoint(&source, "{\"model_type\": \"new\"}", &tensors);
    assert!(support::ok(&["plan", path(&source), "--to", "dfloat11", "--tensors"]).contains("net.h.0"));
    support::ok(&["convert", path(&source), path(&out), "--to", "dfloat11"]);

    let recipe = dir.path().join("recipe.toml");
    let by_recipe = |text: &str| {
        std::fs::write(&recipe, text).unwrap();
        fails(&["plan", path(&source), "--recipe", path(&recipe)])
    };
    wants(&by_recipe("to = \"dfloat12\""), &["recipe.toml", "dfloat12"]);
    wants(&by_recipe("to = \"planes\"\nextra = 1"), &["extra"]);
    wants(&by_recipe("to = \"planes\"\n[[rule]]\ntensors = '('\nto = \"raw\""), &["rule \"(\""]);
    wants(&by_recipe("to = \"planes\"\n[[rule]]\ntensors = 'absent'\nto = \"raw\""), &["matches no tensor"]);
    let mixed = dir.path().join("mixed");
    let bias = t("bias", Dtype::F32, &[4, 4], vec![0; 64]);
    checkpoint(&mixed, LLAMA, &[tensors[0].clone(), bias]);
    std::fs::write(&recipe, "to = \"planes\"\n[[rule]]\ntensors = 'bias'\nto = \"fixed12\"").unwrap();
    wants(&fails(&["plan", path(&mixed), "--recipe", path(&recipe)]), &["bias is F32", "BF16 only"]);
    let patterns = dir.path().join("p.json");
    let by_patterns = |text: &str| {
        std::fs::write(&patterns, text).unwrap();
        fails(&["plan", path(&mixed), "--to", "dfloat11", "--pattern-file", path(&patterns)])
    };
    wants(&by_patterns("{"), &["p.json", "not valid JSON"]);
    wants(&by_patterns(r#"{"net\\.h\\.7": ["mixer.in"]}"#), &["matches no module"]);
    wants(
        &by_patterns(r#"{"net\\.h\\.0": ["mixer.out"]}"#),
        &["net.h.0.mixer.out.weight", "nearest is net.h.0.mixer.in.weight"],
    );
}

#[test]
fn manifests_that_do_not_fit() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    checkpoint(&source, LLAMA, &tiny_llama());
    support::ok(&["convert", path(&source), path(&out), "--to", "planes"]);
    let file = out.join("llmpress.json");
    let text = std::fs::read_to_string(&file).unwrap();
    let refused = |changed: String| {
        std::fs::write(&file, changed).unwrap();
        fails(&["inspect", path(&out)])
    };
    let version = |said: &str| {
        let (major, minor) = llmpress_formats::FORMAT_VERSION;
        let of_ours = format!("\"{major}.{minor}\"");
        assert!(text.contains(&of_ours));
        text.replace(&of_ours, &format!("\"{said}\""))
    };
    wants(&refused(version("2.0")), &["format version 2.0", "newer llmpress"]);
    wants(&refused(version("one")), &["not major.minor"]);
    wants(&refused(text.replace("\"planes\"", "\"planks\"")), &["was changed after it was written"]);
    wants(&refused("{}".to_owned()), &["is not a manifest"]);
    wants(&refused(text[..text.len() / 2].to_owned()), &["is not a manifest"]);
    // With a digest that is right again, unknown encodings are refused by name.
    let mut manifest: llmpress_formats::Manifest = serde_json::from_str(&text).unwrap();
    for unit in manifest.units.values_mut() {
        if unit.encoding.value()["name"] == "planes" {
            unit.encoding = serde_json::json!({"name": "marlin", "bits": 2}).into();
        }
    }
    let again = String::from_utf8(manifest.to_bytes().unwrap()).unwrap();
    wants(&refused(again), &["encoding \"marlin\" is not known", "newer llmpress"]);
    // So is what a manifest requires, before anything else of it is read.
    let mut manifest: llmpress_formats::Manifest = serde_json::from_str(&text).unwrap();
    manifest.requires.push("turned_twice".to_owned());
    let again = String::from_utf8(manifest.to_bytes().unwrap()).unwrap();
    wants(&refused(again), &["requires \"turned_twice\"", "newer llmpress"]);
}

#[test]
fn too_little_memory_and_unwritable_places() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    checkpoint(&source, LLAMA, &tiny_llama());
    let out = dir.path().join("out");
    let text = fails(&["convert", path(&source), path(&out), "--to", "planes", "--max-memory", "1M"]);
    wants(&text, &["needs at least", "--max-memory allows 1 MiB"]);
    assert!(!out.exists());
    wants(
        &fails(&["convert", path(&source), "/proc/llmpress-out", "--to", "planes"]),
        &["/proc/llmpress-out", "cannot create"],
    );
}

/// A disk of 300 KB, where the system lets an ordinary process have one.
#[test]
fn a_full_disk_is_an_error_that_resume_mends() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    // Noise does not shrink, so less is expected than is needed.
    let noise = |name: &str| t(name, Dtype::U8, &[200_000], support::bytes(1, 200_000));
    checkpoint(&source, LLAMA, &[noise("a"), noise("b")]);
    let script = format!(
        "mkdir m && mount -t tmpfs -o size=330k none m || exit 77
         {exe} convert source m/out --to planes --max-shard-size 250K; echo first $?
         ls -a m/out
         mount -o remount,size=4m m && {exe} convert source m/out --to planes --max-shard-size 250K --resume; echo then $?
         {exe} verify m/out --against source",
        exe = env!("CARGO_BIN_EXE_llmpress")
    );
    let output = std::process::Command::new("unshare")
        .args(["-r", "-m", "sh", "-c", &script])
        .current_dir(dir.path())
        .output();
    let Ok(output) = output else { return };
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    if !text.contains("first") {
        eprintln!("no file system may be mounted here: not tested");
        return;
    }
    wants(&text, &["first 1", "free some space and run again with --resume", "then 0", "bit-identical"]);
    assert!(!text.contains("panicked"), "{text}");
}
