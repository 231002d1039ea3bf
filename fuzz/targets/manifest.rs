//! Any bytes as a manifest, with its own digest put right so that the fuzzer gets past it.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use llmpress_formats::Manifest;

fuzz_target!(|bytes: &[u8]| {
    let path = Path::new("fuzz");
    let _ = Manifest::parse(path, bytes);
    let Ok(manifest) = serde_json::from_slice::<Manifest>(bytes) else { return };
    let written = manifest.to_bytes().expect("a manifest can be written");
    if let Ok(read) = Manifest::parse(path, &written) {
        assert_eq!(read.to_bytes().expect("is written again"), written);
        for (name, unit) in &read.units {
            let _ = unit.encoding(path, name);
        }
    }
});
