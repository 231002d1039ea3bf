//! Quantising what two of four weights are kept of.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use llmpress_calibrate::{Calibration, Cut, Room};
use llmpress_formats::encoding::abq::Floats;
use llmpress_formats::encoding::lowrank::{BaseRows, Packed as WithSums, Sums};
use llmpress_formats::encoding::sparse24::{Packed, QUAD, positions};
use llmpress_formats::encoding::{ComponentSpec, PackedUnit, stored_name};
use llmpress_formats::{
    Checkpoint, ComponentEntry, Digest, Dtype, Encoding, ShardFile, ShardWriter, SlotPlan, UnitEntry,
};
use llmpress_model::Model;
use llmpress_quantize::{
    Finished, FinishedBlock, Job, Quantiser, Residuals, Sink, Spec, State, Transformations, rotations, run,
};

/// The two of each four weights that are largest.
fn largest(weights: &[f32], cols: usize) -> Packed<'static> {
    let bytes = positions::row_bytes(cols);
    let mut at = vec![0; weights.len() / cols * bytes];
    for (row, at) in weights.chunks(cols).zip(at.chunks_mut(bytes)) {
        let nibble = |quad: &[f32]| {
            let mut order = [0usize, 1, 2, 3];
            order.sort_by(|a, b| quad[*b].abs().total_cmp(&quad[*a].abs()));
            positions::of_mask(1 << order[0] | 1 << order[1]).unwrap()
        };
        positions::pack_row(row.chunks(QUAD).map(nibble), at);
    }
    Packed::round(Dtype::BF16, weights.len() / cols, cols, weights, at).unwrap()
}

/// tinylm with the linears of its first block two of four, with sums beside or without.
fn view(dir: &Path, with_sums: bool) -> Checkpoint {
    let source = Checkpoint::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tinylm")).unwrap();
    let model = Model::open(Arc::new(Checkpoint::open(source.root()).unwrap())).unwrap();
    let (mut units, mut slots) = (BTreeMap::new(), Vec::<(SlotPlan, Vec<u8>)>::new());
    for name in model.inputs_of(0).iter().flat_map(|input| &input.tensors) {
        let weights = model.weights(name).unwrap();
        let cols = source.tensor(name).unwrap().shape[1] as usize;
        let base = largest(&weights, cols);
        let (encoding, components): (Encoding, Vec<(ComponentSpec, Vec<u8>)>) = if with_sums {
            let sums: Vec<f32> = weights.chunks(16).map(|block| block.iter().sum::<f32>() / 16.0).collect();
            let sums = Sums::Plain(Floats::round(Dtype::BF16, &sums).unwrap());
            let packed = WithSums::new(16, base.rows(), cols, BaseRows::Sparse24(base), sums).unwrap();
            (packed.encoding(), packed.components().into_iter().map(|(s, b)| (s, b.to_vec())).collect())
        } else {
            (base.encoding(), base.components().into_iter().map(|(s, b)| (s, b.to_vec())).collect())
        };
        let mut links = BTreeMap::new();
        for (spec, bytes) in components {
            let stored = stored_name(name, &encoding, spec.name);
            links.insert(
                spec.name.to_owned(),
                ComponentEntry { tensor: stored.clone(), blake3: Digest::of(&bytes) },
            );
            slots.push((SlotPlan { name: stored, dtype: spec.dtype, shape: spec.shape, exact: true }, bytes));
        }
        let entry = UnitEntry {
            encoding: serde_json::to_value(&encoding).unwrap().into(),
            tensors: vec![name.clone()],
            components: links.into(),
            fallback: None,
        };
        units.insert(name.clone(), entry);
    }
    let path = dir.join("units.safetensors");
    let plan: Vec<SlotPlan> = slots.iter().map(|(plan, _)| plan.clone()).collect();
    let mut writer = ShardWriter::create(&path, plan.into_iter(), BTreeMap::new()).unwrap();
    for (plan, bytes) in slots {
        writer.place(&plan.name, plan.dtype, &plan.shape).unwrap().write_at(0, &bytes).unwrap();
    }
    writer.finish().unwrap();
    source.with_finished(ShardFile::open(&path).unwrap(), &units).unwrap()
}

#[derive(Default)]
struct Kept(Vec<Finished>);

impl Sink for Kept {
    fn block(
        &mut self,
        _block: usize,
        finished: FinishedBlock,
        _residuals: Option<&mut Residuals>,
    ) -> llmpress_formats::Result<()> {
        self.0.extend(finished.tensors);
        Ok(())
    }
}

