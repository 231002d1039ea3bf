//! The tokenizer gives the ids of Python's `tokenizers`, and survives whatever its files hold.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use llmpress_model::Tokenizer;
use llmpress_numbers::Numbers;
use serde_json::{Value, json};

fn tinylm() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tinylm")
}

/// A directory with tinylm's tokenizer, changed by `edit`, and other files.
fn directory(edit: impl FnOnce(&mut Value), files: &[(&str, Value)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let text = std::fs::read(tinylm().join("tokenizer.json")).unwrap();
    let mut tokenizer: Value = serde_json::from_slice(&text).unwrap();
    edit(&mut tokenizer);
    write(dir.path(), "tokenizer.json", &tokenizer);
    files.iter().for_each(|(name, value)| write(dir.path(), name, value));
    dir
}

fn write(dir: &Path, name: &str, value: &Value) {
    std::fs::write(dir.join(name), value.to_string()).unwrap();
}

fn open(dir: &tempfile::TempDir) -> Tokenizer {
    Tokenizer::open(dir.path()).unwrap()
}

fn error(dir: &tempfile::TempDir) -> String {
    Tokenizer::open(dir.path()).unwrap_err().to_string()
}

#[test]
fn ids_are_those_of_the_python_library() {
    let tokenizer = Tokenizer::open(&tinylm()).unwrap();
    let cases: [(&str, &[u32]); 7] = [
        ("It is a truth universally acknowledged", &[1092, 331, 259, 3235, 4090, 565, 3683, 1129]),
        ("  two  spaces\n\n\ttab 123", &[221, 839, 221, 520, 487, 279, 199, 199, 198, 84, 369, 477, 18, 19]),
        (
            "na\u{ef}ve 世界 🙂 — e\u{301}",
            &[
                78, 65, 128, 108, 306, 221, 161, 117, 245, 164, 244, 235, 221, 173, 254, 248, 225, 221, 3350,
                243, 302, 137, 224,
            ],
        ),
        ("<|endoftext|>x<|endoftext|>", &[0, 88, 0]),
        ("don't I'LL we've", &[68, 264, 1683, 321, 7, 44, 44, 337, 2218]),
        ("a\0b", &[65, 189, 66]),
        ("", &[]),
    ];
    for (text, ids) in cases {
        assert_eq!(tokenizer.encode(text).unwrap(), ids, "{text:?}");
        assert_eq!(tokenizer.decode(ids, false).unwrap(), text);
    }
    assert_eq!(tokenizer.decode(&[0, 88, 0], true).unwrap(), "x");
    assert_eq!((tokenizer.vocab_size(), tokenizer.bos(), tokenizer.eos()), (4096, Some(0), &[0][..]));
    assert!(!tokenizer.adds_bos());
}

#[test]
fn whole_texts_have_the_tokens_that_the_python_library_counts() {
    let tokenizer = Tokenizer::open(&tinylm()).unwrap();
    for (file, count) in [("eval.txt", 37_042), ("calib.txt", 57_275)] {
        let text = std::fs::read_to_string(tinylm().join(file)).unwrap();
        let ids = tokenizer.encode(&text).unwrap();
        assert_eq!(ids.len(), count, "{file}");
        assert!(tokenizer.decode(&ids, false).unwrap() == text, "{file}");
    }
}

#[test]
fn long_runs_are_encoded_as_in_python() {
    // Each is the worst case of a part of the pattern, or one word for all merges.
    let tokenizer = Tokenizer::open(&tinylm()).unwrap();
    for piece in ["a", "=", "\u{4e16}", "1"] {
        let text = piece.repeat(2_000_000 / piece.len());
        let ids = tokenizer.encode(&text).unwrap();
        assert!(tokenizer.decode(&ids, false).unwrap() == text, "{piece:?}");
    }
    for (piece, count, end) in [
        (" ", 25_005, [2331, 1290, 221, 1130, 79, 273, 288]),
        ("\n", 100_005, [199, 199, 70, 79, 79, 273, 288]),
        ("\u{2003}", 200_005, [3350, 226, 70, 79, 79, 273, 288]),
    ] {
        let ids = tokenizer.encode(&format!("{}foo bar", piece.repeat(100_000))).unwrap();
        assert_eq!(ids.len(), count, "{piece:?}");
        assert_eq!(ids[count - 7..], end, "{piece:?}");
        let error = tokenizer.encode(&format!("xy{}foo bar", piece.repeat(100_001))).unwrap_err().to_string();
        assert!(error.contains("from byte 2: shorten"), "{error}");
    }
}

#[test]
fn a_stream_gives_the_text_of_all_ids_and_only_whole_characters() {
    let tokenizer = Tokenizer::open(&tinylm()).unwrap();
    let text = "  na\u{ef}ve 世界 🙂🙂 — e\u{301} \u{fffd}! end";
    let ids = tokenizer.encode(text).unwrap();
    let mut stream = tokenizer.decode_stream();
    let mut pieces: Vec<String> = ids.iter().filter_map(|&id| stream.push(id).unwrap()).collect();
    pieces.extend(stream.finish().unwrap());
    assert_eq!(pieces.concat(), text);
    assert!(pieces.iter().all(|p| !p.contains('\u{fffd}') || p.contains("\u{fffd}!")), "{pieces:?}");
    assert!(pieces.len() > 10, "{pieces:?}");
    assert_eq!(stream.finish().unwrap(), None);
}

#[test]
fn a_stream_of_broken_bytes_ends_and_stays_short() {
    let tokenizer = Tokenizer::open(&tinylm()).unwrap();
    // The first byte of a character, never followed by its others.
    let byte = tokenizer.encode("世").unwrap()[0];
    let mut stream = tokenizer.decode_stream();
    assert_eq!(stream.push(byte).unwrap(), None);
    assert_eq!(stream.finish().unwrap().as_deref(), Some("\u{fffd}"));
    let mut stream = tokenizer.decode_stream();
    let mut text: String = (0..1000).filter_map(|_| stream.push(byte).unwrap()).collect();
    assert!(text.len() > 900 * 3, "{}", text.len());
    text.push_str(&stream.push(tokenizer.encode("x").unwrap()[0]).unwrap().unwrap());
    assert_eq!(text, format!("{}x", "\u{fffd}".repeat(1000)));
}

#[test]
fn special_tokens_come_from_the_small_files() {
    let none = |_: &mut Value| ();
    let eot = "<|endoftext|>";
    // An object, and only in the map.
    let dir = directory(none, &[("special_tokens_map.json", json!({"bos_token": {"content": eot}}))]);
    assert_eq!((open(&dir).bos(), open(&dir).adds_bos()), (Some(0), false));
    // Null in the configuration counts.
    write(dir.path(), "tokenizer_config.json", &json!({"bos_token": null, "eos_token": "the"}));
    let tokenizer = open(&dir);
    assert_eq!(tokenizer.bos(), None);
    let the = tokenizer.encode("the").unwrap();
    assert_eq!(tokenizer.eos(), the);
    // The generation configuration first, without repetitions; the model's only without one.
    write(dir.path(), "config.json", &json!({"eos_token_id": 7}));
    assert_eq!(open(&dir).eos(), [7, the[0]]);
    write(dir.path(), "generation_config.json", &json!({"eos_token_id": [5, 9, 5, the[0]]}));
    assert_eq!(open(&dir).eos(), [5, 9, the[0]]);
    write(dir.path(), "generation_config.json", &json!({"eos_token_id": "</s>"}));
    let error = error(&dir);
    assert!(error.contains("generation_config.json") && error.contains("eos_token_id"), "{error}");
}

#[test]
fn a_bos_is_added_as_the_files_say() {
    let template = json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    });
    for (post_processor, told, adds) in [
        (Value::Null, json!(null), false),
        (Value::Null, json!(true), true),
        (template.clone(), json!(null), true),
        (template.clone(), json!(false), false),
    ] {
        let config = json!({"bos_token": "<|endoftext|>", "add_bos_token": told});
        let dir = directory(|t| t["post_processor"] = post_processor, &[("tokenizer_config.json", config)]);
        let tokenizer = open(&dir);
        assert_eq!(tokenizer.adds_bos(), adds, "{told}");
        assert_eq!(tokenizer.encode("x").unwrap(), [88]);
        assert_eq!(tokenizer.encode_prompt("x", true).unwrap(), [0, 88]);
        assert_eq!(tokenizer.encode_prompt("x", false).unwrap(), [88]);
        assert_eq!(tokenizer.encode_prompt("<|endoftext|>x", true).unwrap(), [0, 88]);
    }
}

