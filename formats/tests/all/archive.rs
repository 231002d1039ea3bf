//! `archive` to the bit, whatever the dtype, the shape and the range that is read, and what its reader refuses.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod delta;

use std::collections::BTreeMap;

use crate::by_hand::{Raw, open, raw};
use llmpress_entropy::archive::{CHUNK_ELEMENTS, Choice, Encoder, classes, widen};
use llmpress_formats::encoding::archive::{Archive, CHUNKS, LENGTHS, MODEL, components, layout, sides};
use llmpress_formats::{Dtype, Encoding};
use llmpress_numbers::Numbers;

const DTYPES: [Dtype; 4] = [Dtype::BF16, Dtype::F16, Dtype::F8_E4M3, Dtype::F8_E5M2];

/// A matrix whose rows differ in scale, all kinds of values among its own.
fn bytes(dtype: Dtype, shape: &[u64], seed: u64) -> Vec<u8> {
    let mut numbers = Numbers::new(seed);
    let (rows, cols) = sides(shape);
    let mut bytes = Vec::new();
    for _ in 0..rows {
        let shift = numbers.below(3) as u32;
        for _ in 0..cols {
            let few = numbers.bits() & numbers.bits() >> 13;
            match dtype.bits() {
                16 => {
                    let word = (0x3c00u16 >> shift) ^ few as u16 & 0x83ff;
                    let word = if numbers.below(500) == 0 { numbers.bits() as u16 } else { word };
                    bytes.extend(word.to_le_bytes());
                }
                _ => bytes.push((0x38u8 >> shift) ^ few as u8 & 0x87),
            }
        }
    }
    bytes
}

fn encoded(dtype: Dtype, shape: &[u64], bytes: &[u8]) -> (Archive, BTreeMap<String, Raw>) {
    let mut words: Vec<u16> = Vec::new();
    if dtype.bits() == 16 {
        words.extend(bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])));
    } else {
        widen(bytes, &mut words);
    }
    let (rows, cols) = sides(shape);
    let choice = Choice::of(layout(dtype).unwrap(), rows as usize, cols as usize, &words).unwrap();
    let (mut data, mut lengths, mut of_elements) = (Vec::new(), Vec::new(), Vec::new());
    let mut encoder = Encoder::new(&choice.model);
    for (first, chunk) in (0..).step_by(CHUNK_ELEMENTS).zip(words.chunks(CHUNK_ELEMENTS)) {
        let (scales, before) = (&choice.scales, data.len());
        classes(&choice.model, &scales.rows, &scales.cols, first, chunk.len(), &mut of_elements).unwrap();
        encoder.encode_chunk(&of_elements, chunk, &mut data).unwrap();
        lengths.extend(((data.len() - before) as u32).to_le_bytes());
    }
    let frame = choice.model.pack(&choice.scales).unwrap();
    let specs = components(words.len() as u64, data.len() as u64, frame.len() as u64);
    let stored = specs.into_iter().zip([&data[..], &lengths, &frame]).collect();
    (Archive::of(&choice.model), raw(stored))
}

#[test]
fn any_range_of_any_dtype_and_shape_decodes_to_the_same_bytes() {
    let shapes: [&[u64]; 7] = [
        &[700, 900],
        &[3, 40, 64],
        &[5000],
        &[1, 1],
        &[],
        &[CHUNK_ELEMENTS as u64 + 1],
        &[2, CHUNK_ELEMENTS as u64],
    ];
    let mut several = 0;
    for dtype in DTYPES {
        for shape in shapes {
            let bytes = bytes(dtype, shape, 7);
            let (archive, stored) = encoded(dtype, shape, &bytes);
            several += u32::from(archive.classes > 1);
            let reader = open(&Encoding::Archive(archive), dtype, shape, &stored).unwrap();
            let width = dtype.bits() as usize / 8;
            let mut numbers = Numbers::new(3);
            let mut ranges = vec![0..bytes.len(), 0..0, bytes.len()..bytes.len()];
            for _ in 0..12 {
                let (a, b) = (numbers.below(bytes.len() / width + 1), numbers.below(bytes.len() / width + 1));
                ranges.push(a.min(b) * width..a.max(b) * width);
            }
            for range in ranges {
                let mut out = vec![0xaa; range.len()];
                reader.read(range.start as u64, &mut out).unwrap();
                assert!(out == bytes[range.clone()], "{} {shape:?} {range:?}", dtype.name());
            }
            let mut past = vec![0; 2 * width];
            assert!(reader.read((bytes.len() - width) as u64, &mut past).is_err());
        }
    }
    assert!(several >= 4, "{several}");
}

#[test]
fn what_breaks_the_format_is_refused_by_the_component_at_fault() {
    let (dtype, shape) = (Dtype::BF16, [64u64, 512]);
    let whole = bytes(dtype, &shape, 5);
    let (archive, stored) = encoded(dtype, &shape, &whole);
    let refused = |archive: Archive, stored: &BTreeMap<String, Raw>, shape: &[u64]| {
        let opened = open(&Encoding::Archive(archive), dtype, shape, stored);
        let read = opened.and_then(|reader| {
            let mut out = vec![0; (shape.iter().product::<u64>() * 2) as usize];
            reader.read(0, &mut out)
        });
        read.unwrap_err().to_string()
    };
    let changed = |component: &str, change: &dyn Fn(&mut Raw)| {
        let mut stored = stored.clone();
        change(stored.get_mut(component).unwrap());
        refused(archive, &stored, &shape)
    };
    for component in [CHUNKS, LENGTHS, MODEL] {
        let mut without = stored.clone();
        without.remove(component);
        assert!(refused(archive, &without, &shape).contains(&format!("component {component} is missing")));
        let cut = changed(component, &|(_, shape, bytes)| {
            bytes.pop();
            *shape = vec![bytes.len() as u64];
        });
        assert!(cut.contains(component), "{component}: {cut}");
    }
    let long = changed(LENGTHS, &|(_, _, bytes)| bytes[3] = 0x7f);
    assert!(long.contains("chunks"), "{long}");
    for at in [0, 4, 9, 140, 2000] {
        let error = changed(CHUNKS, &|(_, _, bytes)| bytes[at] ^= 0x55);
        assert!(error.contains("chunk 0: corrupt data"), "{at}: {error}");
    }
    for wrong in [
        Archive { classes: 0, ..archive },
        Archive { classes: 17, ..archive },
        Archive { classes: archive.classes + 1, ..archive },
        Archive { low: 13, ..archive },
        Archive { shift: 8, ..archive },
        Archive { base: 0x7fff, ..archive },
    ] {
        let error = refused(wrong, &stored, &shape);
        assert!(error.contains("model"), "{wrong:?}: {error}");
    }
    // Scales for more rows and columns than there are elements, and a dtype that it does not hold.
    let error = refused(Archive { classes: 2, ..archive }, &stored, &[1, 64 * 512]);
    assert!(error.contains("more scales than elements"), "{error}");
    let error = open(&Encoding::Archive(archive), Dtype::F32, &shape, &stored).unwrap_err().to_string();
    assert!(error.contains("is F32"), "{error}");
}
