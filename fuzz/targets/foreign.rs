//! Any bytes as matrices that other tools quantised, under any settings: refused, or the same numbers however they are read.
#![no_main]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use libfuzzer_sys::fuzz_target;
use llmpress_formats::{Checkpoint, Dtype, RenderEntry, render};

/// Layout, bits, columns of a group, rows, columns, dtype of scales, settings, what is wrong, then the bytes of all tensors.
type Input<'a> = (u8, u8, u8, u8, u8, u8, u8, u8, &'a [u8]);

const MODULE: &str = "model.layers.0.self_attn.q_proj";

fuzz_target!(|input: Input<'_>| {
    let dir = directory();
    let (config, tensors) = checkpoint(input);
    std::fs::write(dir.join("config.json"), config).expect("a temporary file");
    std::fs::write(dir.join("model.safetensors"), tensors).expect("a temporary file");
    let Ok(checkpoint) = Checkpoint::open_dequantised(&dir) else { return };
    let name = format!("{MODULE}.weight");
    if !checkpoint.tensors().contains_key(&name) {
        return;
    }
    let Ok(Some(codes)) = checkpoint.codes(&name) else { return };
    let whole = checkpoint.read_tensor(&name);
    let held = codes.held();
    assert_eq!(whole.is_ok(), held.is_ok(), "{:?} {:?}", whole.err(), held.err());
    let (Ok(whole), Ok(held)) = (whole, held) else { return };
    // From codes in memory, all rows and some of them.
    let (rows, cols) = (codes.rows() as usize, codes.cols());
    let of_row = cols * codes.dtype().bits() as usize / 8;
    for some in [0..rows, rows / 3..rows - rows / 4] {
        let mut out = vec![0; some.len() * of_row];
        held.read_rows(some.clone(), &mut out).expect("rows that there are");
        assert!(out == whole[some.start * of_row..some.end * of_row]);
        // And from the file.
        checkpoint.read_rows(&name, some.start as u64..some.end as u64, &mut out).expect("was read before");
        assert!(out == whole[some.start * of_row..some.end * of_row]);
    }
    if let Ok(packed) = held.packed() {
        let mut expected = vec![0; rows * cols];
        codes.read_codes(0..rows as u64, &mut expected).expect("was read before");
        let mut row = vec![0; cols];
        for (i, expected) in expected.chunks_exact(cols).enumerate() {
            packed.codes(i, &mut row);
            assert!(row == expected);
        }
    }
});

