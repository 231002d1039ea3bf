//! Checkpoints of FP8, NVFP4 and MXFP4, written by the tools that made their layouts (`small_floats/make_small_floats.py`).
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use llmpress_formats::{Checkpoint, Dtype, Encoding};

const WEIGHT: &str = "model.layers.0.self_attn.q_proj.weight";
const EXPERTS: &str = "model.layers.0.mlp.experts.gate_up_proj";

fn directory(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/small_floats").join(name)
}

fn names() -> Vec<String> {
    let entries = std::fs::read_dir(directory("")).unwrap().map(Result::unwrap).filter(|e| e.path().is_dir());
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.sort();
    assert!(names.len() >= 11, "{names:?}");
    names
}

/// The matrix of a checkpoint, its dtype and shape, and what its own tool makes of it.
fn expected(name: &str) -> (&'static str, String, Vec<u64>, Vec<u8>) {
    let tensor = if name == "mxfp4-gpt-oss" { EXPERTS } else { WEIGHT };
    let bytes = std::fs::read(directory(name).join("expected.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let view = file.tensor(tensor).unwrap();
    let shape = view.shape().iter().map(|side| *side as u64).collect();
    (tensor, view.dtype().to_string(), shape, view.data().to_vec())
}

/// Words as they are compared: modelopt gives minus zero no sign, which the standard and all others do.
fn words(name: &str, bytes: &[u8]) -> Vec<u16> {
    let unsigned = |word: u16| if name == "nvfp4-modelopt" && word == 1 << 15 { 0 } else { word };
    bytes.chunks_exact(2).map(|b| unsigned(u16::from_le_bytes([b[0], b[1]]))).collect()
}

#[test]
fn matrices_are_the_numbers_that_their_own_tools_make_of_them() {
    for name in names() {
        let checkpoint = Checkpoint::open_dequantised(&directory(&name)).unwrap();
        let (weight, dtype, shape, bytes) = expected(&name);
        let tensor = checkpoint.tensor(weight).unwrap();
        assert_eq!((tensor.dtype.name(), &tensor.shape), (dtype.as_str(), &shape), "{name}");
        assert!(words(&name, &checkpoint.read_tensor(weight).unwrap()) == words(&name, &bytes), "{name}");
        // Scales of inputs say nothing of the numbers; all else is there.
        let all: Vec<&String> = checkpoint.tensors().keys().collect();
        assert_eq!(all, [weight, "model.norm.weight"], "{name}");
        checkpoint.check_units().unwrap();
        assert!(checkpoint.is_dequantised());
        // Whoever does not ask for numbers gets what is stored.
        for stored in [Checkpoint::open(&directory(&name)), Checkpoint::open_codes(&directory(&name))] {
            let stored = stored.unwrap();
            assert!(stored.tensors().len() > 2 && !stored.is_dequantised(), "{name}");
            assert!(stored.stored_sizes().keys().eq(["raw"].iter()), "{name}");
        }
    }
}

#[test]
fn any_part_of_a_matrix_is_that_part_of_the_whole() {
    for name in names() {
        let checkpoint = Checkpoint::open_dequantised(&directory(&name)).unwrap();
        let weight = expected(&name).0;
        let bytes = checkpoint.read_tensor(weight).unwrap();
        let all = bytes.len() / 2;
        for (first, count) in
            [(0, 0), (1, 1), (23, 2), (24, 1), (95, 2), (97, 200), (all - 1, 1), (960, 1777), (1500, 100)]
        {
            let mut part = vec![0; count * 2];
            checkpoint.read(weight, first as u64 * 2, &mut part).unwrap();
            assert!(part == bytes[first * 2..][..count * 2], "{name} {first} {count}");
        }
        assert!(checkpoint.read(weight, 1, &mut [0; 2]).is_err(), "{name}");
        assert!(checkpoint.read(weight, 0, &mut vec![0; bytes.len() + 2]).is_err(), "{name}");
    }
}

#[test]
fn what_is_stored_is_told_by_its_name_and_the_bits_that_it_takes() {
    for (name, encoding, widths) in [
        ("fp8-block", "fp8", "e4m3,16x32"),
        ("fp8-block-ue8m0", "fp8", "e4m3,32x48"),
        ("fp8-block-ragged", "fp8", "e4m3,48x40"),
        ("fp8-channel", "fp8", "e4m3,1x96"),
        ("fp8-tensor", "fp8", "e4m3,64x96"),
        ("fp8-modelopt", "fp8", "e4m3,64x96"),
        ("mxfp8", "fp8", "e4m3,1x32"),
        ("nvfp4", "nvfp4", "e2m1,1x16"),
        ("nvfp4-modelopt", "nvfp4", "e2m1,1x16"),
        ("mxfp4", "mxfp4", "e2m1,1x32"),
        ("mxfp4-gpt-oss", "mxfp4", "e2m1,1x32"),
    ] {
        let checkpoint = Checkpoint::open_dequantised(&directory(name)).unwrap();
        let tensor = checkpoint.tensor(expected(name).0).unwrap();
        let unit = checkpoint.unit_of(tensor).unwrap();
        assert_eq!((unit.encoding().name(), unit.encoding().widths().as_deref()), (encoding, Some(widths)));
        assert!(!unit.encoding().is_lossy() && matches!(unit.encoding(), Encoding::Scaled(_)), "{name}");
        assert!(unit.stored_bytes() < tensor.bytes * 3 / 4, "{name}");
        let mut stored: Vec<&str> = unit.components().keys().collect();
        stored.retain(|name| *name != "global");
        assert_eq!(stored, ["elements", "scales"], "{name}");
    }
}

/// A tensor as its header says it, and its bytes.
type Stored = (String, Dtype, Vec<u64>, Vec<u8>);

/// A copy of a checkpoint with other settings and tensors.
fn changed(
    name: &str,
    config: impl Fn(&mut serde_json::Value),
    change: impl Fn(&mut Vec<Stored>),
) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(&directory(name)).unwrap();
    let mut tensors: Vec<Stored> = source
        .tensors()
        .iter()
        .map(|(name, t)| (name.clone(), t.dtype, t.shape.clone(), source.read_tensor(name).unwrap()))
        .collect();
    change(&mut tensors);
    tensors.sort_by_key(|tensor| std::cmp::Reverse(tensor.1));
    let mut entries = Vec::new();
    let mut begin = 0;
    for (name, dtype, shape, bytes) in &tensors {
        let end = begin + bytes.len() as u64;
        let (name, shape) = (name.clone(), shape.clone());
        entries.push(llmpress_formats::RenderEntry { name, dtype: *dtype, shape, begin, end });
        begin = end;
    }
    let mut file = llmpress_formats::render(&entries, &Default::default(), None).unwrap();
    tensors.iter().for_each(|(.., bytes)| file.extend_from_slice(bytes));
    std::fs::write(dir.path().join("model.safetensors"), file).unwrap();
    let text = std::fs::read_to_string(directory(name).join("config.json")).unwrap();
    let mut value = serde_json::from_str(&text).unwrap();
    config(&mut value);
    std::fs::write(dir.path().join("config.json"), value.to_string()).unwrap();
    dir
}

fn find<'a>(tensors: &'a mut [Stored], last: &str) -> &'a mut Stored {
    tensors.iter_mut().find(|tensor| tensor.0.ends_with(last)).unwrap()
}

