//! `delta` to the bit, whatever the dtype, the shape and the range that is read, and what its reader refuses.

use std::collections::BTreeMap;
use std::path::Path;

use llmpress_entropy::archive::{
    CHUNK_ELEMENTS, DifferenceChoice, Encoder, Scales, classes_of_base, differences, widen,
};
use llmpress_formats::encoding::archive::{CHUNKS, LENGTHS, MODEL, components, layout};
use llmpress_formats::encoding::delta::{Coded, Delta};
use llmpress_formats::{Base, Digest, Dtype, Encoding, RenderEntry, render};
use llmpress_numbers::Numbers;

use super::{DTYPES, bytes};
use crate::by_hand::{Raw, open, open_on, raw};

fn words(dtype: Dtype, bytes: &[u8]) -> Vec<u16> {
    let mut words: Vec<u16> = Vec::new();
    if dtype.bits() == 16 {
        words.extend(bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])));
    } else {
        widen(bytes, &mut words);
    }
    words
}

/// What becomes of a tensor in training: most elements near what they were, some anywhere.
fn updated(bytes: &[u8], seed: u64) -> Vec<u8> {
    let mut numbers = Numbers::new(seed);
    let change = |&byte: &u8| match numbers.below(400) {
        0 => numbers.bits() as u8,
        _ => byte ^ (numbers.bits() & numbers.bits() >> 9 & 1) as u8,
    };
    bytes.iter().map(change).collect()
}

fn encoded(dtype: Dtype, base: &[u8], bytes: &[u8]) -> (Delta, BTreeMap<String, Raw>) {
    let (base_words, words) = (words(dtype, base), words(dtype, bytes));
    let layout = layout(dtype).unwrap();
    let choice = DifferenceChoice::of(layout, &base_words, &words).unwrap();
    let (mut data, mut lengths, mut classes, mut found) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut encoder = Encoder::new(&choice.model);
    for (base, words) in base_words.chunks(CHUNK_ELEMENTS).zip(words.chunks(CHUNK_ELEMENTS)) {
        let before = data.len();
        classes_of_base(layout, choice.top, choice.model.classes(), base, &mut classes);
        differences(base, words, &mut found).unwrap();
        encoder.encode_chunk(&classes, &found, &mut data).unwrap();
        lengths.extend(((data.len() - before) as u32).to_le_bytes());
    }
    let frame = choice.model.pack(&Scales::default()).unwrap();
    let specs = components(words.len() as u64, data.len() as u64, frame.len() as u64);
    let stored = specs.into_iter().zip([&data[..], &lengths, &frame]).collect();
    (Delta { base_blake3: Digest::of(base), coded: Some(Coded::of(&choice)) }, raw(stored))
}

/// A checkpoint of one tensor.
fn base(dir: &Path, dtype: Dtype, shape: &[u64], bytes: &[u8]) -> Base {
    let end = bytes.len() as u64;
    let entry = RenderEntry { name: "u".to_owned(), dtype, shape: shape.to_vec(), begin: 0, end };
    let mut file = render(&[entry], &BTreeMap::new(), None).unwrap();
    file.extend(bytes);
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("model.safetensors"), file).unwrap();
    Base::open(dir).unwrap()
}

#[test]
fn any_range_of_any_dtype_and_shape_is_restored_from_the_base() {
    let dir = tempfile::tempdir().unwrap();
    let shapes: [&[u64]; 6] =
        [&[70, 90], &[3, 4, 64], &[5000], &[], &[CHUNK_ELEMENTS as u64 + 1], &[2, CHUNK_ELEMENTS as u64]];
    let mut several = 0;
    for (case, (dtype, shape)) in DTYPES.iter().flat_map(|d| shapes.map(|s| (*d, s))).enumerate() {
        let before = bytes(dtype, shape, 7);
        let after = updated(&before, 8);
        let base = base(&dir.path().join(case.to_string()), dtype, shape, &before);
        let (delta, stored) = encoded(dtype, &before, &after);
        several += u32::from(delta.coded.unwrap().classes > 1);
        let same = Delta { coded: None, ..delta };
        for (delta, stored, expected) in [(delta, &stored, &after), (same, &BTreeMap::new(), &before)] {
            let reader = open_on(&Encoding::Delta(delta), dtype, shape, stored, Some(&base)).unwrap();
            let width = dtype.bits() as usize / 8;
            let mut numbers = Numbers::new(3);
            let mut ranges = vec![0..expected.len(), 0..0, expected.len()..expected.len()];
            for _ in 0..6 {
                let mut any = || numbers.below(expected.len() / width + 1) * width;
                let (a, b) = (any(), any());
                ranges.push(a.min(b)..a.max(b));
            }
            for range in ranges {
                let mut out = vec![0xaa; range.len()];
                reader.read(range.start as u64, &mut out).unwrap();
                assert!(out == expected[range.clone()], "{} {shape:?} {range:?}", dtype.name());
            }
            let mut past = vec![0; 2 * width];
            assert!(reader.read((expected.len() - width) as u64, &mut past).is_err());
        }
    }
    assert!(several >= 4, "{several}");
}

