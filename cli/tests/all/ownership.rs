//! An output belongs to its source: what is there is believed only after a look, and nobody else's files are touched.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::support::{self, T, checkpoint, fails, files, ok, path, same_files, t, tiny_llama};
use llmpress_formats::{Dtype, Manifest};

/// A small source with a tokenizer.
fn source(dir: &Path, tensors: &[T]) {
    checkpoint(dir, support::LLAMA, tensors);
    std::fs::write(dir.join("tokenizer.json"), "{\"version\": \"1.0\"}").unwrap();
}

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let place = Self { dir: tempfile::tempdir().unwrap() };
        source(&place.at("source"), &tiny_llama());
        place
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn convert(&self, from: &str, to: &str, more: &[&str]) -> String {
        ok(&[&["convert", path(&self.at(from)), path(&self.at(to))], more].concat())
    }

    fn refused(&self, from: &str, to: &str, more: &[&str]) -> String {
        let before = files(&self.at(to));
        let error = fails(&[&["convert", path(&self.at(from)), path(&self.at(to))], more].concat());
        assert_eq!(files(&self.at(to)), before, "nothing is touched: {error}");
        error
    }
}

const PLANES: [&str; 2] = ["--to", "planes"];
const RESUME: [&str; 3] = ["--to", "planes", "--resume"];
const FORCE: [&str; 3] = ["--to", "planes", "--force"];