#[test]
fn what_does_not_fit_together_is_refused_by_name() {
    type Change = fn(&mut Vec<Stored>);
    let cases: [(&str, Change, &str); 12] = [
        ("fp8-block", |t| find(t, "weight_scale_inv").2 = vec![3, 4], "no grid of scales over 64 x 96"),
        ("fp8-block", |t| find(t, "weight_scale_inv").2 = vec![12], "no grid of scales"),
        ("fp8-block", |t| find(t, "weight_scale_inv").1 = Dtype::I32, "I32, which scales are not read in"),
        ("fp8-block", |t| t.retain(|t| !t.0.ends_with("q_proj.weight")), "is missing, of which"),
        ("fp8-tensor", |t| find(t, "q_proj.weight").2 = vec![6144], "where a matrix is needed"),
        (
            "fp8-tensor",
            |t| find(t, "input_scale").0 = WEIGHT.replace("weight", "weight_zero_point"),
            "zero points",
        ),
        ("nvfp4", |t| find(t, "global_scale").1 = Dtype::I32, "which scales are not read in"),
        ("nvfp4", |t| find(t, "global_scale").3.fill(0), "its global scale is 0"),
        ("nvfp4", |t| find(t, "global_scale").3.fill(255), "its global scale is NaN"),
        ("mxfp4", |t| find(t, "weight_scale").1 = Dtype::I8, "I8, which scales are not read in"),
        ("mxfp4-gpt-oss", |t| find(t, "_blocks").2 = vec![2, 24, 4, 8], "blocks are of 16 bytes"),
        ("mxfp4-gpt-oss", |t| find(t, "_scales").1 = Dtype::F8_E8M0, "where both are U8"),
    ];
    for (name, change, wanted) in cases {
        let dir = changed(name, |_| {}, change);
        let opened = Checkpoint::open_dequantised(dir.path());
        let error = opened.and_then(|c| c.check_units().and(c.read_tensor(WEIGHT))).unwrap_err().to_string();
        assert!(error.contains(wanted), "{name}: {error}");
        // What is only stored is stored as it is.
        Checkpoint::open(dir.path()).unwrap();
    }
}

