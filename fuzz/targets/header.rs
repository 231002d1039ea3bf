//! Any bytes as the header of a safetensors file: refused or consistent.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use llmpress_formats::{Header, RenderEntry, render};

fuzz_target!(|input: (u64, &[u8])| {
    let (extra, json) = input;
    // Mostly lengths that a header could mean.
    for file_len in [8 + json.len() as u64 + extra % 4096, extra] {
        let Ok(header) = Header::parse(Path::new("fuzz"), json, file_len) else { continue };
        let end: u64 = header.tensors().iter().map(|t| t.bytes).sum();
        assert_eq!(header.data_start() + end, file_len);
        // What was accepted is written and read again as it is.
        let entries: Vec<RenderEntry> = header
            .tensors()
            .iter()
            .map(|t| RenderEntry {
                name: t.name.clone(),
                dtype: t.dtype,
                shape: t.shape.clone(),
                begin: t.offset,
                end: t.offset + t.bytes,
            })
            .collect();
        let bytes = render(&entries, header.metadata(), None).expect("a header that was read fits");
        let again =
            Header::parse(Path::new("fuzz"), &bytes[8..], bytes.len() as u64 + end).expect("is valid");
        assert_eq!(again.tensors(), header.tensors());
    }
});
