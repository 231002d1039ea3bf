//! Configurations that make no sense are refused or run; they never panic, hang or ask for boundless memory.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;

use llmpress_formats::Checkpoint;
use llmpress_model::{Model, Skips, Unobserved};
use serde_json::{Value, json};

/// Every way to replace one value, or to remove one key, anywhere in a configuration.
fn mutations(value: &Value) -> Vec<Value> {
    let extremes = [
        json!(null),
        json!(0),
        json!(-1),
        json!(1),
        json!(3),
        json!(7),
        json!(1_u64 << 31),
        json!(u64::MAX),
        json!(1e308),
        json!(1e-308),
        json!(0.3),
        json!(true),
        json!("x"),
        json!([]),
        json!([0]),
        json!({}),
    ];
    let mut all = extremes.to_vec();
    match value {
        Value::Object(members) => {
            for (key, member) in members {
                let mut without = members.clone();
                without.remove(key);
                all.push(Value::Object(without));
                for mutated in mutations(member) {
                    let mut with = members.clone();
                    with.insert(key.clone(), mutated);
                    all.push(Value::Object(with));
                }
            }
        }
        Value::Array(items) => {
            for (i, item) in items.iter().enumerate().take(2) {
                for mutated in mutations(item) {
                    let mut with = items.clone();
                    with[i] = mutated;
                    all.push(Value::Array(with));
                }
            }
        }
        _ => (),
    }
    all
}

#[test]
fn no_configuration_panics() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let dir = tempfile::tempdir().unwrap();
    let (mut ran, mut refused) = (0, 0);
    for case in [
        "llama_dynamic",
        "llama_yarn_mscale",
        "llama3_rope",
        "gemma3_text",
        "phi3_longrope",
        "qwen3_moe",
        "qwen2_sliding",
        "gpt_oss",
        "deepseek_v3",
        "deepseek_v2",
        "qwen3_next",
        "llama4",
    ] {
        std::fs::copy(root.join(case).join("model.safetensors"), dir.path().join("model.safetensors"))
            .unwrap();
        for name in ["config.json", "config_v4.json"] {
            let Ok(text) = std::fs::read_to_string(root.join(case).join(name)) else { continue };
            let config: Value = serde_json::from_str(&text).unwrap();
            for mutated in mutations(&config) {
                std::fs::write(dir.path().join("config.json"), mutated.to_string()).unwrap();
                let opened = Checkpoint::open(dir.path()).and_then(|c| Model::open(Arc::new(c)));
                match opened {
                    Err(error) => {
                        refused += 1;
                        let error = error.to_string();
                        assert!(error.contains(dir.path().to_str().unwrap()), "{case}: {mutated}: {error}");
                    }
                    Ok(model) => {
                        ran += 1;
                        let hidden =
                            model.hidden(&[1, 2, 3], &mut model.cache(3), &Skips::new(), &mut Unobserved);
                        model.logits(&hidden.unwrap()).unwrap();
                    }
                }
            }
        }
    }
    assert!(ran > 1000 && refused > 1000, "{ran} ran, {refused} were refused");
}
