//! Any bytes as matrices of FP8, NVFP4 or MXFP4, in any shapes: refused, or the same numbers however they are read.
#![no_main]

use std::collections::BTreeMap;
use std::path::PathBuf;

use libfuzzer_sys::fuzz_target;
use llmpress_formats::{Checkpoint, Dtype, RenderEntry, render};

/// Layout, rows, columns, lines and groups of scales, dtypes of elements and scales, settings, what is wrong, the bytes of all tensors.
type Input<'a> = (u8, u8, u8, (u8, u8), (u8, u8), u8, u8, &'a [u8]);

const ELEMENTS: [Dtype; 6] = [Dtype::F8_E4M3, Dtype::F8_E5M2, Dtype::U8, Dtype::I8, Dtype::F4, Dtype::BF16];
const SCALES: [Dtype; 7] =
    [Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::F8_E4M3, Dtype::F8_E8M0, Dtype::U8, Dtype::I32];

fuzz_target!(|input: Input<'_>| {
    let dir = directory();
    let (config, tensors) = checkpoint(input);
    std::fs::write(dir.join("config.json"), config).expect("a temporary file");
    std::fs::write(dir.join("model.safetensors"), tensors).expect("a temporary file");
    let Ok(checkpoint) = Checkpoint::open_dequantised(&dir) else { return };
    for (name, tensor) in checkpoint.tensors() {
        let Ok(whole) = checkpoint.read_tensor(name) else { continue };
        // What is no matrix is stored as it is, in whatever dtype.
        let width = (tensor.dtype.bits() as usize / 8).max(1);
        let all = whole.len() / width;
        for some in [0..all / 3, all / 3..all, all / 2..all - all / 4] {
            let mut out = vec![0; some.len() * width];
            checkpoint.read(name, (some.start * width) as u64, &mut out).expect("was read before");
            assert!(out == whole[some.start * width..some.end * width]);
        }
    }
});

/// A directory of this process.
fn directory() -> PathBuf {
    // In memory, where there is such a place.
    let root = Some(PathBuf::from("/dev/shm")).filter(|dir| dir.is_dir()).unwrap_or_else(std::env::temp_dir);
    let dir = root.join(format!("llmpress-fuzz-small-floats-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a temporary directory");
    dir
}

/// The configuration and the file of tensors.
fn checkpoint(input: Input<'_>) -> (String, Vec<u8>) {
    let (layout, rows, cols, (lines, groups), (element, scale), settings, wrong, data) = input;
    let (rows, cols) = (u64::from(rows % 80), u64::from(cols) % 97);
    let on = |bit: u8| settings >> bit & 1 == 1;
    let element = ELEMENTS[usize::from(element) % ELEMENTS.len()];
    let scale = SCALES[usize::from(scale) % SCALES.len()];
    // Mostly grids that fit.
    let grid = match lines % 8 {
        0 => vec![],
        1 => vec![1],
        2 => vec![rows, 1],
        3 => vec![rows],
        4 => vec![rows.div_ceil(16), cols.div_ceil(32)],
        5 => vec![rows, cols * if element == Dtype::U8 { 2 } else { 1 } / 16],
        6 => vec![rows, cols / 32],
        _ => vec![u64::from(lines / 8), u64::from(groups % 16)],
    };
    let module = "model.layers.0.self_attn.q_proj";
    let (method, mut tensors) = match layout % 4 {
        0 => (
            r#""quant_method": "fp8", "weight_block_size": [16, 32]"#.to_owned(),
            vec![
                (format!("{module}.weight"), element, vec![rows, cols]),
                (format!("{module}.weight_scale_inv"), scale, grid),
            ],
        ),
        1 => {
            let (bits, strategy) = (if on(0) { 4 } else { 8 }, if on(1) { "block" } else { "group" });
            let structure = if on(2) { "[16, 32]" } else { "null" };
            (
                format!(
                    r#""quant_method": "compressed-tensors", "config_groups": {{"group_0": {{"targets": ["Linear"], "weights":
                    {{"num_bits": {bits}, "type": "float", "strategy": "{strategy}", "block_structure": {structure}, "group_size": {}}}}}}}"#,
                    if on(3) { 16 } else { -1 }
                ),
                vec![
                    (
                        format!("{module}.{}", if on(4) { "weight_packed" } else { "weight" }),
                        element,
                        vec![rows, cols],
                    ),
                    (format!("{module}.weight_scale"), scale, grid),
                    (format!("{module}.weight_global_scale"), Dtype::F32, vec![1]),
                ],
            )
        }
        2 => (
            r#""quant_method": "modelopt", "quant_algo": "NVFP4""#.to_owned(),
            vec![
                (format!("{module}.weight"), element, vec![rows, cols]),
                (format!("{module}.weight_scale"), scale, grid),
                (format!("{module}.weight_scale_2"), Dtype::F32, vec![]),
                (format!("{module}.input_scale"), Dtype::F32, vec![]),
            ],
        ),
        _ => {
            let (count, groups) = (u64::from(lines % 3), u64::from(groups % 5));
            (
                r#""quant_method": "mxfp4""#.to_owned(),
                vec![
                    ("model.experts.up_blocks".to_owned(), Dtype::U8, vec![count, rows, groups, 16]),
                    ("model.experts.up_scales".to_owned(), Dtype::U8, vec![count, rows, groups]),
                ],
            )
        }
    };
    // One tensor that is not there, or of another shape or dtype.
    let at = usize::from(wrong >> 4) % tensors.len();
    match wrong & 15 {
        1 => drop(tensors.remove(at)),
        2 => tensors[at].2.push(1),
        3 => tensors[at].2.insert(0, 2),
        4 => tensors[at].1 = Dtype::U8,
        5 => tensors[at].2.iter_mut().for_each(|side| *side = 0),
        _ => {}
    }
    let mut bytes = data.iter().copied().cycle();
    let mut contents = Vec::new();
    for (name, dtype, shape) in tensors {
        // Half a byte at the end is no tensor.
        let Some(len) = dtype.byte_len(&shape).filter(|len| *len < 1 << 20) else { continue };
        let content: Vec<u8> = (0..len).map(|_| bytes.next().unwrap_or(0)).collect();
        contents.push((name, dtype, shape, content));
    }
    contents.sort_by_key(|(_, dtype, ..)| std::cmp::Reverse(*dtype));
    let dtype = ["bfloat16", "float16", "float32", "int4"][usize::from(settings >> 6)];
    let config = format!(
        r#"{{"model_type": "llama", "torch_dtype": "{dtype}", "quantization_config": {{{method}}}}}"#
    );
    (config, file(&contents))
}

/// A safetensors file.
fn file(tensors: &[(String, Dtype, Vec<u64>, Vec<u8>)]) -> Vec<u8> {
    let mut begin = 0;
    let mut entries = Vec::new();
    for (name, dtype, shape, content) in tensors {
        let end = begin + content.len() as u64;
        entries.push(RenderEntry { name: name.clone(), dtype: *dtype, shape: shape.clone(), begin, end });
        begin = end;
    }
    let mut bytes = render(&entries, &BTreeMap::new(), None).expect("a header of a few tensors");
    tensors.iter().for_each(|(.., content)| bytes.extend_from_slice(content));
    bytes
}
