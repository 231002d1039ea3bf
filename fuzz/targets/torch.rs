//! Any bytes as a file of torch: refused, or tensors that lie in it.
#![no_main]

use std::path::PathBuf;

use libfuzzer_sys::fuzz_target;
use llmpress_formats::Checkpoint;

fuzz_target!(|data: &[u8]| {
    let dir = directory();
    std::fs::write(dir.join("pytorch_model.bin"), data).expect("a temporary file");
    let Ok(checkpoint) = Checkpoint::open(&dir) else { return };
    for (name, tensor) in checkpoint.tensors() {
        assert!(tensor.bytes <= data.len() as u64);
        let whole = checkpoint.read_tensor(name).expect("lies in the file");
        assert!(checkpoint.view(&tensor.unit, "data").expect("lies in the file") == whole);
    }
});

/// A directory of this process.
fn directory() -> PathBuf {
    // In memory, where there is such a place.
    let root = Some(PathBuf::from("/dev/shm")).filter(|dir| dir.is_dir()).unwrap_or_else(std::env::temp_dir);
    let dir = root.join(format!("llmpress-fuzz-torch-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a temporary directory");
    dir
}
