//! Manifests with anything changed and their own digest right again: `verify` never panics, and what it passes holds the
//! tensors of the source and every file.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use crate::support::{self, checkpoint, files, ok, path, random, tiny_llama};
use llmpress_formats::{Checkpoint, Digest};
use llmpress_validation::verify_digests;
use serde_json::{Map, Value, json};

const ROUNDS: usize = 1000;

/// A random place in a value, as the keys that lead there.
fn place(value: &Value, next: &mut impl FnMut() -> u64) -> Vec<String> {
    let mut keys = Vec::new();
    let mut at = value;
    loop {
        let children: Vec<(String, &Value)> = match at {
            Value::Object(map) => map.iter().map(|(k, v)| (k.clone(), v)).collect(),
            Value::Array(list) => list.iter().enumerate().map(|(i, v)| (i.to_string(), v)).collect(),
            _ => Vec::new(),
        };
        if children.is_empty() || !keys.is_empty() && next().is_multiple_of(5) {
            return keys;
        }
        let (key, child) = children[next() as usize % children.len()].clone();
        keys.push(key);
        at = child;
    }
}

fn pointer(keys: &[String]) -> String {
    keys.iter().map(|k| format!("/{}", k.replace('~', "~0").replace('/', "~1"))).collect()
}

/// Changes one thing.
fn mutate(manifest: &mut Value, next: &mut impl FnMut() -> u64) {
    let keys = place(manifest, next);
    let other = manifest.pointer(&pointer(&place(manifest, next))).cloned().unwrap_or(Value::Null);
    let (last, parents) = keys.split_last().unwrap();
    let Some(parent) = manifest.pointer_mut(&pointer(parents)) else { return };
    let odd = [
        Value::Null,
        json!(0),
        json!(-1),
        json!(u64::MAX),
        json!(1.5),
        json!(""),
        json!("../x"),
        json!([]),
        json!({}),
        json!(true),
    ];
    let odd = odd[next() as usize % odd.len()].clone();
    let old = match parent {
        Value::Object(map) => map.get(last).cloned(),
        Value::Array(list) => last.parse::<usize>().ok().and_then(|i| list.get(i).cloned()),
        _ => None,
    };
    let tweaked = match old.clone() {
        Some(Value::String(text)) if !text.is_empty() => {
            let mut bytes = text.into_bytes();
            let at = next() as usize % bytes.len();
            bytes[at] = b"0123456789abcdef"[next() as usize % 16];
            json!(String::from_utf8_lossy(&bytes))
        }
        Some(Value::Number(n)) => json!(n.as_u64().unwrap_or(0).wrapping_add(1 << (next() % 64))),
        _ => odd.clone(),
    };
    match (parent, next() % 5) {
        (Value::Object(map), 0) => drop(map.remove(last)),
        (Value::Object(map), 1) => {
            let key = if next().is_multiple_of(2) { format!("{last}x") } else { "lm_head.weight".to_owned() };
            map.insert(key, old.unwrap_or(odd));
        }
        (Value::Object(map), 2) => drop(map.insert(last.clone(), odd)),
        (Value::Object(map), 3) => drop(map.insert(last.clone(), other)),
        (Value::Object(map), _) => drop(map.insert(last.clone(), tweaked)),
        (Value::Array(list), way) => {
            let Some(at) = last.parse::<usize>().ok().filter(|i| *i < list.len()) else { return };
            match way {
                0 => drop(list.remove(at)),
                1 => list.push(old.unwrap_or(odd)),
                2 => list[at] = odd,
                3 => list[at] = other,
                _ => list[at] = tweaked,
            }
        }
        _ => {}
    }
}

/// The manifest's text with its digest right.
fn rendered(manifest: &Value) -> Vec<u8> {
    let mut map: Map<String, Value> = manifest.as_object().unwrap().clone();
    map.remove("manifest_blake3");
    let mut text = serde_json::to_string_pretty(&map).unwrap();
    text.truncate(text.trim_end_matches('}').trim_end().len());
    let head = format!("{text},\n  \"manifest_blake3\": \"");
    let zeroed = format!("{head}{:064}\"\n}}\n", 0);
    format!("{head}{}\"\n}}\n", Digest::of(zeroed.as_bytes())).into_bytes()
}

fn tensors(checkpoint: &Checkpoint) -> BTreeMap<String, Vec<u8>> {
    let names = checkpoint.tensors().keys();
    names.map(|name| (name.clone(), checkpoint.read_tensor(name).unwrap())).collect()
}

#[test]
fn what_verify_passes_is_the_source_whatever_the_manifest_says() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    checkpoint(&source, support::LLAMA, &tiny_llama()[..9]);
    std::fs::write(source.join("tokenizer.json"), "{}").unwrap();
    let original = tensors(&Checkpoint::open(&source).unwrap());
    let (mut passed, mut found, mut refused) = (0, 0, 0);
    for (seed, method) in (1..).zip(["dfloat11", "fixed12", "planes", "archive"]) {
        let out = dir.path().join(method);
        ok(&["convert", path(&source), path(&out), "--to", method, "--max-shard-size", "30K"]);
        let made = files(&out);
        let whole: Value = serde_json::from_slice(&made["llmpress.json"]).unwrap();
        assert_eq!(rendered(&whole).len(), made["llmpress.json"].len());
        let mut next = random(seed);
        for _ in 0..ROUNDS {
            let mut manifest = whole.clone();
            for _ in 0..1 + next() % 2 {
                mutate(&mut manifest, &mut next);
            }
            let text = rendered(&manifest);
            std::fs::write(out.join("llmpress.json"), &text).unwrap();
            let check = || verify_digests(&out, true, None, &|_| {});
            let result = catch_unwind(AssertUnwindSafe(check))
                .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&text)));
            match result {
                Err(_) => refused += 1,
                Ok(report) if !report.faults.is_empty() => found += 1,
                Ok(_) => {
                    passed += 1;
                    holds(&out, &original, &made, &text);
                }
            }
        }
    }
    println!("{refused} refused, {found} found faulty, {passed} passed and were right");
    assert!(refused > ROUNDS && found > ROUNDS / 10 && passed > ROUNDS / 10);
}

/// A directory that passed has the tensors of the source, and its manifest lists every file.
fn holds(out: &Path, original: &BTreeMap<String, Vec<u8>>, made: &BTreeMap<String, Vec<u8>>, text: &[u8]) {
    let shown = String::from_utf8_lossy(text);
    let checkpoint = Checkpoint::open(out).unwrap();
    assert!(tensors(&checkpoint) == *original, "{shown}");
    assert!(checkpoint.tied().is_empty(), "{shown}");
    let manifest = checkpoint.manifest().unwrap();
    for name in made.keys().filter(|name| *name != "llmpress.json") {
        assert!(manifest.file_names().any(|n| n == name), "{name}: {shown}");
    }
}
