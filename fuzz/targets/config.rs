//! Any text as a configuration: members are added and cut out without touching the rest.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use llmpress_formats::{Config, DFLOAT11_KEY, PatternDict};

fuzz_target!(|text: &str| {
    let path = Path::new("fuzz");
    let Ok(config) = Config::parse(path, text.to_owned()) else { return };
    if let Some(patterns) = config.get(DFLOAT11_KEY).and_then(|c| c.get("pattern_dict")) {
        if let Ok(patterns) = PatternDict::parse(patterns) {
            let _ = patterns.units(["model.layers.0.self_attn.q_proj.weight", "lm_head.weight"]);
        }
    }
    let Ok(plain) = config.without_member(DFLOAT11_KEY) else { return };
    let plain = Config::parse(path, plain).expect("stays valid without the member");
    let value = serde_json::json!({"a": [1, {"b": "}"}]});
    let with = plain.with_member(DFLOAT11_KEY, &value).expect("has a closing brace");
    let with = Config::parse(path, with).expect("stays valid with the member");
    if plain.get(DFLOAT11_KEY).is_none() {
        assert_eq!(with.get(DFLOAT11_KEY), Some(&value));
        assert_eq!(with.without_member(DFLOAT11_KEY).expect("is cut out"), plain.text());
    }
});
