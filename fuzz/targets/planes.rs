//! Any bytes as the frames of a chunk: decoded to exactly the chunk, or refused.
#![no_main]

use libfuzzer_sys::fuzz_target;
use llmpress_entropy::planes::Decoder;

fuzz_target!(|input: (u8, bool, u16, Vec<u32>, &[u8])| {
    let (width, rotate, elements, mut lengths, data) = input;
    let width = [1, 2, 4, 8][usize::from(width % 4)];
    lengths.resize(width, 0);
    // Lengths that add up, so that the frames are looked at.
    let mut left = data.len();
    for length in &mut lengths {
        *length = (*length as usize % (left + 1)) as u32;
        left -= *length as usize;
    }
    lengths[width - 1] += left as u32;
    let mut out = vec![0; usize::from(elements) * width];
    let _ = Decoder::new().decode_chunk(width, rotate, &lengths, data, &mut out);
});
