//! Matrices that cannot be made sparse, or must not be: said by name.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use crate::support::{Sizes, write_model};
use llmpress_calibrate::{Calibration, Cut, Room};
use llmpress_formats::{Checkpoint, Result};
use llmpress_model::Model;
use llmpress_sparsify::{FinishedBlock, Job, Residuals, Sink, Sparsifier, State, run};

#[derive(Default)]
struct Kept(FinishedBlock, u64, u64);

impl Sink for Kept {
    fn start(&mut self, _weights: u64, work: u64, _finished: u64) {
        self.1 = work;
    }

    fn step(&mut self, work: u64) {
        self.2 += work;
    }

    fn block(
        &mut self,
        _block: usize,
        finished: FinishedBlock,
        _residuals: Option<&mut Residuals>,
    ) -> Result<()> {
        self.0 = finished;
        Ok(())
    }
}

/// A model whose `down_proj` has so many columns, all of whose linears are made sparse.
fn sparse(inner: u64, how: &str, change: impl Fn(&str) -> Option<f32>) -> Result<Kept> {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), Sizes { hidden: 32, kv: 16, inner, head: 8 }, change);
    let mut model = Model::open(Arc::new(Checkpoint::open(dir.path())?))?;
    let ids: Vec<u32> = (0..320).map(|i| i * i % 64).collect();
    let calibration = Calibration::new(&ids, Cut { windows: 16, length: 20, seed: None }, None)?;
    let how: Sparsifier = how.parse()?;
    let hows: BTreeMap<String, Sparsifier> =
        model.inputs_of(0).into_iter().flat_map(|input| input.tensors).map(|t| (t, how)).collect();
    let room = Room { memory: u64::MAX, file: PathBuf::from("never written") };
    let job = Job { hows: &hows, calibration: Some(&calibration), room: &room, hessians: 1 << 20 };
    let mut kept = Kept::default();
    run(&mut model, job, State::default(), &mut kept)?;
    Ok(kept)
}

#[test]
fn columns_that_are_no_multiple_of_four_stay_dense_and_it_is_said() {
    for how in ["magnitude", "wanda", "sparsegpt,slorb", "sparsegpt,reconstruct,steps=2"] {
        let Kept(block, work, steps) = sparse(30, how, |_| None).unwrap();
        assert_eq!((block.tensors.len(), block.dense.len(), steps), (6, 1, work), "{how}");
        let dense = &block.dense[0];
        assert!(dense.tensor.contains("down_proj") && dense.why.contains("30 columns"), "{dense:?}");
        // What stays does not keep the others of its sub-layer from being reconstructed.
        let learned = block.tensors.iter().filter(|done| done.report.reconstructed.is_some()).count();
        assert_eq!(learned, if how.contains("reconstruct") { 6 } else { 0 });
    }
}

#[test]
fn weights_that_are_nan_or_infinite_are_refused_by_the_name_of_their_tensor() {
    for bad in [f32::NAN, f32::INFINITY] {
        for how in ["magnitude", "wanda,slorb", "sparsegpt"] {
            let at = "model.layers.0.self_attn.k_proj.weight";
            let Err(error) = sparse(32, how, |name| (name == at).then_some(bad)) else {
                panic!("{how} took {bad}");
            };
            assert!(error.to_string().contains(at), "{how}: {error}");
        }
    }
}

#[test]
fn more_than_8192_columns_of_too_little_text_get_masks_by_their_products_and_it_is_said() {
    for (how, rule) in [("magnitude", "magnitude"), ("wanda", "wanda")] {
        let Kept(block, work, steps) = sparse(8196, how, |_| None).unwrap();
        assert_eq!((block.tensors.len(), block.dense.len(), steps), (7, 0, work), "{how}");
        let wide = block.tensors.iter().find(|done| done.sparse.cols() == 8196).unwrap();
        assert_eq!((wide.sparse.rows(), wide.report.rule.name()), (32, rule));
        assert!(wide.report.relative_error > 0.0 && wide.report.relative_error < 0.5, "{:?}", wide.report);
        assert!(wide.unit().unwrap().bits_per_weight() < 9.01);
    }
    let Err(error) = sparse(8196, "sparsegpt", |_| None) else { panic!("320 tokens were enough") };
    assert!(error.to_string().contains("down_proj") && error.to_string().contains("give 1025"), "{error}");
}
