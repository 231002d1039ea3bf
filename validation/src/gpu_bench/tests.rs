//! The promises of the sequence, with steps that are shell commands.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::call::{Call, Done};
use super::findings::Findings;
use super::known::Known;
use super::report::{Outcome, Report, RunState};
use super::sequence::Sequence;
use super::steps::{Step, free_bytes, steps};
use super::written::write;
use super::{Options, REPORT_JSON, REPORT_PAGE, STEPS, judge};

fn options(out: &Path, budget: f64) -> Options {
    Options {
        program: "llmpress".into(),
        version: "llmpress test".to_owned(),
        out: out.to_owned(),
        scratch: out.to_owned(),
        scratch_bytes: None,
        ordinal: 0,
        model: None,
        text: None,
        budget: Duration::from_secs_f64(budget),
        layers: 8,
        only: Vec::new(),
        stop_after: None,
        force: false,
    }
}

fn shell(name: &str, script: &str, limit: f64) -> Call {
    Call {
        name: name.to_owned(),
        program: "sh".into(),
        arguments: vec!["-c".to_owned(), script.to_owned()],
        limit: Duration::from_secs_f64(limit),
        optional: false,
    }
}

/// A step of some scripts.
fn step(name: &'static str, scripts: &[&str], limit: f64) -> Step {
    let calls: Vec<Call> =
        scripts.iter().enumerate().map(|(i, script)| shell(&i.to_string(), script, limit)).collect();
    Step {
        name,
        shows: "a test",
        after: &[],
        gpu: true,
        limit: Duration::from_secs_f64(limit),
        least: Duration::from_millis(100),
        calls: Box::new(move |_| Ok(calls.clone())),
        judge: Box::new(judge::ends),
    }
}

fn run(options: &Options, steps: &[Step]) -> Report {
    run_until(options, steps, &AtomicBool::new(false))
}

fn run_until(options: &Options, steps: &[Step], interrupted: &AtomicBool) -> Report {
    let report = Report::new(options, steps.iter().map(Step::waiting));
    Sequence { options, environment: Vec::new(), interrupted, say: &mut |_| () }.run(steps, report).unwrap()
}

fn outcomes(report: &Report) -> Vec<Outcome> {
    report.steps.iter().map(|s| s.outcome).collect()
}

fn reason(report: &Report, step: usize) -> &str {
    report.steps[step].reason.as_deref().unwrap_or("")
}

fn on_disk(out: &Path) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(out.join(REPORT_JSON)).unwrap()).unwrap()
}

#[test]
fn a_step_that_fails_crashes_or_hangs_stops_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let absent = Step {
        calls: Box::new(|_| {
            Ok(vec![Call { program: "/no/such/program".into(), ..shell("absent", "", 1.0) }])
        }),
        ..step("absent", &[], 5.0)
    };
    let all = [
        step("fails", &["echo what went wrong >&2; exit 3"], 5.0),
        step("crashes", &["kill -SEGV $$"], 5.0),
        step("hangs", &["sleep 1000"], 0.3),
        absent,
        step("one of two", &["exit 1", "exit 0"], 5.0),
        step("holds", &["exit 0"], 5.0),
    ];
    let report = run(&options(dir.path(), 60.0), &all);
    use Outcome::{Failed, Held, TimedOut};
    assert_eq!(outcomes(&report), [Failed, Failed, TimedOut, Failed, Failed, Held]);
    assert_eq!(reason(&report, 0), "0: exit code 3: what went wrong");
    assert!(reason(&report, 1).contains("signal 11"), "{}", reason(&report, 1));
    assert!(reason(&report, 2).contains("its limit"), "{}", reason(&report, 2));
    assert!(reason(&report, 3).contains("absent: cannot be run: No such file"), "{}", reason(&report, 3));
    assert_eq!(report.steps[4].calls.len(), 2, "the second call runs all the same");
    assert_eq!(report.state, RunState::Finished);
    assert!(!report.all_held());
    assert!(run(&options(dir.path(), 60.0), &all[5..]).all_held());
}