#[test]
fn truncation_padding_and_dropout_do_not_touch_the_ids() {
    let dir = directory(
        |t| {
            t["truncation"] =
                json!({"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"});
            t["padding"] = json!({"strategy": {"Fixed": 1u64 << 45}, "direction": "Right", "pad_to_multiple_of": null,
                "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"});
            t["model"]["dropout"] = json!(0.9);
        },
        &[],
    );
    let text = "It is a truth universally acknowledged";
    assert_eq!(open(&dir).encode(text).unwrap(), [1092, 331, 259, 3235, 4090, 565, 3683, 1129]);
}

#[test]
fn what_is_missing_or_damaged_is_named_with_its_mend() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.model"), "x").unwrap();
    let text = error(&dir);
    assert!(text.contains("there is no tokenizer.json, only tokenizer.model"), "{text}");
    assert!(text.contains("save_pretrained"), "{text}");
    for content in ["", "{", "[]", "{\"model\": {}}", "null"] {
        std::fs::write(dir.path().join("tokenizer.json"), content).unwrap();
        let text = error(&dir);
        assert!(text.contains("tokenizer.json: ") && text.contains("copy it"), "{content}: {text}");
    }
    let dir = directory(|_| (), &[("tokenizer_config.json", json!([1]))]);
    assert!(error(&dir).contains("tokenizer_config.json: must hold a JSON object"));
}

