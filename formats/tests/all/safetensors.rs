//! Headers against the reference implementation, both ways.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use llmpress_formats::{Dtype, Header, RenderEntry, ShardFile, ShardWriter, SlotPlan, render};
use proptest::prelude::*;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

/// The same dtype in the reference implementation.
fn theirs(dtype: Dtype) -> safetensors::Dtype {
    serde_json::from_str(&format!("\"{}\"", dtype.name())).unwrap()
}

/// Names, dtypes and shapes of a file, with bytes that tell them apart.
fn tensors() -> impl Strategy<Value = BTreeMap<String, (Dtype, Vec<u64>, Vec<u8>)>> {
    let dtype = prop::sample::select(Dtype::ALL);
    let shape = prop::collection::vec(0u64..6, 0..4);
    let tensor = (dtype, shape).prop_filter_map("whole bytes", |(dtype, shape)| {
        let len = dtype.byte_len(&shape)?;
        Some((dtype, shape, (0..len).map(|i| (i * 7 + len) as u8).collect()))
    });
    prop::collection::btree_map("[a-z.\"\\\\é]{1,12}", tensor, 0..12)
}

#[test]
fn dtypes_have_the_reference_s_names_sizes_and_order() {
    for pair in Dtype::ALL.windows(2) {
        assert!(pair[0] < pair[1] && theirs(pair[0]) < theirs(pair[1]));
    }
    for &dtype in Dtype::ALL {
        assert_eq!(dtype.bits() as usize, theirs(dtype).bitsize());
        assert_eq!(dtype.name().parse::<Dtype>().unwrap(), dtype);
    }
}

proptest! {
    #[test]
    fn what_the_reference_writes_is_read(tensors in tensors()) {
        let views: HashMap<&str, TensorView<'_>> = tensors
            .iter()
            .map(|(name, (dtype, shape, bytes))| {
                let shape = shape.iter().map(|&d| d as usize).collect();
                (name.as_str(), TensorView::new(theirs(*dtype), shape, bytes).unwrap())
            })
            .collect();
        let file = safetensors::serialize(&views, None).unwrap();
        let json = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let header = Header::parse(Path::new("f"), &file[8..json], file.len() as u64).unwrap();
        prop_assert_eq!(header.tensors().len(), tensors.len());
        for (name, (dtype, shape, bytes)) in &tensors {
            let info = header.get(name).unwrap();
            prop_assert_eq!((info.dtype, &info.shape), (*dtype, shape));
            let start = json + info.offset as usize;
            prop_assert!(file[start..start + info.bytes as usize] == bytes[..]);
        }
        // Every prefix is refused.
        for len in 0..file.len() {
            let end = json.min(len);
            let refused = len < json || Header::parse(Path::new("f"), &file[8..end], len as u64).is_err();
            prop_assert!(refused);
        }
    }

    #[test]
    fn what_is_written_here_the_reference_reads(tensors in tensors(), reserve in 0u64..5) {
        let mut data = Vec::new();
        let mut entries = Vec::new();
        for (name, (dtype, shape, bytes)) in &tensors {
            let begin = data.len() as u64;
            data.extend_from_slice(bytes);
            let end = data.len() as u64;
            entries.push(RenderEntry { name: name.clone(), dtype: *dtype, shape: shape.clone(), begin, end });
        }
        let mut file = render(&entries, &BTreeMap::new(), None).unwrap();
        let reserved = file.len() as u64 + reserve * 8;
        file = render(&entries, &BTreeMap::new(), Some(reserved)).unwrap();
        prop_assert_eq!(file.len() as u64, reserved);
        file.extend(data);
        let read = SafeTensors::deserialize(&file).unwrap();
        prop_assert_eq!(read.len(), tensors.len());
        for (name, (dtype, _, bytes)) in &tensors {
            let view = read.tensor(name).unwrap();
            prop_assert_eq!(view.dtype(), theirs(*dtype));
            prop_assert!(view.data() == &bytes[..]);
        }
    }

    #[test]
    fn shards_written_in_any_order_are_read(tensors in tensors(), open_end: bool) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        let plan: Vec<SlotPlan> = tensors
            .iter()
            .map(|(name, (dtype, shape, _))| SlotPlan { name: name.clone(), dtype: *dtype, shape: shape.clone(), exact: !open_end })
            .collect();
        let mut writer = ShardWriter::create(&path, plan.into_iter(), BTreeMap::new()).unwrap();
        let mut slots = Vec::new();
        for (name, (dtype, shape, bytes)) in &tensors {
            if open_end {
                writer.open_end(name).write_at(0, bytes).unwrap();
            }
            slots.push((writer.place(name, *dtype, shape).unwrap(), bytes));
        }
        for (slot, bytes) in slots.iter().rev() {
            for (i, piece) in bytes.chunks(5).enumerate().collect::<Vec<_>>().into_iter().rev() {
                slot.write_at(i as u64 * 5, piece).unwrap();
            }
            prop_assert!(slot.write_at(bytes.len() as u64, &[1]).is_err());
        }
        prop_assert!(!path.exists());
        let written = writer.finish().unwrap();
        prop_assert_eq!(written.bytes, std::fs::metadata(&path).unwrap().len());
        let shard = ShardFile::open(&path).unwrap();
        for (name, (_, _, bytes)) in &tensors {
            let info = shard.header().get(name).unwrap();
            prop_assert!(shard.view(info).unwrap() == &bytes[..]);
            let mut read = vec![0; bytes.len()];
            shard.component(info).read_at(0, &mut read).unwrap();
            prop_assert!(read == bytes[..]);
            prop_assert!(shard.component(info).read_at(1, &mut read).is_err() || bytes.is_empty());
        }
    }
}