#[test]
fn the_whole_process_group_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let pids = |name: &str| dir.path().join(name);
    let tree = |name: &str, then: &str| {
        format!("sleep 1000 & echo $! > {}; (sleep 1000; true) & {then}", pids(name).display())
    };
    let (hang, leave) = (tree("hang", "wait"), tree("leave", "exit 0"));
    let report = run(&options(dir.path(), 60.0), &[step("a", &[&hang], 0.5), step("b", &[&leave], 5.0)]);
    assert_eq!(outcomes(&report), [Outcome::TimedOut, Outcome::Held]);
    for name in ["hang", "leave"] {
        let pid = std::fs::read_to_string(pids(name)).unwrap();
        let stat = format!("/proc/{}/stat", pid.trim());
        let gone = || match std::fs::read_to_string(&stat) {
            Err(_) => true,
            // Killed, and nobody has asked for its end yet.
            Ok(stat) => stat.contains(") Z "),
        };
        let start = Instant::now();
        while !gone() && start.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(gone(), "{name}: {pid} still runs");
    }
}

#[test]
fn the_report_is_there_before_and_after_every_step() {
    let dir = tempfile::tempdir().unwrap();
    let copy = |name: &str| {
        let (from, page) = (dir.path().join(REPORT_JSON), dir.path().join(REPORT_PAGE));
        format!("cp {} {}/{name}.json; test -s {}", from.display(), dir.path().display(), page.display())
    };
    let (a, b) = (copy("a"), copy("b"));
    let report = run(&options(dir.path(), 60.0), &[step("a", &[&a], 5.0), step("b", &[&b, "exit 2"], 5.0)]);
    assert_eq!(outcomes(&report), [Outcome::Held, Outcome::Failed]);
    let seen = |name: &str| -> Vec<String> {
        let bytes = std::fs::read(dir.path().join(format!("{name}.json"))).unwrap();
        let seen: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(seen["state"], "running");
        seen["steps"].as_array().unwrap().iter().map(|s| s["outcome"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(seen("a"), ["running", "waiting"]);
    assert_eq!(seen("b"), ["held", "running"]);
    let last = on_disk(dir.path());
    assert_eq!((&last["state"], &last["steps"][1]["outcome"]), (&"finished".into(), &"failed".into()));
    let page = std::fs::read_to_string(dir.path().join(REPORT_PAGE)).unwrap();
    assert!(page.contains("| b | a test | FAILED |"), "{page}");
    assert!(page.contains("of 2 steps 1 held, 1 failed"), "{page}");
}

#[test]
fn the_budget_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let start = Instant::now();
    let report = run(
        &options(dir.path(), 1.5),
        &[
            step("first", &["sleep 0.2"], 30.0),
            step("second", &["sleep 100", "sleep 100"], 60.0),
            step("third", &["exit 0"], 5.0),
        ],
    );
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
    assert_eq!(outcomes(&report), [Outcome::Held, Outcome::TimedOut, Outcome::NotRun]);
    assert!(report.steps[1].calls[0].limit_s < 1.5);
    assert!(reason(&report, 2).contains("of the budget of 2 s are left"), "{}", reason(&report, 2));
    assert!(!report.all_held());
}

#[test]
fn a_step_that_would_not_get_far_is_not_begun() {
    let dir = tempfile::tempdir().unwrap();
    let long = Step { least: Duration::from_secs(100), ..step("long", &["exit 0"], 200.0) };
    let report =
        run(&options(dir.path(), 20.0), &[step("a", &["exit 0"], 5.0), long, step("b", &["exit 0"], 5.0)]);
    assert_eq!(outcomes(&report), [Outcome::Held, Outcome::NotRun, Outcome::Held]);
    assert!(reason(&report, 1).contains("it wants 100"), "{}", reason(&report, 1));
}

#[test]
fn an_interruption_ends_the_step_and_leaves_the_report() {
    let dir = tempfile::tempdir().unwrap();
    let interrupted = AtomicBool::new(false);
    let all = [
        step("a", &["exit 0"], 5.0),
        step("b", &["sleep 1000", "exit 0"], 900.0),
        step("c", &["exit 0"], 5.0),
    ];
    let start = Instant::now();
    let report = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !dir.path().join("calls/b-0.out").exists() {
                std::thread::sleep(Duration::from_millis(5));
            }
            interrupted.store(true, Ordering::Relaxed);
        });
        run_until(&options(dir.path(), 900.0), &all, &interrupted)
    });
    assert!(start.elapsed() < Duration::from_secs(20));
    assert_eq!(outcomes(&report), [Outcome::Held, Outcome::Interrupted, Outcome::NotRun]);
    assert_eq!(on_disk(dir.path())["state"], "interrupted");
    assert_eq!(on_disk(dir.path())["steps"][0]["outcome"], "held");
    assert!(!report.all_held());
}