#[test]
fn any_changed_tokenizer_opens_or_fails_without_a_panic() {
    let dir = tempfile::tempdir().unwrap();
    let source = std::fs::read(tinylm().join("tokenizer.json")).unwrap();
    let mut numbers = Numbers::new(1);
    let mut next = move || numbers.bits() as usize;
    let (mut opened, mut failed) = (0, 0);
    for round in 0..120 {
        let mut content = source.clone();
        match round % 3 {
            // The head holds what is not vocabulary.
            0 => content[next() % 800] = b"0{}[],:\"x-9"[next() % 11],
            1 => {
                let at = next() % content.len();
                content[at] = b"09 {}[],:\"\\"[next() % 11];
            }
            _ => content.truncate(next() % source.len()),
        }
        std::fs::write(dir.path().join("tokenizer.json"), content).unwrap();
        match Tokenizer::open(dir.path()) {
            Ok(tokenizer) => {
                opened += 1;
                if let Ok(ids) = tokenizer.encode("It is a <|endoftext|> 世界 123") {
                    let _ = tokenizer.decode(&ids, true);
                }
                let _ = tokenizer.decode(&[0, 1, 4095, 4096, u32::MAX], false);
            }
            Err(e) => {
                failed += 1;
                assert!(e.to_string().contains("tokenizer.json"), "{e}");
            }
        }
    }
    assert!(opened > 5 && failed > 10, "{opened} {failed}");
}