fn quantise(dir: &Path, checkpoint: Checkpoint, how: &str) -> llmpress_formats::Result<Vec<Finished>> {
    let mut model = Model::open(Arc::new(checkpoint)).unwrap();
    let Quantiser { spec, with, .. } = how.parse::<Quantiser>().unwrap();
    let specs: BTreeMap<String, Spec> =
        model.inputs_of(0).into_iter().flat_map(|input| input.tensors).map(|t| (t, spec)).collect();
    let transforms = match with {
        Transformations { rotate: Some(rotate), .. } => rotations(&model, rotate, 0).unwrap(),
        _ => Vec::new(),
    };
    let ids: Vec<u32> = (0..2048).map(|i| i * 37 % 1009).collect();
    let calibration = Calibration::new(&ids, Cut { windows: 16, length: 128, seed: None }, None).unwrap();
    let room = Room { memory: 1 << 30, file: dir.join("streams") };
    let job = Job {
        specs: &specs,
        transforms: &transforms,
        calibration: Some(&calibration),
        room: &room,
        hessians: 1 << 30,
    };
    let mut kept = Kept::default();
    run(&mut model, job, State::default(), &mut kept)?;
    Ok(kept.0)
}

#[test]
fn what_is_kept_stays_where_it_was_and_becomes_codes() {
    for with_sums in [false, true] {
        let mut errors = Vec::new();
        for how in ["gptq:w4", "gptq:w4,g64,symmetric", "rtn:w4", "grid:w8,g32,int", "gptq:w8"] {
            let dir = tempfile::tempdir().unwrap();
            let before = view(dir.path(), with_sums);
            let finished = quantise(dir.path(), view(dir.path(), with_sums), how).unwrap();
            assert_eq!(finished.len(), 7);
            for done in &finished {
                let rows = 0..done.unit.rows() as u64;
                let base = match (&done.unit, with_sums) {
                    (PackedUnit::Sparse24(base), false) => base.clone(),
                    (PackedUnit::Lowrank(packed), true) => {
                        let was = before.lowrank_rows(&done.tensor, rows.clone()).unwrap();
                        let (Sums::Abq(sums), Sums::Plain(plain)) = (packed.sums(), was.sums()) else {
                            panic!("{how}")
                        };
                        assert_eq!((sums.abq().bits, sums.rows() * sums.cols()), (8, plain.len()));
                        let BaseRows::Sparse24(base) = packed.base() else { panic!("{how}") };
                        base.clone()
                    }
                    (other, _) => panic!("{other:?}"),
                };
                let was = match with_sums {
                    false => before.sparse_rows(&done.tensor, rows).unwrap(),
                    true => match before.lowrank_rows(&done.tensor, rows).unwrap().into_base() {
                        BaseRows::Sparse24(was) => was,
                        BaseRows::Raw(_) => panic!("{how}"),
                    },
                };
                assert_eq!(base.positions(), was.positions(), "{how}: {}", done.tensor);
                base.check().unwrap();
                let bits = how.split(['w', ',']).nth(1).unwrap().parse::<f64>().unwrap();
                let (least, most) = (bits / 2.0 + 1.0, bits / 2.0 + 2.2);
                let most = if with_sums { most + 1.0 } else { most };
                assert!(
                    (least..most).contains(&done.report.bits_per_weight),
                    "{how}: {}",
                    done.report.bits_per_weight
                );
            }
            errors.push(finished.iter().map(|done| done.report.relative_error).sum::<f64>() / 7.0);
        }
        let [gptq4, grouped, rtn4, grid8, gptq8] = errors[..] else { panic!("{errors:?}") };
        assert!(gptq4 < 0.7 * rtn4 && grouped < rtn4 && grid8 < 1e-3 && gptq8 < 1e-3, "{errors:?}");
    }
}

#[test]
fn what_two_of_four_cannot_have_is_refused_by_name() {
    for (how, words) in [
        ("gptq:w4a8", "activations of 8 bits"),
        ("gptq:w4,learn", "learn"),
        ("gptq:w4,learn=block", "learn"),
        ("gptq:w4,rotate", "rotate and smooth"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let error = quantise(dir.path(), view(dir.path(), false), how).unwrap_err().to_string();
        assert!(
            error.contains(words) && error.contains("model.layers.0.") && error.contains("two of four"),
            "{error}"
        );
    }
}
