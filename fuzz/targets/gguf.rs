//! Any bytes as a GGUF file: refused, or the same numbers however they are read.
#![no_main]

use std::path::PathBuf;

use libfuzzer_sys::fuzz_target;
use llmpress_formats::{Checkpoint, read_small_file};

fuzz_target!(|data: &[u8]| {
    let file = directory().join("model.gguf");
    std::fs::write(&file, data).expect("a temporary file");
    for name in ["tokenizer.json", "tokenizer_config.json", "config.json"] {
        let _ = read_small_file(&file.join(name), 1 << 20);
    }
    let Ok(checkpoint) = Checkpoint::open_dequantised(&file) else { return };
    // A few bytes stand for many weights in no type.
    let total: u64 = checkpoint.tensors().values().map(|tensor| tensor.bytes).sum();
    assert!(total <= 64 * data.len() as u64 + 64);
    for (name, tensor) in checkpoint.tensors() {
        let Ok(whole) = checkpoint.read_tensor(name) else { continue };
        let width = tensor.dtype.bits() as usize / 8;
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
    let dir = root.join(format!("llmpress-fuzz-gguf-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a temporary directory");
    dir
}