#[test]
fn chains_of_replacements_do_not_make_texts_without_end() {
    let rule = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"});
    let chain = |count: usize| vec![rule.clone(); count];
    let dir = directory(|t| t["normalizer"] = json!({"type": "Sequence", "normalizers": chain(40)}), &[]);
    let told = error(&dir);
    assert!(told.contains("tokenizer.json") && told.contains("times as long"), "{told}");
    let dir = directory(|t| t["decoder"] = json!({"type": "Sequence", "decoders": chain(40)}), &[]);
    let told = error(&dir);
    assert!(told.contains("tokenizer.json") && told.contains("times as long"), "{told}");
    // Some growth is fine where the text is short.
    let dir = directory(|t| t["normalizer"] = json!({"type": "Sequence", "normalizers": chain(4)}), &[]);
    let tokenizer = open(&dir);
    assert_eq!(
        tokenizer.encode("a").unwrap(),
        Tokenizer::open(&tinylm()).unwrap().encode(&"a".repeat(16)).unwrap()
    );
    let told = tokenizer.encode(&"a".repeat(20 << 20)).unwrap_err().to_string();
    assert!(told.contains("32 times as long"), "{told}");
    let dir =
        directory(|t| t["normalizer"] = json!({"type": "Sequence", "normalizers": chain(100_000)}), &[]);
    assert!(error(&dir).contains("256 rules"));
    let deep =
        |levels: usize| "{\"type\": \"Sequence\", \"normalizers\": [".repeat(levels) + &"]}".repeat(levels);
    let dir = directory(|_| (), &[]);
    let text = std::fs::read_to_string(dir.path().join("tokenizer.json")).unwrap();
    let text = text.replacen('{', &format!("{{\"normalizer\": {}, \"_\": ", deep(100_000)), 1);
    std::fs::write(dir.path().join("tokenizer.json"), text).unwrap();
    assert!(error(&dir).contains("tokenizer.json"));
}

/// A tokenizer that splits at an expression.
fn splitting(expression: &str) -> tempfile::TempDir {
    let split =
        json!({"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": false});
    directory(|t| t["pre_tokenizer"] = split, &[])
}

#[test]
fn a_tokenizer_that_does_not_end_is_left_alone() {
    // Looks for the c through the rest of the text from every place.
    let tokenizer = open(&splitting("[ab]*c|a"));
    assert!(!tokenizer.encode("abc").unwrap().is_empty());
    let text = "a".repeat(2 << 20);
    let started = std::time::Instant::now();
    let told = tokenizer.encode(&text).unwrap_err().to_string();
    assert!(told.contains("tokenizer.json") && told.contains("takes more than 26 s"), "{told}");
    assert!(started.elapsed().as_secs() < 120, "{:?}", started.elapsed());
    let started = std::time::Instant::now();
    assert!(tokenizer.encode("a").unwrap_err().to_string().contains("takes more than"));
    assert!(started.elapsed().as_secs() < 5);
}

#[test]
fn expressions_that_take_much_memory_are_refused() {
    for expression in [r"\w{1000}", &r"\w{30}(?=a)".repeat(300), &"(?:a|".repeat(200)] {
        let told = error(&splitting(expression));
        assert!(told.contains("tokenizer.json") && told.contains("regular expression"), "{told}");
    }
    let table = json!({"type": "Precompiled", "precompiled_charsmap": format!("BAAAAAEBAQE{}=", "YWFh".repeat(1000))});
    let told = error(&directory(|t| t["normalizer"] = table, &[]));
    assert!(told.contains("times as long"), "{told}");
}

#[test]
fn what_python_writes_for_infinity_is_read_in_a_tokenizer() {
    let model = json!({"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", "-X"], ["a", -1.5], ["b", "+X"]]});
    let truncation =
        json!({"direction": "Right", "max_length": "+X", "strategy": "LongestFirst", "stride": 0});
    let dir = directory(
        |t| {
            t["model"] = model;
            t["truncation"] = truncation;
        },
        &[],
    );
    let file = dir.path().join("tokenizer.json");
    let text = std::fs::read_to_string(&file).unwrap();
    let odd = text.replace("\"-X\"", "-Infinity").replace("\"+X\"", "Infinity");
    std::fs::write(&file, odd).unwrap();
    assert_eq!(open(&dir).encode("ab").unwrap(), [1, 2]);
}
