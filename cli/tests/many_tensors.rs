//! A checkpoint of very many tensors costs little more memory than its names. Alone in its file: the memory of child
//! processes is counted.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod support;

use llmpress_formats::{Dtype, RenderEntry, render};
use support::{ok, path};

const TENSORS: u64 = 200_000;

/// The largest child so far, in bytes.
fn peak_of_children() -> u64 {
    #[allow(unsafe_code)]
    // SAFETY: zeros are a valid `rusage`, which the call fills in.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_CHILDREN, &mut usage);
        usage
    };
    usage.ru_maxrss as u64 * 1024
}

#[test]
fn inspecting_many_tensors_takes_less_than_a_kilobyte_each() {
    let dir = tempfile::tempdir().unwrap();
    support::checkpoint(dir.path(), support::LLAMA, &support::tiny_llama()[..1]);
    ok(&["inspect", path(dir.path())]);
    let base = peak_of_children();
    let entries: Vec<RenderEntry> = (0..TENSORS)
        .map(|i| RenderEntry {
            name: format!("model.layers.{}.mlp.experts.{}.gate_proj.weight", i / 384, i % 384),
            dtype: Dtype::BF16,
            shape: vec![2, 2],
            begin: i * 8,
            end: i * 8 + 8,
        })
        .collect();
    let mut bytes = render(&entries, &Default::default(), None).unwrap();
    bytes.resize(bytes.len() + TENSORS as usize * 8, 1);
    std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    assert!(ok(&["inspect", path(dir.path())]).contains("200000"));
    let each = (peak_of_children() - base) / TENSORS;
    println!("{each} bytes a tensor");
    assert!(each < 1000, "{each} bytes a tensor");
}
