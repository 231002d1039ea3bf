//! GGUF files, written by the package that defines the format (`gguf/make_gguf.py`).
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use llmpress_formats::encoding::ggml::Blocks;
use llmpress_formats::{
    Checkpoint, Config, Dtype, Encoding, GGUF_DTYPES_KEY, GgufLayout, GgufTensor, GgufValue, Kind,
    read_small_file,
};

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gguf").join(name)
}

/// What the package's own dequantisers make of each matrix, in the dtype that it is read as here.
fn expected() -> Vec<(String, Vec<f32>)> {
    let bytes = std::fs::read(file("expected.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let values =
        |data: &[u8]| data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    file.tensors().into_iter().map(|(name, view)| (name, values(view.data()))).collect()
}

fn words(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    let bytes = |value: &f32| match dtype {
        Dtype::F32 => value.to_le_bytes().to_vec(),
        Dtype::F16 => half::f16::from_f32(*value).to_le_bytes().to_vec(),
        _ => half::bf16::from_f32(*value).to_le_bytes().to_vec(),
    };
    values.iter().flat_map(bytes).collect()
}

#[test]
fn every_type_is_the_numbers_that_the_package_makes_of_it() {
    let checkpoint = Checkpoint::open(&file("blocks.gguf")).unwrap();
    assert_eq!(checkpoint.kind(), Kind::Gguf);
    checkpoint.check_units().unwrap();
    let expected = expected();
    assert_eq!((expected.len(), checkpoint.tensors().len()), (Blocks::ALL.len(), Blocks::ALL.len()));
    let mut seen = Vec::new();
    for (name, values) in &expected {
        let tensor = checkpoint.tensor(name).unwrap();
        assert_eq!(tensor.shape, [3, 512], "{name}");
        let encoding = checkpoint.unit_of(tensor).unwrap().encoding();
        match encoding {
            Encoding::Raw => seen.push(tensor.dtype.name().to_lowercase()),
            Encoding::Ggml(ggml) => {
                assert_eq!((tensor.dtype, ggml.widths().as_deref()), (Dtype::BF16, Some(encoding.name())));
                seen.push(encoding.name().to_owned());
            }
            other => panic!("{name}: {other:?}"),
        }
        let whole = words(tensor.dtype, values);
        assert!(checkpoint.read_tensor(name).unwrap() == whole, "{name}: {}", encoding.name());
        // Any part of it.
        let width = tensor.dtype.bits() as usize / 8;
        for (first, count) in [(0, 0), (1, 1), (511, 2), (255, 300), (700, 836), (1535, 1)] {
            let mut part = vec![0; count * width];
            checkpoint.read(name, (first * width) as u64, &mut part).unwrap();
            assert!(part == whole[first * width..][..count * width], "{name} {first} {count}");
        }
    }
    seen.sort();
    let mut all: Vec<&str> = Blocks::ALL.iter().map(|blocks| blocks.name()).collect();
    all.sort_unstable();
    assert_eq!(seen, all);
}

#[test]
fn a_file_is_seen_as_a_directory_of_what_its_metadata_make() {
    let path = file("models/llama3_rope.gguf");
    let text = String::from_utf8(read_small_file(&path.join("config.json"), 1 << 20).unwrap()).unwrap();
    let config = Config::parse(&path, text).unwrap();
    assert_eq!(config.model_type(), Some("llama"));
    let scaling = config.get("rope_scaling").unwrap();
    assert_eq!((scaling["rope_type"].as_str(), scaling["factor"].as_f64()), (Some("llama3"), Some(8.0)));
    // Without a vocabulary there is no tokenizer.
    for none in ["tokenizer.json", "tokenizer_config.json", "other.json", "llmpress.json"] {
        let error = read_small_file(&path.join(none), 1 << 20).unwrap_err();
        assert!(matches!(error, llmpress_formats::Error::Io { .. }), "{none}: {error}");
    }
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert!(checkpoint.made_files().unwrap().keys().eq(["config.json"].iter()));
}

/// A file with some bytes changed.
fn damaged(name: &str, change: impl Fn(&mut Vec<u8>)) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = std::fs::read(file(name)).unwrap();
    change(&mut bytes);
    let path = dir.path().join("changed.gguf");
    std::fs::write(&path, bytes).unwrap();
    (dir, path)
}

/// Replaces the first place of some bytes.
fn replace(bytes: &mut [u8], from: &[u8], to: &[u8]) {
    let at = bytes.windows(from.len()).position(|window| window == from).unwrap();
    bytes[at..at + to.len()].copy_from_slice(to);
}

#[test]
fn files_that_break_the_format_are_refused_by_name() {
    type Change = fn(&mut Vec<u8>);
    let cases: [(Change, &str); 14] = [
        (|b| b[0] = b'X', "does not begin with GGUF"),
        (|b| b[4] = 1, "is of version 1"),
        (|b| b[4..8].copy_from_slice(&[0, 0, 0, 3]), "big-endian"),
        (|b| b.truncate(30), "cut short"),
        (|b| b.truncate(0), "cut short"),
        (|b| b.truncate(b.len() - 32), "cut short, download it again"),
        (|b| b[8..16].fill(255), "values follow"),
        (|b| b[16..24].fill(255), "values follow"),
        (|b| b[24..32].fill(255), "values follow"),
        (|b| replace(b, b"general.architecture", b"general.architecturX"), "the architecture \"\""),
        (|b| replace(b, b"qwen3.block_count", b"qwen3.block_counX"), "does not say qwen3.block_count"),
        (|b| replace(b, b"blk.2.ffn_up.weight", b"blk.9.ffn_up.weight"), "twice"),
        (
            |b| replace(b, b"blk.2.ffn_up.weight", b"blk.2.ffn_xx.weight"),
            "is no tensor of the architecture qwen3",
        ),
        // The type of the first tensor follows its name and dimensions.
        (
            |b| {
                let at = b.windows(19).position(|w| w == b"blk.3.ffn_up.weight").unwrap() + 19 + 4 + 16;
                b[at] = 19;
            },
            "is of ggml type 19, which is not read",
        ),
    ];
    for (number, (change, wanted)) in cases.into_iter().enumerate() {
        let (_dir, path) = damaged("blocks.gguf", change);
        let error = Checkpoint::open(&path).unwrap_err().to_string();
        assert!(error.contains(wanted), "{number}: {error}");
    }
    // Every beginning of a file is refused too.
    let whole = std::fs::read(file("blocks.gguf")).unwrap();
    for len in (0..whole.len()).step_by(257) {
        let (_dir, path) = damaged("blocks.gguf", |bytes| bytes.truncate(len));
        assert!(Checkpoint::open(&path).is_err(), "{len}");
    }
}

#[test]
fn a_model_in_parts_is_read_from_all_of_them() {
    let dir = tempfile::tempdir().unwrap();
    let source = std::fs::read(file("models/llama.gguf")).unwrap();
    let whole = Checkpoint::open(&file("models/llama.gguf")).unwrap();
    // The same metadata, and half of the tensors each: what is said of the others is left out.
    let at = |number: usize| dir.path().join(format!("model-{number:05}-of-00002.gguf"));
    let tensors = usize::try_from(u64::from_le_bytes(source[8..16].try_into().unwrap())).unwrap();
    for number in [0, 1] {
        let wanted = |index: usize| (index < tensors / 2) == (number == 0);
        std::fs::write(at(number + 1), part(&source, number as u16, wanted)).unwrap();
    }
    for number in [1, 2] {
        let parts = Checkpoint::open(&at(number)).unwrap();
        assert!(parts.tensors().keys().eq(whole.tensors().keys()));
        for name in whole.tensors().keys() {
            assert!(parts.read_tensor(name).unwrap() == whole.read_tensor(name).unwrap(), "{name}");
        }
    }
    std::fs::remove_file(at(2)).unwrap();
    let error = Checkpoint::open(&at(1)).unwrap_err().to_string();
    assert!(error.contains("model-00002-of-00002.gguf"), "{error}");
    std::fs::rename(at(1), dir.path().join("model.gguf")).unwrap();
    let error = Checkpoint::open(&dir.path().join("model.gguf")).unwrap_err().to_string();
    assert!(error.contains("-00001-of-00002.gguf"), "{error}");
}

/// A part of a file: its metadata with `split.*` besides, and some of its tensors.
fn part(source: &[u8], number: u16, wanted: impl Fn(usize) -> bool) -> Vec<u8> {
    let word = |at: usize| u64::from_le_bytes(source[at..at + 8].try_into().unwrap()) as usize;
    let kind = |at: usize| u32::from_le_bytes(source[at..at + 4].try_into().unwrap());
    let width = |kind: u32| [1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8][kind as usize];
    let (tensors, values) = (word(8), word(16));
    let mut at = 24;
    for _ in 0..values {
        at += 8 + word(at);
        let of = kind(at);
        at += 4;
        at += match of {
            8 => 8 + word(at),
            9 => 12 + width(kind(at)) * word(at + 4),
            other => width(other),
        };
    }
    let metadata = &source[24..at];
    let (mut infos, mut offsets) = (Vec::new(), Vec::new());
    for _ in 0..tensors {
        let start = at;
        at += 8 + word(at);
        let dims = kind(at) as usize;
        at += 4 + 8 * dims + 4 + 8;
        infos.push(source[start..at - 8].to_vec());
        offsets.push(word(at - 8));
    }
    let data = at.next_multiple_of(32);
    let end = |index: usize| offsets.get(index + 1).map_or(source.len(), |next| data + next);
    let mut out = source[..8].to_vec();
    let mut header = Vec::new();
    let mut contents: Vec<u8> = Vec::new();
    let mut count = 0u64;
    for index in (0..tensors).filter(|index| wanted(*index)) {
        header.extend(&infos[index]);
        header.extend((contents.len() as u64).to_le_bytes());
        contents.extend(&source[data + offsets[index]..end(index)]);
        contents.resize(contents.len().next_multiple_of(32), 0);
        count += 1;
    }
    out.extend(count.to_le_bytes());
    out.extend((values as u64 + 2).to_le_bytes());
    out.extend(metadata);
    for (key, value) in [("split.no", number), ("split.count", 2)] {
        out.extend((key.len() as u64).to_le_bytes());
        out.extend(key.as_bytes());
        out.extend(2u32.to_le_bytes());
        out.extend(value.to_le_bytes());
    }
    out.extend(header);
    out.resize(out.len().next_multiple_of(32), 0);
    out.extend(contents);
    out
}

/// A file with a norm in single precision and a matrix in half precision, and what it says of their dtypes.
fn with_dtypes(dtypes: &[&str]) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let mut values = vec![("general.architecture".to_owned(), GgufValue::Text("qwen3".to_owned()))];
    for key in ["block_count", "embedding_length", "attention.head_count"] {
        values.push((format!("qwen3.{key}"), GgufValue::Number(2)));
    }
    values.push((
        GGUF_DTYPES_KEY.to_owned(),
        GgufValue::Texts(dtypes.iter().map(ToString::to_string).collect()),
    ));
    let tensor = |name: &str, blocks, shape: &[u64]| GgufTensor {
        name: name.to_owned(),
        blocks,
        shape: shape.to_vec(),
    };
    let tensors =
        [tensor("output_norm.weight", Blocks::F32, &[2]), tensor("output.weight", Blocks::F16, &[1, 2])];
    let layout = GgufLayout::new(&values, &tensors).unwrap();
    let mut bytes = layout.header().to_vec();
    bytes.resize(layout.bytes() as usize, 0);
    let at = layout.offset(0).unwrap() as usize;
    bytes[at..at + 8].copy_from_slice(&[words(Dtype::F32, &[1.5]), words(Dtype::F32, &[-0.0])].concat());
    std::fs::write(&path, bytes).unwrap();
    (dir, path)
}

#[test]
fn numbers_come_back_in_the_dtypes_that_a_file_says_they_came_from() {
    let (_dir, path) = with_dtypes(&["output_norm.weight BF16", "output.weight F16", "other F32"]);
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.tensor("model.norm.weight").unwrap().dtype, Dtype::BF16);
    assert!(checkpoint.read_tensor("model.norm.weight").unwrap() == words(Dtype::BF16, &[1.5, -0.0]));
    let (_dir, path) = with_dtypes(&[]);
    assert_eq!(Checkpoint::open(&path).unwrap().tensor("model.norm.weight").unwrap().dtype, Dtype::F32);
    for (dtypes, wanted) in
        [("output.weight BF16", "is f16 and came from BF16"), ("output_norm.weight I8", "came from I8")]
    {
        let (_dir, path) = with_dtypes(&[dtypes]);
        let error = Checkpoint::open(&path).unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}");
    }
}
