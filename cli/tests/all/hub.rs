//! Checkpoints by name: the same as the directory that the hub serves.
#![allow(clippy::expect_used, clippy::unwrap_used)]

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::support::{llmpress, path, same_files, tinylm};
use llmpress_hub_standin::{Faults, Server};

/// The program, with a hub and an empty cache.
fn with_hub(server: &Server, cache: &Path) -> Command {
    let mut command = llmpress();
    for name in ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"] {
        command.env_remove(name);
    }
    command
        .env("HF_ENDPOINT", server.endpoint())
        .env("HF_HUB_CACHE", cache)
        .env("HF_TOKEN_PATH", cache.join("token"));
    command
}

fn succeeds(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}\n{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn converting_a_name_killed_at_any_moment_gives_the_bytes_of_the_directory() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, out, cache) = (dir.path().join("whole"), dir.path().join("out"), dir.path().join("hub"));
    let options = ["--to", "dfloat11", "--max-shard-size", "1M", "--quiet"];
    succeeds(llmpress().args(["convert", path(&tinylm()), path(&whole)]).args(options));
    let slow = Faults { slow: 2, cut_after: Some(3 << 20), ..Faults::default() };
    let server = Server::start("org/tinylm", &tinylm(), slow);
    let command = |more: &[&str]| {
        let mut command = with_hub(&server, &cache);
        command.args(["convert", "org/tinylm@v1", path(&out)]).args(options).args(more);
        command
    };
    let (mut killed, mut kept) = (0u32, 0u32);
    for step in 1..40u64 {
        let mut child = command(&["--resume"]).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(40 + 25 * step));
        if child.try_wait().unwrap().is_some_and(|status| status.success()) {
            break;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        killed += 1;
        kept += u32::from(cache.join("models--org--tinylm/blobs").read_dir().is_ok_and(|mut blobs| {
            blobs.any(|blob| blob.unwrap().path().extension().is_some_and(|end| end == "incomplete"))
        }));
    }
    succeeds(&mut command(&["--resume"]));
    assert!(killed > 0 && kept > 0, "{killed} killed, {kept} amid a download");
    same_files(&whole, &out);
    // Of 14 MB of weights little came twice: what a killed run had not written yet, and headers.
    let weights = std::fs::metadata(tinylm().join("model.safetensors")).unwrap().len();
    assert!(server.sent() < weights + u64::from(killed + 2) * (1 << 20), "{} of {weights}", server.sent());
    let verified =
        succeeds(with_hub(&server, &cache).args(["verify", path(&out), "--against", "org/tinylm@v1"]));
    assert!(verified.contains("identical") || verified.contains("bit"), "{verified}");
}

#[test]
fn planning_a_name_reads_headers_alone_and_the_plan_can_be_carried_out() {
    let dir = tempfile::tempdir().unwrap();
    let (plan, out, cache) = (dir.path().join("plan.json"), dir.path().join("out"), dir.path().join("hub"));
    let server = Server::start("org/tinylm", &tinylm(), Faults::default());
    let json = succeeds(with_hub(&server, &cache).args(["plan", "org/tinylm", "--to", "fixed12", "--json"]));
    std::fs::write(&plan, json).unwrap();
    let inspected = succeeds(with_hub(&server, &cache).args(["inspect", "org/tinylm", "--tensors"]));
    assert!(inspected.contains("model.layers.7.mlp.down_proj.weight"), "{inspected}");
    assert!(server.sent() <= 2 * (256 << 10), "{}", server.sent());
    succeeds(with_hub(&server, &cache).args([
        "convert",
        "org/tinylm",
        path(&out),
        "--plan",
        path(&plan),
        "--quiet",
    ]));
    let here = dir.path().join("here");
    succeeds(llmpress().args(["convert", path(&tinylm()), path(&here), "--to", "fixed12", "--quiet"]));
    same_files(&here, &out);
    // By workers too, who know the name from the plan.
    let spread = dir.path().join("spread");
    for verb in ["worker", "merge"] {
        let mut command = with_hub(&server, &cache);
        command.args([verb, "--plan", path(&plan), path(&spread), "--quiet"]);
        let share: &[&str] = if verb == "worker" { &["--unit", "0"] } else { &[] };
        succeeds(command.args(share));
    }
    same_files(&here, &spread);
    // Where nobody may be asked, what is there serves.
    let count = server.asked().len();
    let text = tinylm().join("eval.txt");
    let ppl = ["eval", "ppl", "org/tinylm", "--text", path(&text), "--limit", "1"];
    succeeds(with_hub(&server, &cache).env("HF_HUB_OFFLINE", "1").args(ppl));
    assert_eq!(server.asked().len(), count);
}

#[test]
fn a_name_that_is_nowhere_is_said_to_be_neither_here_nor_there() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start("org/tinylm", &tinylm(), Faults::default());
    let output = with_hub(&server, dir.path()).args(["inspect", "org/tinylme"]).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    for part in ["org/tinylme", "no such directory", "404"] {
        assert!(error.contains(part), "{error}");
    }
    // What exists is never looked for elsewhere.
    let here = dir.path().join("org/tinylm");
    std::fs::create_dir_all(&here).unwrap();
    let output = with_hub(&server, dir.path())
        .current_dir(dir.path())
        .args(["inspect", "org/tinylm"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(server.asked().len(), 1);
}