#[test]
fn what_breaks_the_format_or_is_another_base_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (dtype, shape) = (Dtype::BF16, [64u64, 512]);
    let before = bytes(dtype, &shape, 5);
    let after = updated(&before, 6);
    let good = base(&dir.path().join("good"), dtype, &shape, &before);
    let (delta, stored) = encoded(dtype, &before, &after);
    let coded = delta.coded.unwrap();
    let refused = |delta: Delta, stored: &BTreeMap<String, Raw>, base: Option<&Base>| {
        let opened = open_on(&Encoding::Delta(delta), dtype, &shape, stored, base);
        let read = opened.and_then(|reader| reader.read(0, &mut vec![0; after.len()]));
        read.unwrap_err().to_string()
    };
    let changed = |component: &str, change: &dyn Fn(&mut Raw)| {
        let mut stored = stored.clone();
        change(stored.get_mut(component).unwrap());
        refused(delta, &stored, Some(&good))
    };
    for component in [CHUNKS, LENGTHS, MODEL] {
        let mut without = stored.clone();
        without.remove(component);
        let error = refused(delta, &without, Some(&good));
        assert!(error.contains(&format!("component {component} is missing")), "{error}");
        let cut = changed(component, &|(_, shape, bytes)| {
            bytes.pop();
            *shape = vec![bytes.len() as u64];
        });
        assert!(cut.contains(component), "{component}: {cut}");
    }
    for at in [0, 4, 9, 140, 2000] {
        let error = changed(CHUNKS, &|(_, _, bytes)| bytes[at] ^= 0x55);
        assert!(error.contains("chunk 0: corrupt data"), "{at}: {error}");
    }
    for wrong in [
        Coded { classes: 0, ..coded },
        Coded { classes: 17, ..coded },
        Coded { classes: coded.classes + 1, ..coded },
        Coded { low: 8, ..coded },
    ] {
        let error = refused(Delta { coded: Some(wrong), ..delta }, &stored, Some(&good));
        assert!(error.contains("model"), "{wrong:?}: {error}");
    }
    // No base, another one, one of another shape or dtype.
    let error = refused(delta, &stored, None);
    assert!(error.contains("--base") && error.contains(&delta.base_blake3.to_string()), "{error}");
    let other = base(&dir.path().join("other"), dtype, &shape, &after);
    let error = refused(delta, &stored, Some(&other));
    assert!(error.contains("not the base") && error.contains(&Digest::of(&after).to_string()), "{error}");
    let same = Delta { coded: None, ..delta };
    assert!(refused(same, &BTreeMap::new(), Some(&other)).contains("not the base"));
    for (name, dtype, shape) in [("shape", dtype, [512, 64]), ("dtype", Dtype::F16, shape)] {
        let error = refused(delta, &stored, Some(&base(&dir.path().join(name), dtype, &shape, &before)));
        assert!(error.contains("no tensor u that is BF16 [64, 512]"), "{error}");
    }
    // Differences of what has none, and what is stored as another tensor and asked for by itself.
    let floats = open_on(&Encoding::Delta(delta), Dtype::F32, &[64, 256], &stored, Some(&good)).unwrap_err();
    assert!(floats.to_string().contains("is F32"), "{floats}");
    let same = Encoding::Same { tensor: "v".to_owned() };
    assert!(open(&same, dtype, &shape, &BTreeMap::new()).unwrap_err().to_string().contains("as tensor v"));
}