#[test]
fn what_a_step_needs_must_have_held() {
    let dir = tempfile::tempdir().unwrap();
    let needs = |name, before| Step { after: before, ..step(name, &["exit 0"], 5.0) };
    let all =
        [step("a", &["exit 1"], 5.0), needs("b", &["a"]), needs("c", &["b"]), step("d", &["exit 0"], 5.0)];
    let report = run(&options(dir.path(), 60.0), &all);
    use Outcome::{Failed, Held, NotRun};
    assert_eq!(outcomes(&report), [Failed, NotRun, NotRun, Held]);
    assert!(reason(&report, 1).starts_with("it needs a: 0: exit code 1"), "{}", reason(&report, 1));
    assert!(reason(&report, 2).starts_with("it needs b: it needs a"), "{}", reason(&report, 2));
}

#[test]
fn some_steps_can_be_asked_for_with_what_they_need() {
    let dir = tempfile::tempdir().unwrap();
    let plain = |name| step(name, &["exit 0"], 5.0);
    let all = [plain("a"), plain("b"), plain("c"), Step { after: &["b"], ..plain("d") }, plain("e")];
    let with = |only: &[&str], stop_after: Option<&str>| {
        let mut options = options(dir.path(), 60.0);
        options.only = only.iter().map(|&o| o.to_owned()).collect();
        options.stop_after = stop_after.map(str::to_owned);
        let report = run(&options, &all);
        assert!(report.all_held(), "what is not asked for is no fault");
        let ran = report.steps.iter().filter(|s| s.outcome == Outcome::Held);
        ran.map(|s| s.name.clone()).collect::<String>()
    };
    assert_eq!(with(&[], None), "abcde");
    assert_eq!(with(&["d"], None), "abd");
    assert_eq!(with(&["e", "c"], None), "ace");
    assert_eq!(with(&[], Some("c")), "abc");
    assert_eq!(with(&["c", "e"], Some("d")), "ac");
}

#[test]
fn a_process_that_prints_without_end_is_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let report = run(&options(dir.path(), 60.0), &[step("a", &["yes"], 50.0), step("b", &["exit 0"], 5.0)]);
    assert_eq!(outcomes(&report), [Outcome::Failed, Outcome::Held]);
    assert!(reason(&report, 0).contains("printed more than 64 MiB"), "{}", reason(&report, 0));
}

#[test]
fn programs_that_need_not_be_there_may_be_missing() {
    let dir = tempfile::tempdir().unwrap();
    let smi = Call { program: "/no/such/nvidia-smi".into(), optional: true, ..shell("smi", "", 1.0) };
    let first = Step {
        calls: Box::new(move |_| Ok(vec![shell("a", "exit 0", 5.0), smi.clone()])),
        ..step("a", &[], 5.0)
    };
    assert!(run(&options(dir.path(), 60.0), &[first]).all_held());
}

