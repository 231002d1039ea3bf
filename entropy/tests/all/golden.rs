//! Byte identity with the official DFloat11 packer, on vectors that it made (`golden/make_golden.py`).
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use llmpress_entropy::dfloat11::{Code, EncodedUnit, Histogram, Span, Unrepresentable, decode_span, encode};
use serde_json::Value;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// A safetensors file, read whole.
struct File {
    header: Value,
    data: Vec<u8>,
}

impl File {
    fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        Self { header: serde_json::from_slice(&bytes[8..end]).unwrap(), data: bytes[end..].to_vec() }
    }

    fn bytes(&self, name: &str) -> &[u8] {
        let offsets = &self.header[name]["data_offsets"];
        &self.data[offsets[0].as_u64().unwrap() as usize..offsets[1].as_u64().unwrap() as usize]
    }

    fn words(&self, name: &str) -> Vec<u16> {
        self.bytes(name).chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect()
    }

    fn case(&self) -> Value {
        serde_json::from_str(self.header["__metadata__"]["case"].as_str().unwrap()).unwrap()
    }
}

fn components(unit: &EncodedUnit) -> [(&'static str, &[u8]); 5] {
    [
        ("luts", &unit.luts),
        ("encoded_exponent", &unit.encoded_exponent),
        ("sign_mantissa", &unit.sign_mantissa),
        ("output_positions", &unit.output_positions),
        ("gaps", &unit.gaps),
    ]
}

fn decodes_to(unit: &EncodedUnit, words: &[u16]) {
    let code = Code::from_luts(&unit.luts).unwrap();
    let span = Span {
        encoded_exponent: &unit.encoded_exponent,
        gaps: &unit.gaps,
        output_positions: &unit.output_positions,
        sign_mantissa: &unit.sign_mantissa,
    };
    let mut out = vec![0; words.len()];
    decode_span(&code, &span, 0, &mut out).unwrap();
    assert!(out == words);
}

#[test]
fn synthetic_units_are_byte_identical() {
    let mut cases = 0;
    for entry in std::fs::read_dir(golden()).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        if path.extension().is_none_or(|e| e != "safetensors")
            || ["codes", "long_codes"].contains(&name.as_str())
        {
            continue;
        }
        let file = File::read(&path);
        let words = file.words("words");
        let unit = encode(&words).unwrap();
        let case = file.case();
        for (component, bytes) in components(&unit) {
            let official = file.bytes(component);
            if case["fault"] == component {
                // The official packer leaves out an entry: N stands there once instead of twice.
                assert!(bytes[..official.len()] == *official, "{name}: {component}");
                assert!(bytes[official.len()..] == (words.len() as u32).to_le_bytes(), "{name}: {component}");
            } else {
                assert!(bytes == official, "{name}: {component}");
            }
        }
        decodes_to(&unit, &words);
        cases += 1;
    }
    assert!(cases >= 15, "{cases}");
}

#[test]
fn tables_of_many_histograms_are_byte_identical_or_refused_where_the_packer_fails() {
    let file = File::read(&golden().join("codes.safetensors"));
    let counts = file.bytes("counts").chunks_exact(256 * 8);
    let (rows, mut luts) = (file.bytes("rows"), file.bytes("luts"));
    assert_eq!(counts.len(), rows.len());
    let mut refused = 0;
    for (case, (counts, &rows)) in counts.zip(rows).enumerate() {
        let mut all = [0; 256];
        for (count, bytes) in all.iter_mut().zip(counts.chunks_exact(8)) {
            *count = u64::from_le_bytes(bytes.try_into().unwrap());
        }
        match (Code::build(&Histogram::from_counts(all)), rows) {
            (Ok(code), 1..) => {
                let (expected, later) = luts.split_at(usize::from(rows) * 256);
                assert!(code.luts() == expected, "case {case}");
                let read = Code::from_luts(code.luts()).unwrap();
                assert!(read.lengths() == code.lengths(), "case {case}");
                luts = later;
            }
            (Err(Unrepresentable::NoFirstEntry | Unrepresentable::Empty), 0) => refused += 1,
            (result, _) => {
                panic!("case {case}: {rows} rows against {:?}", result.map(|c| c.luts().len() / 256))
            }
        }
    }
    assert!(luts.is_empty() && refused > 0, "{refused}");
}

#[test]
fn codes_at_the_limit_of_32_bits_are_byte_identical() {
    let file = File::read(&golden().join("long_codes.safetensors"));
    let case = file.case();
    let runs: Vec<u32> =
        file.bytes("runs").chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect();
    let list: Vec<u16> =
        runs.chunks_exact(2).flat_map(|run| std::iter::repeat_n(run[0] as u16, run[1] as usize)).collect();
    let stride = case["stride"].as_u64().unwrap() as usize;
    let words: Vec<u16> = (0..list.len()).map(|i| list[i * stride % list.len()]).collect();
    let unit = encode(&words).unwrap();
    assert!(unit.luts == file.bytes("luts"));
    assert_eq!(unit.luts[unit.luts.len() - 256..].iter().max(), Some(&32));
    for (component, bytes) in components(&unit) {
        assert_eq!(
            blake3::hash(bytes).to_hex().as_str(),
            case["components"][component]["blake3"],
            "{component}"
        );
    }
    decodes_to(&unit, &words);
}

/// Compares the digests of the units of one model; returns how many there were.
fn units_of(model: &str, dir: &Path) -> usize {
    let units: Value = serde_json::from_slice(&std::fs::read(golden().join("units.json")).unwrap()).unwrap();
    let mut files: Vec<PathBuf> = std::fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    files.sort();
    let files: Vec<File> = files.iter().map(|p| File::read(p)).collect();
    let mut compared = 0;
    for unit in units.as_array().unwrap().iter().filter(|u| u["model"] == model) {
        let mut words = Vec::new();
        for tensor in unit["tensors"].as_array().unwrap() {
            let name = tensor.as_str().unwrap();
            words.extend(files.iter().find(|f| f.header.get(name).is_some()).unwrap().words(name));
        }
        assert_eq!(words.len() as u64, unit["elements"].as_u64().unwrap());
        let encoded = encode(&words).unwrap();
        for (component, bytes) in components(&encoded) {
            let expected = &unit["components"][component];
            assert_eq!(bytes.len() as u64, expected["bytes"].as_u64().unwrap());
            assert_eq!(
                blake3::hash(bytes).to_hex().as_str(),
                expected["blake3"],
                "{}: {component}",
                unit["unit"]
            );
        }
        compared += 1;
    }
    compared
}

#[test]
fn all_blocks_of_tinylm_are_byte_identical() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tinylm");
    assert_eq!(units_of("tinylm", &dir), 8);
}

/// Whole layers of the real models in the directory that `LLMPRESS_MODELS` names.
#[test]
#[ignore = "needs the real models: LLMPRESS_MODELS=DIR cargo test -- --ignored"]
fn whole_layers_of_real_models_are_byte_identical() {
    let models =
        PathBuf::from(std::env::var("LLMPRESS_MODELS").expect("LLMPRESS_MODELS names their directory"));
    for model in ["smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"] {
        assert!(units_of(model, &models.join(model)) >= 3, "{model}");
    }
}
