//! Any bytes as a chunk of floats, or of differences, and as a model's frame: decoded alike by both decoders, or refused by both; and any
//! words are the same after coding, by themselves and as their differences from others.
#![no_main]

use libfuzzer_sys::fuzz_target;
use llmpress_entropy::archive::{
    Choice, Decoder, DifferenceChoice, Encoder, LANES, Layout, Model, Parameters, SYMBOLS, Scales,
    add_to_base, classes, classes_of_base, differences,
};

/// Parameters, weights of some symbols, the number of elements, whether the header of the chunk is made sound, whether words have a sign, bytes.
type Input<'a> = (u8, u16, u8, u8, Vec<(u8, u16)>, u16, bool, bool, &'a [u8]);

fuzz_target!(|input: Input<'_>| {
    let (low, base, shift, count, weights, elements, sound, sign, data) = input;
    let (low, shift) = (u32::from(low % 13), u32::from(shift % 8));
    let count = usize::from(count % 16) + 1;
    // Frequencies that sum to 4096: every class has the same weights, some symbols further.
    let tables = (0..count).map(|class| {
        let mut table = [0u16; SYMBOLS];
        let mut left = 4096u16;
        for &(symbol, weight) in &weights {
            let some = weight.min(left);
            table[usize::from(symbol.wrapping_add(class as u8))] += some;
            left -= some;
        }
        table[255] += left;
        table
    });
    let made = match sign {
        true => Model::new(low, base, shift, tables.collect()),
        false => Model::without_sign(low, tables.collect()),
    };
    if let Ok(model) = made {
        let elements = usize::from(elements % 2048);
        let mut chunk = data.to_vec();
        if sound && chunk.len() > 8 + 4 * LANES {
            // States that are large enough, and counts that fit, so that the rest is looked at.
            chunk[8..8 + 4 * LANES].chunks_mut(4).for_each(|state| state[2] |= 1);
            let low_bits = elements.div_ceil(8) * (low as usize + usize::from(sign));
            let words = (chunk.len() - 8 - 4 * LANES).saturating_sub(low_bits) / 2;
            chunk[..4].copy_from_slice(&(words as u32).to_le_bytes());
            chunk[4..8].fill(0);
            chunk.truncate(8 + 4 * LANES + 2 * words + low_bits);
        }
        let of_elements: Vec<u8> = (0..elements).map(|i| (i % count) as u8).collect();
        let decoder = Decoder::new(&model);
        let (mut fast, mut slow) = (vec![0; elements], vec![0; elements]);
        let found = decoder.decode_chunk(&of_elements, &chunk, &mut fast);
        let expected = decoder.decode_chunk_reference(&of_elements, &chunk, &mut slow);
        assert_eq!(found.is_ok(), expected.is_ok());
        assert!(found.is_err() || fast == slow);
        let scales = Scales { rows: vec![1; 9], cols: vec![-1; 7] };
        let scales = if sign { scales } else { Scales::default() };
        let frame = model.pack(&scales).expect("zstd has no reason to refuse");
        let unpacked = match sign {
            true => Model::unpack(Parameters { low, base, shift, classes: count }, 9, 7, &frame)
                .map(|found| found.0),
            false => Model::unpack_without_sign(low, count, &frame),
        };
        assert!(unpacked.expect("its own frame") == model);
    }
    let _ = Model::unpack(Parameters { low, base, shift, classes: count }, 9, 7, data);
    let _ = Model::unpack_without_sign(low, count, data);
    let words: Vec<u16> = data.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
    let cols = usize::from(elements % 64) + 1;
    let words = &words[..words.len() / cols * cols];
    let layout = if sound { Layout::BF16 } else { Layout::F16 };
    if let Ok(Choice { model, scales, .. }) = Choice::of(layout, words.len() / cols, cols, words) {
        let (mut of_elements, mut chunk) = (Vec::new(), Vec::new());
        classes(&model, &scales.rows, &scales.cols, 0, words.len(), &mut of_elements).expect("its own sizes");
        Encoder::new(&model).encode_chunk(&of_elements, words, &mut chunk).expect("its own model");
        let mut back = vec![0; words.len()];
        Decoder::new(&model).decode_chunk(&of_elements, &chunk, &mut back).expect("its own chunk");
        assert!(back == words);
    }
    // Of a tensor by half of it.
    let (words, base) = words.split_at(words.len() / 2);
    let base = &base[..words.len()];
    if let Ok(DifferenceChoice { model, top, .. }) = DifferenceChoice::of(layout, base, words) {
        let (mut of_elements, mut found, mut chunk) = (Vec::new(), Vec::new(), Vec::new());
        classes_of_base(layout, top, model.classes(), base, &mut of_elements);
        differences(base, words, &mut found).expect("as many of both");
        Encoder::new(&model).encode_chunk(&of_elements, &found, &mut chunk).expect("its own model");
        let mut back = vec![0; words.len()];
        Decoder::new(&model).decode_chunk(&of_elements, &chunk, &mut back).expect("its own chunk");
        add_to_base(base, &mut back).expect("as many of both");
        assert!(back == words);
    }
});
