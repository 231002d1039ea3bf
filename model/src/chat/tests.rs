//! Chat templates give the text that Python's Jinja2 gives in the set-up of `transformers`.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{ChatTemplate, Message, jinja};
use crate::Error;

fn templates() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/templates")
}

fn message(role: &str, content: &str) -> Message {
    Message { role: role.to_owned(), content: content.to_owned() }
}

fn directory(template: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
    let tokens = json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>", "pad_token": "<pad>"});
    std::fs::write(dir.path().join("tokenizer_config.json"), tokens.to_string()).unwrap();
    dir
}

/// What a child would answer.
fn here(template: &ChatTemplate, messages: &[Message], generation: bool) -> Result<String, String> {
    jinja::render(&template.source, &template.tokens, messages, generation)
        .map_err(|what| Error::corrupt(&template.path, None, what).to_string())
}

fn render(template: &str, messages: &[Message]) -> Result<String, String> {
    let template = ChatTemplate::open(directory(template).path()).map_err(|e| e.to_string())?.unwrap();
    here(&template, messages, true)
}

#[test]
fn templates_of_the_common_families_render_as_in_python() {
    let text = std::fs::read(templates().join("expected.json")).unwrap();
    let expected: Value = serde_json::from_slice(&text).unwrap();
    let families = expected.as_object().unwrap();
    assert_eq!(families.len(), 7);
    let system = [
        message("system", "  Be brief. "),
        message("user", "Hi there! "),
        message("assistant", " Hello\n"),
        message("user", "Sum: 2 + 2\n* The brown fox?"),
    ];
    let user = [message("user", "Hi <b>ü世</b>?")];
    let twice = [message("user", "a"), message("user", "b")];
    let conversations =
        [("system", &system[..], true), ("user", &user[..], false), ("twice", &twice[..], true)];
    for (family, cases) in families {
        let source = std::fs::read_to_string(templates().join(format!("{family}.jinja"))).unwrap();
        let dir = directory(&source);
        let template = ChatTemplate::open(dir.path()).unwrap().unwrap();
        for (name, messages, generation) in conversations {
            let rendered = here(&template, messages, generation);
            match &cases[name] {
                Value::String(text) => assert_eq!(&rendered.unwrap(), text, "{family}: {name}"),
                error => {
                    let rendered = rendered.unwrap_err().to_string();
                    assert!(rendered.contains("chat_template.jinja"), "{rendered}");
                    assert!(
                        rendered.contains(error["error"].as_str().unwrap()),
                        "{family}: {name}: {rendered}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_template_is_found_where_transformers_looks_for_it() {
    let dir = tempfile::tempdir().unwrap();
    assert!(ChatTemplate::open(dir.path()).unwrap().is_none());
    let write = |name: &str, value: Value| std::fs::write(dir.path().join(name), value.to_string()).unwrap();
    let rendered = || {
        let template = ChatTemplate::open(dir.path()).unwrap().unwrap();
        here(&template, &[], false).unwrap()
    };
    write("tokenizer_config.json", json!({"chat_template": null}));
    assert!(ChatTemplate::open(dir.path()).unwrap().is_none());
    let named = json!([{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]);
    write("tokenizer_config.json", json!({"chat_template": named}));
    assert_eq!(rendered(), "D");
    write("tokenizer_config.json", json!({"chat_template": "C{{ bos_token }}", "bos_token": "!"}));
    assert_eq!(rendered(), "C!");
    write("chat_template.json", json!({"chat_template": "J"}));
    assert_eq!(rendered(), "J");
    std::fs::write(dir.path().join("chat_template.jinja"), "F\n").unwrap();
    assert_eq!(rendered(), "F");
    std::fs::remove_file(dir.path().join("chat_template.jinja")).unwrap();
    for bad in [json!(7), json!([{"name": "tool_use", "template": "T"}])] {
        write("chat_template.json", json!({"chat_template": bad}));
        let error = ChatTemplate::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("chat_template.json") && error.contains("default"), "{error}");
    }
}

#[test]
fn generation_tags_are_passed_over() {
    let source = "{% for m in messages %}\n  {%- generation %}\n{{ m.content }}|\n  {% endgeneration -%}\n  .{% endfor %}";
    assert_eq!(render(source, &[message("user", "a"), message("user", "b")]).unwrap(), "a|\n.b|\n.");
}

#[test]
fn the_date_is_todays() {
    let date = render("{{ strftime_now('%Y-%m-%d %d %B') }}", &[]).unwrap();
    assert!(
        date.len() >= "2024-01-01 01 May".len() && date.starts_with("20") && !date.contains('%'),
        "{date}"
    );
    assert!(render("{{ strftime_now('%') }}", &[]).unwrap_err().contains("strftime_now"));
}

#[test]
fn mistakes_name_the_file_and_the_line() {
    let error = render("{{ bos_token }}\n{% if %}", &[]).unwrap_err();
    assert!(error.contains("chat_template.jinja") && error.contains("line 2"), "{error}");
    let error = render("\n\n{{ messages[0].role + 1 }}", &[message("user", "x")]).unwrap_err();
    assert!(error.contains("chat_template.jinja") && error.contains("line 3"), "{error}");
    for bad in [
        "{{ messages[0]['role'] }}",
        "{{ [1] }}",
        "{{ {} }}",
        "{{ [1] | tojson(sort_keys=true) }}",
        "{{ 'x'.format(1) }}",
    ] {
        assert!(render(bad, &[]).is_err(), "{bad}");
    }
}

#[test]
fn hostile_templates_end_soon_with_an_error() {
    let nested = "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% for j in range(9) %}{% set ns.x = [ns.x] %}{% endfor %}{% endfor %}";
    let doubled =
        "{% set ns = namespace(x=['y']) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}";
    for source in [
        "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}".to_owned(),
        "{% set ns = namespace(x='y') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}".to_owned(),
        "{% set x = 'x' * 9999999 %}{{ x.replace('x', x) }}".to_owned(),
        "{% set x = 'x' * 9999999 %}{{ x.replace('x', x, 99999) }}".to_owned(),
        "{% set x = 'x' * 9999999 %}{{ x.join(range(9999)) }}".to_owned(),
        "{{ '{:>99999999999}'.format('x') }}".to_owned(),
        "{{ 'x' * 99999999999 }}".to_owned(),
        "{{ [1] | tojson(indent=99999999999) }}".to_owned(),
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}".to_owned(),
        format!("{doubled}{{{{ ns.x | tojson }}}}"),
        format!("{doubled}{{{{ ns.x }}}}"),
        format!("{nested}{{{{ ns.x | tojson }}}}"),
        "[".repeat(100_000),
        format!("{{{{ {}", "(".repeat(100_000)),
    ] {
        let started = Instant::now();
        let head: String = source.chars().take(90).collect();
        let result = render(&source, &[]);
        assert!(result.is_err() || source.starts_with('['), "{head}");
        assert!(started.elapsed() < Duration::from_secs(20), "{head}: {:?}", started.elapsed());
    }
    // The deepest values are dropped.
    assert_eq!(render(nested, &[]).unwrap(), "");
    let deepest = format!("{}ns.x{}", "[".repeat(60), "]".repeat(60));
    let head = "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% for j in range(9999) %}";
    let error =
        render(&format!("{head}{{% set ns.x = {deepest} %}}{{% endfor %}}{{% endfor %}}"), &[]).unwrap_err();
    assert!(error.contains("does not end in time"), "{error}");
}
