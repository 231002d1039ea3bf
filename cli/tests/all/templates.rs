//! No chat template takes the program with it, or much time.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use crate::support::{self, fails, ok, path, run};
use std::path::Path;
use std::time::{Duration, Instant};

/// tinylm with a chat template.
fn model(dir: &Path, template: &str) {
    std::fs::create_dir_all(dir).unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        if !dir.join(file).exists() {
            std::fs::copy(support::tinylm().join(file), dir.join(file)).unwrap();
        }
    }
    std::fs::write(dir.join("chat_template.jinja"), template).unwrap();
}

fn generate(dir: &Path) -> Vec<&str> {
    vec!["generate", path(dir), "--chat", "--prompt", "hi", "-n", "1", "--quiet"]
}

#[test]
fn a_template_is_rendered_in_a_child_as_it_would_be_here() {
    let dir = tempfile::tempdir().unwrap();
    model(dir.path(), "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}");
    let mut args = generate(dir.path());
    args.push("--json");
    let report: serde_json::Value = serde_json::from_str(&ok(&args)).unwrap();
    assert!(report["prompt_tokens"].as_u64().unwrap() > 3, "{report}");
    model(dir.path(), "\n{{ raise_exception('only dogs') }}");
    let error = fails(&generate(dir.path()));
    assert!(error.contains("chat_template.jinja") && error.contains("line 2: only dogs"), "{error}");
    model(dir.path(), "\n\n{% if %}");
    let error = fails(&generate(dir.path()));
    assert!(error.contains("is no valid chat template in line 3"), "{error}");
}

#[test]
fn deep_templates_do_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let repeat =
        |head: &str, part: &str, times: usize, tail: &str| format!("{head}{}{tail}", part.repeat(times));
    for template in [
        repeat("{{ 1", "+1", 20_000, " }}"),
        repeat("{{ 1", "+1", 500_000, " }}"),
        repeat("{{ ", "-", 300_000, "1 }}"),
        repeat("{{ ", "not ", 250_000, "1 }}"),
        repeat("{{ a", ".b", 300_000, " }}"),
        repeat("{{ a", "[0]", 300_000, " }}"),
        repeat("{{ a", "()", 300_000, " }}"),
        repeat("{{ 1", "|string", 100_000, " }}"),
        repeat("{{ 1", " if 1 else 1", 60_000, " }}"),
        repeat("{{ 1", "~1", 400_000, " }}"),
        repeat("{{ 1", " and 1", 150_000, " }}"),
        repeat("", "{% if 1 %}", 100_000, ""),
        repeat("{% if 0 %}", "{% elif 0 %}", 80_000, "{% endif %}"),
        "{% set ns=namespace() %}{% set ns.x=[ns] %}{{ ns == ns.x }}".to_owned(),
        "{% set ns=namespace() %}{% set ns.x=[ns] %}{{ ns|string|length }}".to_owned(),
        "{% set ns=namespace() %}{% set ns.x=[ns] %}{{ ns|tojson }}".to_owned(),
    ] {
        // Some give nothing, which is no prompt.
        model(dir.path(), &format!("x{template}"));
        let started = Instant::now();
        let output = run(&generate(dir.path()));
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        let head: String = template.chars().take(60).collect();
        assert!(matches!(output.status.code(), Some(0 | 1)), "{head}: {:?} {error}", output.status);
        assert!(output.status.success() || error.contains("chat_template.jinja"), "{head}: {error}");
        assert!(started.elapsed() < Duration::from_secs(90), "{head}: {:?}", started.elapsed());
    }
}

/// Lists of lists that are small in memory and endless to walk.
#[test]
fn doubled_lists_end_soon_with_an_error() {
    let build = |name: &str| {
        format!(
            "{{% set {name}=namespace(x=[1,1]) %}}{{% for i in range(60) %}}{{% set {name}.x=[{name}.x,{name}.x] %}}{{% endfor %}}"
        )
    };
    let head = build("a") + &build("b");
    std::thread::scope(|scope| {
        for tail in [
            "{{ a.x == b.x }}",
            "{{ a.x in [b.x] }}",
            "{{ a.x|string|length }}",
            "{{ [a.x, b.x]|max|length }}",
            "{{ [a.x, b.x]|unique|list|length }}",
            "{{ [a.x, b.x]|sort|length }}",
        ] {
            let template = format!("{head}{tail}");
            scope.spawn(move || {
                let dir = tempfile::tempdir().unwrap();
                model(dir.path(), &template);
                let started = Instant::now();
                let error = fails(&generate(dir.path()));
                assert!(error.contains("chat_template.jinja"), "{tail}: {error}");
                assert!(started.elapsed() < Duration::from_secs(90), "{tail}: {:?}", started.elapsed());
            });
        }
    });
}

#[test]
fn large_texts_end_with_an_error() {
    let dir = tempfile::tempdir().unwrap();
    for template in [
        "{% set ns=namespace(x=[1,1]) %}{% for i in range(40) %}{% set ns.x=ns.x+ns.x %}{% endfor %}{{ ns.x|length }}",
        "{% set ns=namespace(x='ab') %}{% for i in range(40) %}{% set ns.x=ns.x~ns.x %}{% endfor %}{{ ns.x|length }}",
        "{{ ('x' * 60000000)|upper|replace('X', 'yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy')|length }}",
    ] {
        model(dir.path(), template);
        let error = fails(&generate(dir.path()));
        assert!(error.contains("chat_template.jinja"), "{template}: {error}");
    }
}
