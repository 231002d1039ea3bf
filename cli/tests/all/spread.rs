//! Many workers, on one machine or many: whatever becomes of them, what is merged is what `convert` makes, to the byte.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use crate::support::{self, files, llmpress, ok, path, run, same_files, tinylm};
use std::path::{Path, PathBuf};
use std::process::{Child, Output, Stdio};
use std::time::{Duration, Instant};

/// A source, its plan, and what `convert` makes of it.
struct Case {
    dir: tempfile::TempDir,
    units: usize,
}

impl Case {
    fn of(source: &Path, args: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let plan = ok(&[&["plan", path(source), "--json"], args].concat());
        std::fs::write(dir.path().join("plan.json"), &plan).unwrap();
        let plan: serde_json::Value = serde_json::from_str(&plan).unwrap();
        let case = Self { units: plan["shards"].as_array().unwrap().len(), dir };
        ok(&[&["convert", path(source), path(&case.at("whole")), "--quiet"], args].concat());
        case
    }

    /// A small model, of whose shards each takes some milliseconds.
    fn small() -> Self {
        let source = tempfile::tempdir().unwrap().keep();
        support::checkpoint(&source, support::LLAMA, &support::tiny_llama());
        std::fs::write(source.join("tokenizer.json"), "{}").unwrap();
        Self::of(&source, &["--to", "fixed12", "--max-shard-size", "16K"])
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn args<'a>(&'a self, verb: &'a str, plan: &'a Path, out: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
        [&[verb, "--plan", path(plan), path(out), "--quiet"], more].concat()
    }

    fn spawn(&self, out: &Path, more: &[&str]) -> Child {
        let plan = self.at("plan.json");
        let mut command = llmpress();
        command.args(self.args("worker", &plan, out, more)).stdout(Stdio::null()).stderr(Stdio::piped());
        command.spawn().unwrap()
    }

    fn worker(&self, out: &Path, more: &[&str]) -> Output {
        run(&self.args("worker", &self.at("plan.json"), out, more))
    }

    fn merge(&self, out: &Path) -> Output {
        run(&self.args("merge", &self.at("plan.json"), out, &[]))
    }