#[test]
fn settings_that_do_not_fit_are_refused_by_name() {
    type Change = fn(&mut serde_json::Value);
    let weights = |q: &mut serde_json::Value, key: &str, value: serde_json::Value| {
        q["config_groups"]["group_0"]["weights"][key] = value;
    };
    let cases: [(&str, Change, &str); 5] = [
        ("fp8-block", |q| q["weight_block_size"] = serde_json::json!([128]), "is not two numbers above 0"),
        ("fp8-block", |q| q["weight_block_size"] = serde_json::json!([0, 128]), "is not two numbers above 0"),
        ("fp8-block", |q| q["weight_block_size"] = serde_json::json!("128"), "is not two numbers above 0"),
        ("mxfp4", |q| q["config_groups"]["group_0"]["weights"]["num_bits"] = 6.into(), "6 bits of float"),
        (
            "fp8-tensor",
            |q| q["config_groups"]["group_0"]["weights"]["num_bits"] = 4.into(),
            "4 bits of float",
        ),
    ];
    for (name, change, wanted) in cases {
        let dir = changed(name, |config| change(&mut config["quantization_config"]), |_| {});
        let error = Checkpoint::open_dequantised(dir.path()).unwrap_err().to_string();
        assert!(error.contains(wanted), "{name}: {error}");
    }
    // A method that is not known here is left alone, and so is a group that says integers.
    let dir =
        changed("fp8-block", |config| config["quantization_config"]["quant_method"] = "other".into(), |_| {});
    assert!(!Checkpoint::open_dequantised(dir.path()).unwrap().is_dequantised());
    let dir = changed("fp8-tensor", |c| weights(&mut c["quantization_config"], "type", "int".into()), |_| {});
    assert!(Checkpoint::open_dequantised(dir.path()).is_err());
}

#[test]
fn the_model_says_the_dtype_where_scales_do_not() {
    for (said, dtype) in [("float16", Dtype::F16), ("torch.float32", Dtype::F32), ("bfloat16", Dtype::BF16)] {
        let dir = changed("fp8-block", |config| config["torch_dtype"] = said.into(), |_| {});
        let checkpoint = Checkpoint::open_dequantised(dir.path()).unwrap();
        assert_eq!(checkpoint.tensor(WEIGHT).unwrap().dtype, dtype);
        let bytes = checkpoint.read_tensor(WEIGHT).unwrap();
        assert_eq!(bytes.len(), 64 * 96 * dtype.bits() as usize / 8);
        if dtype == Dtype::F32 {
            // Rounded once, they are the others.
            let rounded = bytes.chunks_exact(4).flat_map(|b| {
                half::bf16::from_f32(f32::from_le_bytes([b[0], b[1], b[2], b[3]])).to_le_bytes()
            });
            assert!(rounded.eq(expected("fp8-block").3));
        }
    }
}