/// A directory of this process.
fn directory() -> PathBuf {
    // In memory, where there is such a place.
    let root = Some(PathBuf::from("/dev/shm")).filter(|dir| dir.is_dir()).unwrap_or_else(std::env::temp_dir);
    let dir = root.join(format!("llmpress-fuzz-foreign-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a temporary directory");
    dir
}

/// The configuration and the file of tensors.
fn checkpoint(input: Input<'_>) -> (String, Vec<u8>) {
    let (layout, bits, group, rows, cols, dtype, settings, wrong, data) = input;
    let (rows, cols, bits) = (1 + u64::from(rows % 96), 1 + u64::from(cols % 160), 1 + u64::from(bits % 9));
    let group = [-1, 1, 16, 32, 64, 128, 0, -2][usize::from(group % 8)];
    let groups = if group > 0 { cols.div_ceil(group as u64) } else { 1 };
    let scale = [Dtype::F16, Dtype::BF16, Dtype::F32][usize::from(dtype % 3)];
    let on = |bit: u8| settings >> bit & 1 == 1;
    let words = |count: u64| (count * bits).div_ceil(32);
    let (quantization, mut tensors) = match layout % 4 {
        0 => {
            let strategy = if groups > 1 { "group" } else { "channel" };
            let inputs = match on(1) {
                true => {
                    r#"{"num_bits": 8, "type": "int", "symmetric": false, "strategy": "token", "dynamic": true}"#
                }
                false => "null",
            };
            let text = format!(
                r#"{{"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {{"group_0": {{"targets":
                ["{}"], "weights": {{"num_bits": {bits}, "type": "int", "symmetric": {}, "group_size": {group}, "strategy":
                "{strategy}"}}, "input_activations": {inputs}}}}}}}"#,
                if on(2) { "Linear" } else { "re:.*q_proj" },
                !on(0),
            );
            let packed = if on(3) { words(cols) } else { cols.div_ceil(32 / bits.min(32)) };
            let mut tensors = vec![
                ("weight_packed", Dtype::I32, vec![rows, packed]),
                ("weight_scale", scale, vec![rows, groups]),
                ("weight_shape", if on(4) { Dtype::I32 } else { Dtype::I64 }, vec![2]),
            ];
            if on(0) {
                tensors.push(("weight_zero_point", Dtype::I32, vec![words(rows), groups]));
            }
            (text, tensors)
        }
        1 => {
            let text = format!(
                r#"{{"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {{"group_0": {{"targets":
                ["Linear"], "weights": {{"num_bits": {bits}, "symmetric": {}, "strategy": "channel"}}}}}}}}"#,
                !on(0)
            );
            let mut tensors =
                vec![("weight", Dtype::I8, vec![rows, cols]), ("weight_scale", scale, vec![rows, 1])];
            if on(0) {
                tensors.push(("weight_zero_point", Dtype::I8, vec![rows, 1]));
            }
            (text, tensors)
        }
        2 => {
            let cols = words(cols) * 32 / bits;
            let groups = if group > 0 { cols.div_ceil(group as u64) } else { 1 };
            let format = if on(0) { "gptq_v2" } else { "gptq" };
            let text = format!(
                r#"{{"quant_method": "gptq", "bits": {bits}, "group_size": {group}, "checkpoint_format": "{format}"}}"#
            );
            let mut tensors = vec![
                ("qweight", Dtype::I32, vec![words(cols), rows]),
                ("scales", scale, vec![groups, rows]),
                ("qzeros", Dtype::I32, vec![groups, words(rows)]),
            ];
            if on(1) {
                tensors.push(("g_idx", Dtype::I32, vec![cols]));
            }
            (text, tensors)
        }
        _ => {
            let rows = rows.next_multiple_of(8);
            let text = format!(
                r#"{{"quant_method": "awq", "bits": {}, "group_size": {group}, "version": "gemm", "zero_point": {}}}"#,
                if on(1) { bits } else { 4 },
                !on(0)
            );
            let tensors = vec![
                ("qweight", Dtype::I32, vec![cols, rows / 8]),
                ("scales", scale, vec![groups, rows]),
                ("qzeros", Dtype::I32, vec![groups, rows / 8]),
            ];
            (text, tensors)
        }
    };
    // One tensor that is not there, or of another shape or dtype.
    let at = usize::from(wrong >> 4) % tensors.len();
    match wrong & 15 {
        1 => drop(tensors.remove(at)),
        2 => tensors[at].2[0] += 1,
        3 => tensors[at].2.push(1),
        4 => tensors[at].1 = Dtype::U8,
        5 => tensors[at].2[0] = 0,
        _ => {}
    }
    let mut bytes = data.iter().copied().cycle();
    let mut contents = Vec::new();
    for (name, dtype, shape) in tensors {
        let len = dtype.byte_len(&shape).unwrap_or(0) as usize;
        let mut content: Vec<u8> = (0..len).map(|_| bytes.next().unwrap_or(0)).collect();
        let number = |value: u64, width: usize| value.to_le_bytes()[..width].to_vec();
        match name {
            // Mostly sides that are those of the matrix, and groups that there are.
            "weight_shape" if settings < 128 && dtype != Dtype::U8 => {
                let width = dtype.bits() as usize / 8;
                content = [rows, cols].iter().flat_map(|side| number(*side, width)).collect();
                content.resize(len, 0);
            }
            "g_idx" if settings < 192 => {
                let index = content.chunks_exact(4).map(|bytes| u64::from(bytes[0]) % groups);
                content = index.flat_map(|group| number(group, 4)).collect();
            }
            _ => {}
        }
        contents.push((format!("{MODULE}.{name}"), dtype, shape, content));
    }
    contents.sort_by_key(|(_, dtype, ..)| std::cmp::Reverse(*dtype));
    let config = format!(r#"{{"model_type": "llama", "quantization_config": {quantization}}}"#);
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
    let mut bytes = render(&entries, &BTreeMap::new(), None)
        .unwrap_or_else(|e| panic!("{}: {e}", Path::new("a header of a few tensors").display()));
    tensors.iter().for_each(|(.., content)| bytes.extend_from_slice(content));
    bytes
}