#[test]
fn without_a_gpu_nothing_that_needs_one_is_run() {
    let dir = tempfile::tempdir().unwrap();
    let doctor = Step {
        gpu: false,
        judge: Box::new(|calls, _| judge::doctor(calls, 0)),
        ..step("doctor", &[r#"echo '{"gpus": [], "no_gpu": "no driver"}'"#], 5.0)
    };
    let report = run(&options(dir.path(), 60.0), &[doctor, step("a", &["touch ran"], 5.0)]);
    assert_eq!(outcomes(&report), [Outcome::Failed, Outcome::NotRun]);
    assert_eq!(reason(&report, 1), "no GPU: no driver");
    let page = std::fs::read_to_string(dir.path().join(REPORT_PAGE)).unwrap();
    assert!(page.contains("none was found") && page.contains("no GPU: no driver"), "{page}");
}

#[test]
fn the_steps_have_the_names_that_can_be_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let all = steps(&options(dir.path(), 420.0), dir.path(), Path::new("words.txt"));
    assert_eq!(all.iter().map(|s| s.name).collect::<Vec<_>>(), STEPS);
    for (index, step) in all.iter().enumerate() {
        for before in step.after {
            assert!(
                STEPS[..index].contains(before),
                "{} needs {before}, which does not come before",
                step.name
            );
        }
        assert!(step.least < step.limit, "{}", step.name);
    }
    // A longer budget gives every step more.
    let longer = steps(&options(dir.path(), 840.0), dir.path(), Path::new("words.txt"));
    assert!(longer.iter().zip(&all).all(|(l, s)| l.limit == 2 * s.limit));
    let shorter = steps(&options(dir.path(), 10.0), dir.path(), Path::new("words.txt"));
    assert!(shorter.iter().zip(&all).all(|(l, s)| l.limit == s.limit));
}

#[test]
fn the_big_model_has_as_many_layers_as_there_is_room_for() {
    let dir = tempfile::tempdir().unwrap();
    let of = |disk: u64, gpu: u64| {
        let options = Options { scratch_bytes: Some(disk << 30), ..options(dir.path(), 420.0) };
        let all = steps(&options, dir.path(), Path::new("words.txt"));
        let model = all.iter().find(|s| s.name == "model-8b").unwrap();
        let known = Known { memory_bytes: Some(gpu << 30), ..Known::default() };
        (model.calls)(&known).map(|calls| calls[0].arguments.last().unwrap().clone())
    };
    assert_eq!(of(100, 80).as_deref(), Ok("8"));
    assert_eq!(of(100, 10).as_deref(), Ok("5"));
    assert!(of(100, 8).unwrap_err().contains("the GPU has room for 2.1"), "{:?}", of(100, 8));
    let small = of(2, 80).unwrap_err();
    assert!(small.contains(&format!("{} has room for", dir.path().display())), "{small}");
    // Without a number it is what the disk has, which every machine can say.
    let free = free_bytes(dir.path()).unwrap();
    assert!(free < u64::MAX, "{free}");
    assert!(free_bytes(&dir.path().join("nowhere")).unwrap_err().contains("nowhere"));
}

/// Calls that printed these texts.
fn printed(dir: &Path, outputs: &[(&str, &str)]) -> Vec<Done> {
    let none = AtomicBool::new(false);
    outputs
        .iter()
        .enumerate()
        .map(|(i, (name, text))| {
            let file: PathBuf = dir.join(format!("printed-{i}"));
            std::fs::write(&file, text).unwrap();
            let script = format!("cat {}", file.display());
            shell(name, &script, 10.0).run(
                Duration::from_secs(10),
                &[],
                &dir.join(format!("call-{i}")),
                &none,
            )
        })
        .collect()
}

fn held(found: &Findings) -> Vec<bool> {
    found.checks.iter().map(|c| c.held).collect()
}

#[test]
fn perplexities_must_be_equal_and_near() {
    let dir = tempfile::tempdir().unwrap();
    let of = |cpu: &str, bf16: &str, fixed12: &str| {
        let json = |x: &str| format!(r#"{{"perplexity": {x}, "windows": 3}}"#);
        let calls = [("cpu", json(cpu)), ("bf16", json(bf16)), ("fixed12", json(fixed12))];
        let calls: Vec<(&str, &str)> = calls.iter().map(|(n, j)| (*n, j.as_str())).collect();
        held(&judge::perplexity(&printed(dir.path(), &calls), &Known::default()))
    };
    assert_eq!(of("29.0", "29.1", "29.1"), [true, true]);
    assert_eq!(of("29.0", "29.1", "29.100000000000005"), [false, true]);
    assert_eq!(of("28.0", "29.1", "29.1"), [true, false]);
    assert_eq!(of("29.0", "null", "29.1"), [false, true, true], "what cannot be read is a fault");
}

#[test]
fn logits_must_have_been_compared() {
    let dir = tempfile::tempdir().unwrap();
    let of = |json: &str| held(&judge::logits(&printed(dir.path(), &[("fixed12", json)]), &Known::default()));
    let with = |logits: u64, differing: u64, generated: &str| {
        of(&format!(
            r#"{{"logits": {{"logits": {logits}, "differing": {differing}, "generated": 32, "first_generated": {generated}}}}}"#
        ))
    };
    assert_eq!(with(100, 0, "null"), [true]);
    assert_eq!(with(100, 1, "null"), [false]);
    assert_eq!(with(100, 0, "7"), [false]);
    assert_eq!(with(0, 0, "null"), [false]);
    assert_eq!(of("{}"), [false]);
}

#[test]
fn texts_must_be_the_same_from_every_encoding() {
    let dir = tempfile::tempdir().unwrap();
    let of = |fixed12: &str, cpu: &str| {
        let calls =
            [("bf16 greedy", r#"{"tokens": [1, 2, 3]}"#), ("fixed12 greedy", fixed12), ("cpu greedy", cpu)];
        held(&judge::texts(&printed(dir.path(), &calls), &Known::default()))
    };
    assert_eq!(of(r#"{"tokens": [1, 2, 3]}"#, r#"{"tokens": [1, 9, 3]}"#), [true, true]);
    assert_eq!(of(r#"{"tokens": [1, 2, 4]}"#, r#"{"tokens": [1, 2, 3]}"#), [false, true]);
    assert_eq!(of("nothing", r#"{"tokens": [1, 2, 3]}"#), [false, true, true]);
}

#[test]
fn proofs_of_a_run_that_was_cut_short_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let of = |text: &str| {
        let found = judge::proofs(&printed(dir.path(), &[("proofs", text)]), &Known::default());
        (found.proofs.len(), held(&found))
    };
    let right = r#"{"kernel":"fixed12","shape":"5 x 72","exact":true,"worst":0.0,"fault":null}"#;
    let wrong = r#"{"kernel":"dense","shape":"1 x 8","exact":false,"worst":null,"fault":"row 1"}"#;
    assert_eq!(of(&format!("{right}\n{right}\n")), (2, vec![true]));
    assert_eq!(of(&format!("{right}\n{wrong}\n")), (2, vec![false]));
    assert_eq!(of(&format!("{right}\n{{\"kernel\":\"fix")), (1, vec![true]));
    assert_eq!(of(""), (0, vec![false]), "no proof is none");
}

/// Kernel; n, k and m; microseconds; speed against cuBLAS; whether it is right.
type Measured<'a> = (&'a str, [usize; 3], f64, Option<f64>, bool);

/// A report of `bench kernels`.
fn kernels(rows: &[Measured<'_>]) -> String {
    let rows: Vec<serde_json::Value> = rows
        .iter()
        .map(|&(kernel, [n, k, m], us, speed, correct)| {
            serde_json::json!({
                "shape": "given", "n": n, "k": k, "m": m, "kernel": kernel, "block": "4 | 8",
                "microseconds": {"median": us, "min": us - 1.0, "max": us + 1.0},
                "gbps": 1000.0, "share_of_read_ceiling": 0.5, "speed_against_cublas": speed, "correct": correct,
            })
        })
        .collect();
    let rate = serde_json::json!({"median": 3000.0, "min": 2900.0, "max": 3100.0});
    serde_json::json!({"ceilings": {"read_gbps": rate, "copy_gbps": rate}, "rows": rows}).to_string()
}

#[test]
fn goals_are_reached_missed_or_not_measured() {
    let dir = tempfile::tempdir().unwrap();
    let json = kernels(&[
        ("decode dfloat11", [28672, 4096, 0], 180.0, None, true),
        ("fixed12", [4096, 4096, 1], 14.0, Some(1.52), true),
        ("fixed12", [28672, 4096, 1], 80.0, Some(1.2), true),
        ("fixed12", [4096, 14336, 1], 20.0, Some(9.0), false),
        ("dense", [6144, 4096, 1], 20.0, Some(9.0), true),
    ]);
    let found = judge::kernels(&printed(dir.path(), &[("4096x4096", &json)]), &Known::default());
    assert_eq!(held(&found), [false], "a wrong result is a fault");
    assert!(found.checks[0].found.contains("fixed12 on 4096 x 14336, 1 tokens"), "{:?}", found.checks);
    let options = options(dir.path(), 60.0);
    let mut report = Report::new(&options, std::iter::empty());
    report.take(&mut { found });
    let of = |kernel: &str, n: usize, k: usize, m: usize| {
        let same =
            |g: &&super::GoalResult| (g.goal.kernel, g.goal.n, g.goal.k, g.goal.m) == (kernel, n, k, m);
        report.goals.iter().find(same).map(|g| (g.measured.map(|x| (x * 100.0).round()), g.reached)).unwrap()
    };
    assert_eq!(of("decode dfloat11", 28672, 4096, 0), (Some(130_489.0), Some(true)));
    assert_eq!(of("fixed12", 4096, 4096, 1), (Some(152.0), Some(true)));
    assert_eq!(of("fixed12", 28672, 4096, 1), (Some(120.0), Some(false)));
    assert_eq!(of("fixed12", 4096, 14336, 1), (Some(900.0), Some(false)), "wrong results reach nothing");
    assert_eq!(of("fixed12", 6144, 4096, 1), (None, None));
    write(&mut report, dir.path(), 1.0).unwrap();
    let page = std::fs::read_to_string(dir.path().join(REPORT_PAGE)).unwrap();
    for line in [
        "| decode dfloat11 | gate_up 28672 x 4096 | - | 1040 GB/s of output | 1300 GB/s of output | 1305 GB/s of output | reached |",
        "| fixed12 | o 4096 x 4096 | 1 | 1.49 x cuBLAS | 1.50 x cuBLAS | 1.52 x cuBLAS | reached |",
        "| fixed12 | gate_up 28672 x 4096 | 1 | 1.56 x cuBLAS | 1.50 x cuBLAS | 1.20 x cuBLAS | MISSED |",
        "| fixed12 | qkv 6144 x 4096 | 1 | - | 1.50 x cuBLAS | not measured | - |",
        "| read ceiling | 3000 (2900-3100) GB/s |",
        "| 4096 x 14336 | 1 | fixed12 | 20.0 (19.0-21.0) | 1000 | 50 % | 9.00 | 4 \\| 8 | WRONG |",
        "33 goals 4 were measured and 2 reached",
    ] {
        assert!(page.contains(line), "{line}\nis not in\n{page}");
    }
}