    /// Merges, and wants what `convert` makes.
    fn is_whole(&self, out: &Path) {
        let merged = self.merge(out);
        assert!(merged.status.success(), "{}", stderr(&merged));
        same_files(&self.at("whole"), out);
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn ends_well(child: Child) {
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
}

/// Exit code and error of what must fail without a panic.
fn fails_with(output: &Output) -> (i32, String) {
    let text = stderr(output);
    assert!(!text.contains("panicked"), "{text}");
    (output.status.code().unwrap(), text)
}

#[test]
fn any_number_of_workers_makes_what_convert_makes() {
    let recipes: [&[&str]; 5] = [
        &["--to", "dfloat11", "--max-shard-size", "2M"],
        &["--to", "planes", "--max-shard-size", "1500K"],
        &[
            "--to",
            "rtn:w4,g32+fixed12",
            "--max-shard-size",
            "1M",
            "--rule",
            "lm_head.weight|model.embed_tokens.weight=rtn:w8,g32",
        ],
        &["--to", "grid:w3,g32+dfloat11", "--max-shard-size", "2M", "--entropy-code"],
        // Whole layers go, the others get other numbers, and are quantised under those of before.
        &["--to", "drop:block=2+rtn:w4+fixed12", "--max-shard-size", "1M", "--ranking", "RANKING"],
    ];
    let ranked = tempfile::tempdir().unwrap();
    let ranking = ranked.path().join("ranking.json");
    let text = tinylm().join("calib.txt");
    let by = ["--calib-windows", "2", "--calib-window", "32", "--out", path(&ranking), "--quiet"];
    ok(&[&["rank", path(&tinylm()), "--by", "drop:block", "--calib", path(&text)], &by[..]].concat());
    for recipe in recipes {
        let recipe: Vec<&str> =
            recipe.iter().map(|arg| if *arg == "RANKING" { path(&ranking) } else { *arg }).collect();
        let case = Case::of(&tinylm(), &recipe);
        assert!(case.units >= 3, "{recipe:?} makes {} units", case.units);
        for jobs in [1, 3, case.units + 2] {
            let out = case.at(&format!("out-{jobs}"));
            let spawn = |rank: usize| {
                case.spawn(&out, &["--num-jobs", &jobs.to_string(), "--job-rank", &rank.to_string()])
            };
            if jobs == 3 {
                (0..jobs).map(spawn).collect::<Vec<_>>().into_iter().for_each(ends_well);
            } else {
                // One after the other, the last first.
                (0..jobs).rev().for_each(|rank| ends_well(spawn(rank)));
            }
            case.is_whole(&out);
            std::fs::remove_dir_all(&out).unwrap();
        }
    }
}

#[test]
fn the_shares_of_jobs_are_every_unit_once() {
    let case = Case::small();
    assert!(case.units > 5, "{}", case.units);
    let out = case.at("out");
    let mut made = Vec::new();
    for rank in ["0", "1", "2", "3"] {
        let plan = case.at("plan.json");
        let args = ["worker", "--plan", path(&plan), path(&out), "--json"];
        let text = ok(&[&args[..], &["--num-jobs", "4", "--job-rank", rank]].concat());
        let worked: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(worked["found"], serde_json::json!([]));
        made.extend(worked["made"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize));
    }
    made.sort_unstable();
    assert_eq!(made, (0..case.units).collect::<Vec<_>>());
    case.is_whole(&out);
}

#[test]
fn the_same_unit_twice_and_at_the_same_time_is_the_same_unit() {
    let case = Case::small();
    let all = format!("0-{}", case.units - 1);
    for round in 0..6 {
        let out = case.at(&format!("out-{round}"));
        let workers: Vec<Child> = (0..5).map(|_| case.spawn(&out, &["--unit", &all])).collect();
        workers.into_iter().for_each(ends_well);
        let work = out.join(".llmpress/work");
        assert_eq!(std::fs::read_dir(&work).unwrap().count(), 0, "nothing is left of what they had in work");
        assert!(case.worker(&out, &["--unit", "0", "--unit", "0,0-1"]).status.success());
        case.is_whole(&out);
        // Late ones find everything done, before and after a merge of somebody else.
        assert!(case.worker(&out, &["--unit", &all]).status.success());
        case.is_whole(&out);
        std::fs::remove_dir_all(&out).unwrap();
    }
}

#[test]
fn killed_at_any_moment_another_worker_goes_on() {
    let case = Case::of(&tinylm(), &["--to", "dfloat11", "--max-shard-size", "2M"]);
    let all = format!("0-{}", case.units - 1);
    let start = Instant::now();
    ends_well(case.spawn(&case.at("timed"), &["--unit", &all]));
    let full = start.elapsed();
    let mut at_work = 0;
    for step in 0..16u32 {
        let out = case.at(&format!("out-{step}"));
        let mut worker = case.spawn(&out, &["--unit", &all]);
        std::thread::sleep(full.mul_f64(f64::from(step) / 16.0).max(Duration::from_millis(1)));
        worker.kill().unwrap();
        worker.wait().unwrap();
        let work = std::fs::read_dir(out.join(".llmpress/work")).map_or(0, Iterator::count);
        at_work += usize::from(work > 0);
        ends_well(case.spawn(&out, &["--unit", &all]));
        assert_eq!(
            std::fs::read_dir(out.join(".llmpress/work"))
                .unwrap()
                .filter(|entry| {
                    entry.as_ref().unwrap().file_name().to_str().unwrap().starts_with("unit-")
                })
                .count(),
            0,
            "what the killed one had in work is gone with the unit"
        );
        case.is_whole(&out);
        std::fs::remove_dir_all(&out).unwrap();
    }
    assert!(at_work > 0, "at least one was killed at work");
}

#[test]
fn asked_to_stop_it_leaves_what_is_done_and_nothing_else() {
    let case = Case::of(&tinylm(), &["--to", "dfloat11", "--max-shard-size", "2M"]);
    let all = format!("0-{}", case.units - 1);
    let mut stopped = 0;
    for (signal, code) in [(libc::SIGTERM, 143), (libc::SIGINT, 130)].repeat(6) {
        let out = case.at("out");
        let mut worker = case.spawn(&out, &["--unit", &all]);
        // In the middle of a shard.
        while std::fs::read_dir(out.join(".llmpress/work")).map_or(0, Iterator::count) == 0
            && worker.try_wait().unwrap().is_none()
        {
            std::thread::sleep(Duration::from_micros(200));
        }
        std::thread::sleep(Duration::from_millis(20 * (stopped % 4)));
        #[allow(unsafe_code)]
        // SAFETY: the process is a child that was not waited for.
        unsafe {
            libc::kill(worker.id() as i32, signal);
        }
        let status = worker.wait().unwrap();
        if !status.success() {
            assert_eq!(status.code(), Some(code));
            stopped += 1;
            if let Ok(left) = std::fs::read_dir(out.join(".llmpress/work")) {
                assert_eq!(left.count(), 0);
            }
        }
        ends_well(case.spawn(&out, &["--unit", &all]));
        case.is_whole(&out);
        std::fs::remove_dir_all(&out).unwrap();
    }
    assert!(stopped > 0, "at least one was stopped at work");
}

#[test]
fn stale_receipts_and_damaged_shards_are_made_again() {
    let case = Case::small();
    let out = case.at("out");
    let all = format!("0-{}", case.units - 1);
    assert!(case.worker(&out, &["--unit", &all]).status.success());
    let shard = |unit: usize| format!("model-{:05}-of-{:05}.safetensors", unit + 1, case.units);
    let receipt = |unit: usize| out.join(".llmpress").join(format!("{}.json", shard(unit)));
    // The receipt of another shard; of another plan; of a shard of other bytes; of none.
    std::fs::copy(receipt(1), receipt(0)).unwrap();
    let text = std::fs::read_to_string(receipt(2)).unwrap();
    let (_, json) = text.split_once('\n').unwrap();
    let other = json.replacen(r#""fingerprint":""#, r#""fingerprint":"0"#, 1);
    let digest = llmpress_formats::Digest::of(other.as_bytes());
    std::fs::write(receipt(2), format!("{digest}\n{other}")).unwrap();
    let mut bytes = std::fs::read(out.join(shard(3))).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(out.join(shard(3)), bytes).unwrap();
    std::fs::remove_file(out.join(shard(4))).unwrap();
    let (code, error) = fails_with(&case.merge(&out));
    assert_eq!(code, 1, "{error}");
    assert!(
        error.contains(&format!("5 of {} units are not done: 0,2-4", case.units))
            || error.contains(&format!("4 of {} units are not done: 0,2-4", case.units)),
        "{error}"
    );
    // The command that it says makes them.
    let command = error.split('`').nth(1).unwrap();
    let words: Vec<&str> = command.split_whitespace().collect();
    assert_eq!(words[0], "llmpress");
    ok(&words[1..]);
    case.is_whole(&out);
}

#[test]
fn what_workers_left_can_be_finished_by_convert() {
    let case = Case::small();
    let out = case.at("out");
    assert!(case.worker(&out, &["--unit", "1-2"]).status.success());
    let plan = std::fs::read(case.at("plan.json")).unwrap();
    let plan: serde_json::Value = serde_json::from_slice(&plan).unwrap();
    let source = plan["source"].as_str().unwrap();
    let file = case.at("plan.json");
    let summary = ok(&["convert", source, path(&out), "--plan", path(&file), "--resume", "--json"]);
    let summary: serde_json::Value = serde_json::from_str(&summary).unwrap();
    assert_eq!(summary["resumed_shards"], 2);
    same_files(&case.at("whole"), &out);
}

#[test]
fn a_merge_waits_for_no_one_and_takes_nothing_from_others() {
    let case = Case::small();
    let (out, other) = (case.at("out"), case.at("other"));
    let (code, error) = fails_with(&case.merge(&out));
    assert_eq!(code, 1);
    assert!(error.contains(&format!("0-{}", case.units - 1)) && !out.exists(), "{error}");
    let all = format!("0-{}", case.units - 1);
    assert!(case.worker(&out, &["--unit", &all]).status.success());
    // A worker that is still there.
    let lock = std::fs::File::open(out.join(".llmpress/lock")).unwrap();
    lock.lock_shared().unwrap();
    let (code, error) = fails_with(&case.merge(&out));
    assert!(code == 1 && error.contains("another llmpress is writing"), "{code} {error}");
    assert!(case.worker(&out, &["--unit", "0"]).status.success(), "workers do not mind each other");
    drop(lock);
    // One process has it for itself.
    let lock = std::fs::File::open(out.join(".llmpress/lock")).unwrap();
    lock.lock().unwrap();
    let (code, error) = fails_with(&case.worker(&out, &["--unit", "0"]));
    assert!(code == 1 && error.contains("another llmpress is writing"), "{code} {error}");
    drop(lock);
    case.is_whole(&out);
    // Somebody's directory, another plan's, and another checkpoint.
    std::fs::create_dir(&other).unwrap();
    std::fs::write(other.join("thesis.txt"), "years of work").unwrap();
    let (code, error) = fails_with(&case.worker(&other, &["--unit", "0"]));
    assert!(code == 3 && error.contains("was not made by llmpress"), "{code} {error}");
    assert_eq!(files(&other).len(), 1);
    let second = Case::small();
    let begun = second.at("begun");
    assert!(second.worker(&begun, &["--unit", "0"]).status.success());
    let before = files(&begun);
    for output in [case.worker(&begun, &["--unit", "1"]), case.merge(&begun)] {
        let (code, error) = fails_with(&output);
        assert!(code == 3 && error.contains("another plan began"), "{code} {error}");
    }
    assert_eq!(files(&begun), before);
}

#[test]
fn exit_codes_tell_what_a_retry_can_mend() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    support::checkpoint(&source, support::LLAMA, &support::tiny_llama());
    let case = Case::of(&source, &["--to", "planes", "--max-shard-size", "30K"]);
    let out = case.at("out");
    let (plan, changed) = (case.at("plan.json"), case.at("changed.json"));
    let text = std::fs::read_to_string(&plan).unwrap();
    let with = |text: String, more: &[&str]| {
        std::fs::write(&changed, text).unwrap();
        fails_with(&run(&case.args("worker", &changed, &out, more)))
    };
    // What may pass.
    let file = case.at("file");
    std::fs::write(&file, "").unwrap();
    let (code, error) = fails_with(&case.worker(&file.join("out"), &["--unit", "0"]));
    assert_eq!(code, 1, "{error}");
    let (code, error) = fails_with(&run(&case.args("worker", &case.at("none.json"), &out, &["--unit", "0"])));
    assert_eq!(code, 1, "{error}");
    let (code, error) = fails_with(&case.worker(&out, &["--unit", "0", "--source", path(&case.at("none"))]));
    assert_eq!(code, 1, "{error}");
    // Wrong usage.
    assert_eq!(fails_with(&case.worker(&out, &[])).0, 2);
    assert_eq!(fails_with(&case.worker(&out, &["--unit", "2-1"])).0, 2);
    assert_eq!(fails_with(&case.worker(&out, &["--num-jobs", "2", "--job-rank", "2"])).0, 2);
    // What will not.
    let (code, error) = fails_with(&case.worker(&out, &["--unit", "0-99999999999"]));
    assert!(code == 3 && error.contains("there is no unit"), "{code} {error}");
    let (code, error) = with(text.replacen(r#""version": "0"#, r#""version": "99"#, 1), &["--unit", "0"]);
    assert!(code == 3 && error.contains("plan again"), "{code} {error}");
    assert_eq!(with("{}".to_owned(), &["--unit", "0"]).0, 3);
    let (code, error) = with(text.replacen(r#""to": "planes""#, r#""to": "raw""#, 1), &["--unit", "0"]);
    assert!(code == 3 && error.contains("does not fit"), "{code} {error}");
    let calibrated = ok(&["plan", path(&tinylm()), "--to", "gptq:w4,g32+dfloat11", "--json"]);
    let (code, error) = with(calibrated, &["--unit", "0"]);
    assert!(
        code == 3 && error.contains("gptq:w4,g32") && error.contains("llmpress convert"),
        "{code} {error}"
    );
    assert!(!out.exists());
    assert!(case.worker(&out, &["--unit", "0"]).status.success());
    let file = std::fs::File::options().append(true).open(source.join("config.json")).unwrap();
    file.set_modified(std::time::UNIX_EPOCH).unwrap();
    for output in [case.worker(&out, &["--unit", "1"]), case.merge(&out)] {
        let (code, error) = fails_with(&output);
        assert!(code == 3 && error.contains("source") && error.contains("plan again"), "{code} {error}");
    }
    std::fs::write(source.join("model.safetensors"), "no header").unwrap();
    assert_eq!(fails_with(&case.worker(&out, &["--unit", "1"])).0, 3);
}

/// A checkpoint of the shape of Llama-3.1-405B of which only the headers are there: 191 files of holes.
fn shaped_like_405b(dir: &Path) {
    use llmpress_formats::{Dtype, RenderEntry, render};
    let (hidden, ffn, kv, vocab, layers) = (16_384u64, 53_248u64, 1024u64, 128_256u64, 126);
    std::fs::create_dir(dir).unwrap();
    std::fs::write(
        dir.join("config.json"),
        format!(
            r#"{{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": {hidden}, "intermediate_size": {ffn},
            "num_hidden_layers": {layers}, "num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": {vocab},
            "rms_norm_eps": 1e-5, "tie_word_embeddings": false, "torch_dtype": "bfloat16"}}"#
        ),
    )
    .unwrap();
    let mut tensors: Vec<(String, Vec<u64>)> =
        vec![("model.embed_tokens.weight".to_owned(), vec![vocab, hidden])];
    for layer in 0..layers {
        let parts: [(&str, &[u64]); 9] = [
            ("self_attn.q_proj", &[hidden, hidden]),
            ("self_attn.k_proj", &[kv, hidden]),
            ("self_attn.v_proj", &[kv, hidden]),
            ("self_attn.o_proj", &[hidden, hidden]),
            ("mlp.gate_proj", &[ffn, hidden]),
            ("mlp.up_proj", &[ffn, hidden]),
            ("mlp.down_proj", &[hidden, ffn]),
            ("input_layernorm", &[hidden]),
            ("post_attention_layernorm", &[hidden]),
        ];
        tensors.extend(
            parts.map(|(name, shape)| (format!("model.layers.{layer}.{name}.weight"), shape.to_vec())),
        );
    }
    tensors.push(("model.norm.weight".to_owned(), vec![hidden]));
    tensors.push(("lm_head.weight".to_owned(), vec![vocab, hidden]));
    let files: Vec<&[(String, Vec<u64>)]> = tensors.chunks(6).collect();
    let mut map = serde_json::Map::new();
    let mut total = 0u64;
    for (number, tensors) in files.iter().enumerate() {
        let file = format!("model-{:05}-of-{:05}.safetensors", number + 1, files.len());
        let mut begin = 0;
        let entries: Vec<RenderEntry> = tensors
            .iter()
            .map(|(name, shape)| {
                let end = begin + shape.iter().product::<u64>() * 2;
                map.insert(name.clone(), file.clone().into());
                let entry =
                    RenderEntry { name: name.clone(), dtype: Dtype::BF16, shape: shape.clone(), begin, end };
                begin = end;
                entry
            })
            .collect();
        let header = render(&entries, &Default::default(), None).unwrap();
        std::fs::write(dir.join(&file), &header).unwrap();
        let opened = std::fs::File::options().write(true).open(dir.join(&file)).unwrap();
        opened.set_len(header.len() as u64 + begin).unwrap();
        total += begin;
    }
    let index = serde_json::json!({"metadata": {"total_size": total}, "weight_map": map});
    std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

#[test]
fn what_405_billion_weights_take_on_64_machines_is_known_from_headers() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("405b");
    shaped_like_405b(&source);
    let args = ["plan", path(&source), "--to", "dfloat11", "--workers", "64", "--jobs", "16"];
    let start = Instant::now();
    let plan: serde_json::Value = serde_json::from_str(&ok(&[&args[..], &["--json"]].concat())).unwrap();
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    let load = &plan["workload"];
    let number = |name: &str| load[name].as_f64().unwrap();
    let source_bytes = plan["source_bytes"].as_f64().unwrap();
    assert!((8.0e11..8.3e11).contains(&source_bytes), "{source_bytes}");
    assert_eq!((number("workers"), number("cores")), (64.0, 16.0));
    assert_eq!(number("units") as usize, plan["shards"].as_array().unwrap().len());
    // Nobody has much more to do than an equal share and one shard.
    let largest = plan["shards"].as_array().unwrap().iter().map(|s| s["source_bytes"].as_f64().unwrap());
    let bound = source_bytes / 64.0 + largest.fold(0.0, f64::max);
    assert!(number("most_bytes") <= bound && number("most_bytes") >= source_bytes / 64.0);
    assert!(number("hours") * 64.0 * 16.0 >= number("core_hours") * 0.999);
    let traffic = |name: &str| load["traffic"][name].as_f64().unwrap();
    assert_eq!(traffic("read_least"), source_bytes);
    assert!(traffic("read_most") >= 2.0 * source_bytes && traffic("written") < 0.75 * source_bytes);
    // A stated rate is the rate.
    let stated = ok(&[&args[..], &["--core-rate", "0.5", "--json"]].concat());
    let stated: serde_json::Value = serde_json::from_str(&stated).unwrap();
    let core_hours = stated["workload"]["core_hours"].as_f64().unwrap();
    assert!((core_hours / (source_bytes / 0.5e9 / 3600.0) - 1.0).abs() < 1e-6, "{core_hours}");
    // Storage that cannot keep up is what it takes.
    let slow = ok(&[&args[..], &["--storage-rate", "10", "--json"]].concat());
    let slow: serde_json::Value = serde_json::from_str(&slow).unwrap();
    let hours = (traffic("read_most") + traffic("written")) / 10e9 / 3600.0;
    assert!((slow["workload"]["hours"].as_f64().unwrap() / hours - 1.0).abs() < 1e-6);
    println!("{}", ok(&[&args[..], &["--storage-rate", "10"]].concat()));
    let text = ok(&args);
    println!("{text}");
    assert!(text.contains("64 workers of 16 cores") && text.contains("merge reads"), "{text}");
    // What one machine has to do first is said.
    let text = ok(&["plan", path(&source), "--to", "gptq:w4,g128", "--workers", "64"]);
    assert!(text.contains("before that gptq:w4,g128 runs on one machine"), "{text}");
}
