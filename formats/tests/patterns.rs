//! A `pattern_dict` costs little time and memory whatever its expressions.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::time::{Duration, Instant};

use llmpress_formats::PatternDict;
use serde_json::{Map, Value, json};

/// The most memory this process had, KiB.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn hostile_expressions_cost_little() {
    let dict = |count: usize, pattern: &str| -> Value {
        let entries: Map<String, Value> =
            (0..count).map(|i| (pattern.replace('#', &i.to_string()), json!(["q_proj"]))).collect();
        Value::Object(entries)
    };
    let names: Vec<String> = (0..2000).map(|i| format!("model.layers.{i}.self_attn.q_proj.weight")).collect();
    let before = peak();
    for (count, pattern) in [
        (400, r"#\w{0,20}"),
        (400, r"#(?u:\w{0,20})"),
        (4096, r"#\d+.*"),
        (4096, "#(a|b)*a(a|b){12}"),
        (4096, "#a{0,200}"),
        (2000, "#(?iu)[\\w\\d\\s]\\PL\\p{Greek}"),
        (1, "#(a|model.*)*a.{90}"),
        (4096, &format!("#{}", r"\w".repeat(28))),
        (4096, &"x".repeat(1000)),
    ] {
        let started = Instant::now();
        if let Ok(patterns) = PatternDict::parse(&dict(count, pattern)) {
            let _ = patterns.units(names.iter().map(String::as_str));
        }
        let (took, grown) = (started.elapsed(), peak() - before);
        assert!(took < Duration::from_secs(8), "{count} times {pattern:.40}: {took:?}");
        assert!(grown < 200 << 10, "{count} times {pattern:.40}: {grown} KiB");
    }
}

#[test]
fn too_many_names_for_so_many_expressions_are_refused() {
    let entries: Map<String, Value> = (0..4000).map(|i| (format!("x{i}"), json!([]))).collect();
    let patterns = PatternDict::parse(&Value::Object(entries)).unwrap();
    let names: Vec<String> = (0..50_000).map(|i| format!("model.layers.{i}.self_attn.weight")).collect();
    let error = patterns.units(names.iter().map(String::as_str)).unwrap_err().to_string();
    assert!(error.contains("4000 entries"), "{error}");
}