#[test]
fn resume_refuses_another_source() {
    let place = Place::new();
    place.convert("source", "out", &PLANES);
    type Change = fn(&mut Vec<T>);
    let others: [(&str, Change); 4] = [
        ("another weight", |all| all[3].bytes[7] ^= 1),
        ("another shape", |all| all[0].shape = vec![32, 128]),
        ("one tensor less", |all| drop(all.pop())),
        ("one more", |all| all.push(t("more", Dtype::U8, &[1], vec![1]))),
    ];
    for (what, change) in others {
        let mut tensors = tiny_llama();
        change(&mut tensors);
        source(&place.at("other"), &tensors);
        let error = place.refused("other", "out", &RESUME);
        for word in ["another source", "--force", "another output directory"] {
            assert!(error.contains(word), "{what}: {error}");
        }
    }
    for (file, text) in
        [("config.json", r#"{"model_type": "llama", "hidden_size": 64}"#), ("tokenizer.json", "{}")]
    {
        source(&place.at("other"), &tiny_llama());
        std::fs::write(place.at("other").join(file), text).unwrap();
        let error = place.refused("other", "out", &RESUME);
        assert!(error.contains("another source") && error.contains(file), "{error}");
    }
    // The same files in another place are the same source.
    source(&place.at("moved"), &tiny_llama());
    assert!(place.convert("moved", "out", &RESUME).contains("were there already"));
    ok(&["verify", path(&place.at("out")), "--against", path(&place.at("source"))]);
}

#[test]
fn resume_refuses_another_layout_recipe_or_damage() {
    let place = Place::new();
    place.convert("source", "out", &["--to", "planes", "--max-shard-size", "60K"]);
    let error = place.refused("source", "out", &RESUME);
    assert!(error.contains("--max-shard-size") && error.contains("--force"), "{error}");
    let error = place.refused("source", "out", &["--to", "fixed12", "--max-shard-size", "60K", "--resume"]);
    assert!(error.contains("another recipe"), "{error}");
    let again = ["--to", "planes", "--max-shard-size", "60K", "--resume"];
    place.convert("source", "out", &again);
    let whole = files(&place.at("out"));
    for (name, content) in &whole {
        if name == "llmpress.json" {
            continue;
        }
        let file = place.at("out").join(name);
        for position in [0, content.len() / 2, content.len() - 1] {
            let mut changed = content.clone();
            changed[position] ^= 4;
            std::fs::write(&file, &changed).unwrap();
            let error = place.refused("source", "out", &again);
            assert!(error.contains("already holds") && error.contains("--force"), "{name}: {error}");
        }
        std::fs::remove_file(&file).unwrap();
        place.refused("source", "out", &again);
        std::fs::write(&file, content).unwrap();
    }
    place.convert("source", "out", &again);
}

#[test]
fn resume_refuses_what_another_version_made() {
    let place = Place::new();
    place.convert("source", "out", &PLANES);
    let changes: [fn(&mut Manifest); 2] =
        [|m| m.format_version = "1.0".to_owned(), |m| m.producer.version = "0.0.1".to_owned()];
    for change in changes {
        let mut manifest = Manifest::read(&place.at("out")).unwrap().unwrap();
        change(&mut manifest);
        std::fs::write(place.at("out/llmpress.json"), manifest.to_bytes().unwrap()).unwrap();
        let error = place.refused("source", "out", &RESUME);
        assert!(error.contains("--force") && error.contains("made "), "{error}");
        place.convert("source", "out", &FORCE);
    }
}

#[test]
fn resume_of_a_conversion_from_a_compressed_source_compares_too() {
    let place = Place::new();
    place.convert("source", "a", &["--to", "dfloat11"]);
    place.convert("a", "out", &PLANES);
    assert!(place.convert("a", "out", &RESUME).contains("were there already"));
    let mut tensors = tiny_llama();
    tensors[3].bytes[7] ^= 1;
    source(&place.at("other"), &tensors);
    place.convert("other", "b", &["--to", "dfloat11"]);
    assert!(place.refused("b", "out", &RESUME).contains("another source"));
}

#[test]
fn force_removes_what_the_earlier_job_made_and_nothing_else() {
    let place = Place::new();
    std::fs::write(place.at("source/chat_template.jinja"), "A").unwrap();
    place.convert("source", "out", &["--to", "planes", "--max-shard-size", "60K"]);
    let out = place.at("out");
    // A person's own files, whatever their names.
    let own =
        ["notes.txt", "model-of-mine.safetensors", "model.backup.safetensors", "model-1.safetensors.tmp"];
    for name in own {
        std::fs::write(out.join(name), "mine").unwrap();
    }
    std::fs::remove_file(place.at("source/chat_template.jinja")).unwrap();
    let text = place.convert("source", "out", &["--to", "fixed12", "--force"]);
    assert!(text.contains("removed of an earlier job") && text.contains("chat_template.jinja"), "{text}");
    place.convert("source", "fresh", &["--to", "fixed12"]);
    for name in own {
        assert_eq!(std::fs::read(out.join(name)).unwrap(), b"mine");
        std::fs::remove_file(out.join(name)).unwrap();
    }
    same_files(&out, &place.at("fresh"));
}

#[test]
fn a_persons_file_in_the_way_is_not_overwritten() {
    let place = Place::new();
    place.convert("source", "out", &PLANES);
    std::fs::write(place.at("source/README.md"), "theirs").unwrap();
    std::fs::write(place.at("out/README.md"), "mine").unwrap();
    let error = place.refused("source", "out", &FORCE);
    assert!(error.contains("README.md") && error.contains("in the way"), "{error}");
    // A folder is never what a job made, whatever the manifest says.
    std::fs::remove_file(place.at("out/README.md")).unwrap();
    std::fs::remove_file(place.at("out/tokenizer.json")).unwrap();
    std::fs::create_dir(place.at("out/tokenizer.json")).unwrap();
    let error =
        fails(&["convert", path(&place.at("source")), path(&place.at("out")), "--to", "planes", "--force"]);
    assert!(error.contains("tokenizer.json") && error.contains("in the way"), "{error}");
}

#[test]
fn force_never_deletes_its_source() {
    let place = Place::new();
    place.convert("source", "out", &["--to", "raw"]);
    // A source that consists of links into the output.
    let linked = place.at("linked");
    std::fs::create_dir(&linked).unwrap();
    symlink("../out/model-00001-of-00001.safetensors", linked.join("model.safetensors")).unwrap();
    std::fs::copy(place.at("source/config.json"), linked.join("config.json")).unwrap();
    let error = place.refused("linked", "out", &FORCE);
    assert!(error.contains("model.safetensors") && error.contains("another output"), "{error}");
    // The same file by a second name.
    std::fs::remove_file(linked.join("model.safetensors")).unwrap();
    std::fs::hard_link(place.at("out/model-00001-of-00001.safetensors"), linked.join("model.safetensors"))
        .unwrap();
    let error = place.refused("linked", "out", &FORCE);
    assert!(error.contains("is also model.safetensors of the source"), "{error}");
}

#[test]
fn a_run_killed_while_removing_can_go_on_or_start_over() {
    let place = Place::new();
    place.convert("source", "fresh", &PLANES);
    for remove in 0..6 {
        for way in ["--force", "--resume"] {
            let out = place.at("out");
            let _ = std::fs::remove_dir_all(&out);
            place.convert("source", "out", &["--to", "fixed12", "--max-shard-size", "60K"]);
            // What `--force` leaves when it is killed after so many removals: the manifest first, then the rest.
            let manifest = Manifest::read(&out).unwrap().unwrap();
            let mut names: Vec<String> = vec!["llmpress.json".to_owned()];
            names.extend(manifest.file_names().cloned());
            std::fs::create_dir(out.join(".llmpress")).unwrap();
            let journal = serde_json::json!({"remove": names, "write": []});
            std::fs::write(out.join(".llmpress/files.json"), journal.to_string()).unwrap();
            std::fs::write(out.join(".llmpress-0123456789abcdef.tmp"), "half").unwrap();
            for name in &names[..remove] {
                std::fs::remove_file(out.join(name)).unwrap();
            }
            let error = place.refused("source", "out", &PLANES);
            assert!(error.contains("unfinished"), "{error}");
            place.convert("source", "out", &["--to", "planes", way]);
            same_files(&place.at("fresh"), &out);
        }
    }
}

#[test]
fn a_damaged_source_is_never_published_as_good() {
    let place = Place::new();
    place.convert("source", "a", &["--to", "dfloat11", "--max-shard-size", "60K"]);
    let whole = files(&place.at("a"));
    for (name, content) in &whole {
        let file = place.at("a").join(name);
        // White space that parses all the same, where there is some; else any byte.
        let position = content.iter().position(|&b| b == b' ').unwrap_or(content.len() / 2);
        let mut changed = content.clone();
        changed[position] = if changed[position] == b' ' { b'\t' } else { changed[position] ^ 1 };
        std::fs::write(&file, &changed).unwrap();
        for verb in [&["restore"][..], &["convert", "--to", "planes"]] {
            let out = place.at("b");
            let error = fails(&[&verb[..1], &[path(&place.at("a")), path(&out)], &verb[1..]].concat());
            assert!(error.contains(name.as_str()), "{name}: {error}");
            assert!(!out.join("llmpress.json").exists() && !out.join(name).exists());
            let _ = std::fs::remove_dir_all(out);
        }
        std::fs::write(&file, content).unwrap();
    }
    std::fs::remove_file(place.at("a/tokenizer.json")).unwrap();
    let error = fails(&["restore", path(&place.at("a")), path(&place.at("b"))]);
    assert!(error.contains("tokenizer.json") && error.contains("good copy"), "{error}");
}

#[test]
fn writing_never_leaves_the_output_by_a_link() {
    let place = Place::new();
    place.convert("source", "out", &PLANES);
    let out = place.at("out");
    let victim = place.at("victim");
    std::fs::write(&victim, "precious").unwrap();
    let names: Vec<String> = files(&out).into_keys().collect();
    for name in &names {
        symlink("../victim", out.join(format!("{name}.tmp"))).unwrap();
    }
    // Files that the earlier job made may have become links since.
    for name in ["config.json", "tokenizer.json"] {
        std::fs::remove_file(out.join(name)).unwrap();
        symlink("../victim", out.join(name)).unwrap();
    }
    place.convert("source", "out", &["--to", "fixed12", "--force"]);
    assert_eq!(std::fs::read(&victim).unwrap(), b"precious");
    assert!(!out.join("config.json").symlink_metadata().unwrap().is_symlink());
    ok(&["verify", path(&out)]);
    // The state's folder itself.
    let elsewhere = place.at("elsewhere");
    std::fs::create_dir(&elsewhere).unwrap();
    for out in ["state", "state2"].map(|name| place.at(name)) {
        std::fs::create_dir(&out).unwrap();
        symlink("../elsewhere", out.join(".llmpress")).unwrap();
        for more in [&PLANES[..], &RESUME, &FORCE] {
            let error = fails(&[&["convert", path(&place.at("source")), path(&out)], more].concat());
            assert!(error.contains(".llmpress") && error.contains("is a link"), "{error}");
        }
        assert_eq!(std::fs::read_dir(&elsewhere).unwrap().count(), 0);
    }
    // Its lock.
    let out = place.at("lock");
    std::fs::create_dir_all(out.join(".llmpress")).unwrap();
    symlink("../../victim", out.join(".llmpress/lock")).unwrap();
    fails(&["convert", path(&place.at("source")), path(&out), "--to", "planes"]);
    assert_eq!(std::fs::read(&victim).unwrap(), b"precious");
}

#[test]
fn of_two_runs_on_one_output_one_succeeds() {
    let place = Place::new();
    place.convert("source", "fresh", &PLANES);
    for round in 0..12 {
        let out = place.at(&format!("out{round}"));
        let start = || {
            let mut command = support::llmpress();
            command.args(["convert", path(&place.at("source")), path(&out), "--to", "planes", "--quiet"]);
            command.stderr(std::process::Stdio::piped()).spawn().unwrap()
        };
        let running: Vec<_> = (0..4).map(|_| start()).collect();
        let ended: Vec<_> = running.into_iter().map(|child| child.wait_with_output().unwrap()).collect();
        let succeeded = ended.iter().filter(|o| o.status.success()).count();
        assert_eq!(succeeded, 1, "{ended:?}");
        for output in ended.iter().filter(|o| !o.status.success()) {
            let error = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(error.contains("another llmpress") || error.contains("already holds"), "{error}");
        }
        same_files(&place.at("fresh"), &out);
    }
}

#[test]
fn resume_hashes_the_shards_that_it_keeps() {
    let place = Place::new();
    let options = ["--to", "planes", "--max-shard-size", "60K"];
    place.convert("source", "fresh", &options);
    let shards = files(&place.at("fresh")).into_keys().filter(|n| n.ends_with(".safetensors")).count();
    // An unfinished run: killed by a limit on the size of files while the manifest, the largest file, is written, or
    // made so from a run that stops at a file in the way. Here: the manifest cannot be published.
    let out = place.at("out");
    std::fs::create_dir(&out).unwrap();
    let script = format!(
        "ulimit -c 0; {} convert {} {} {} --jobs 1 & pid=$!
         while kill -0 $pid 2>/dev/null && [ ! -e {}/.llmpress/model-00003-of-0000{shards}.safetensors.json ]; do :; done
         kill -9 $pid",
        env!("CARGO_BIN_EXE_llmpress"),
        path(&place.at("source")),
        path(&out),
        options.join(" "),
        path(&out),
    );
    for _ in 0..30 {
        let _ = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
        if !out.join("llmpress.json").exists() && out.join(".llmpress/plan.json").exists() {
            break;
        }
        let _ = std::fs::remove_dir_all(&out);
        std::fs::create_dir(&out).unwrap();
    }
    if out.join("llmpress.json").exists() || !out.join(".llmpress/plan.json").exists() {
        eprintln!("too fast to be interrupted here: not tested");
        return;
    }
    // A byte of a finished shard that changes no size, and a receipt that says something else.
    let shard = out.join(format!("model-00001-of-0000{shards}.safetensors"));
    if shard.exists() {
        let mut bytes = std::fs::read(&shard).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        std::fs::write(&shard, bytes).unwrap();
    }
    let receipt = out.join(format!(".llmpress/model-00002-of-0000{shards}.safetensors.json"));
    if receipt.exists() {
        let mut bytes = std::fs::read(&receipt).unwrap();
        let last = bytes.len() - 20;
        bytes[last] = if bytes[last] == b'1' { b'2' } else { b'1' };
        std::fs::write(&receipt, bytes).unwrap();
    }
    place.convert("source", "out", &[&options[..], &["--resume"]].concat());
    same_files(&place.at("fresh"), &out);
}

#[test]
fn restore_knows_its_own_output() {
    let place = Place::new();
    place.convert("source", "a", &["--to", "dfloat11"]);
    let restore = |from: &str, more: &[&str]| {
        support::run(&[&["restore", path(&place.at(from)), path(&place.at("back"))], more].concat())
    };
    assert!(restore("a", &[]).status.success());
    let first = files(&place.at("back"));
    let error = String::from_utf8(restore("a", &[]).stderr).unwrap();
    assert!(error.contains("already holds a checkpoint"), "{error}");
    assert!(restore("a", &["--resume"]).status.success());
    assert!(restore("a", &["--force"]).status.success());
    assert_eq!(files(&place.at("back")), first);
    // Another model over it: only with --force, and nothing of the first is left.
    let mut tensors = tiny_llama();
    tensors[1].bytes[0] ^= 1;
    source(&place.at("other"), &tensors);
    std::fs::remove_file(place.at("other/tokenizer.json")).unwrap();
    place.convert("other", "b", &["--to", "planes"]);
    let error = String::from_utf8(restore("b", &["--resume"]).stderr).unwrap();
    assert!(error.contains("another source"), "{error}");
    assert_eq!(files(&place.at("back")), first);
    assert!(restore("b", &["--force"]).status.success());
    assert!(!place.at("back/tokenizer.json").exists());
    ok(&["verify", path(&place.at("back")), "--against", path(&place.at("other"))]);
    // It is a plain checkpoint like any other, and the hidden file is not carried on.
    place.convert("back", "c", &PLANES);
    assert!(!place.at("c/.llmpress-restored.json").exists());
    ok(&["verify", path(&place.at("c"))]);
    // Damage in it is found.
    let shard = place.at("back/model.safetensors");
    let mut bytes = std::fs::read(&shard).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    assert_eq!(restore("b", &["--resume"]).status.code(), Some(1));
}

#[test]
fn names_of_our_own_in_a_source_do_no_harm() {
    let place = Place::new();
    let long = "n".repeat(255);
    for name in ["llmpress.json.tmp", "config.json.tmp", "model-00001-of-00001.safetensors.tmp", &long] {
        std::fs::write(place.at("source").join(name), name).unwrap();
    }
    place.convert("source", "out", &PLANES);
    for name in ["llmpress.json.tmp", "config.json.tmp", &long] {
        assert_eq!(std::fs::read(place.at("out").join(name)).unwrap(), name.as_bytes());
    }
    ok(&["verify", path(&place.at("out"))]);
}
