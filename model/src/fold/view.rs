//! A checkpoint seen before its transformations, or after some: what is stored, decoded, and turned and scaled when it is read.
//!
//! ```text
//! rows that depend on themselves alone    made when they are read
//! turned rows (o, down; v), moved ones    made once as a whole, held while others of its kind are read
//! ```

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use llmpress_formats::{Checkpoint, Dtype, Error, Remake, Result, Transform};

use super::steps::{Step, Way};
use super::{Folds, Target};
use crate::Model;

/// The same checkpoint without its transformations: rotations and scales are taken out of the decoded tensors, which are then rounded
/// to their dtypes. One that has none stays as it is.
///
/// # Errors
/// Those of [`Model::open`], where there is something to undo.
pub fn undone(checkpoint: Checkpoint) -> Result<Checkpoint> {
    let transforms = checkpoint.transforms().to_vec();
    if transforms.is_empty() {
        return Ok(checkpoint);
    }
    view(checkpoint, &transforms, Way::Undo)
}

/// The names of the tensors that a checkpoint's transformations have changed, in order.
///
/// # Errors
/// Those of [`Model::open`], where there are transformations.
pub fn changed(checkpoint: Checkpoint) -> Result<(Checkpoint, Vec<String>)> {
    let transforms = checkpoint.transforms().to_vec();
    if transforms.is_empty() {
        return Ok((checkpoint, Vec::new()));
    }
    let shared = Arc::new(checkpoint);
    let folds = Model::open(shared.clone())?.folds(&transforms)?;
    Ok((alone(shared)?, folds.tensors().map(str::to_owned).collect()))
}

/// A checkpoint that nobody else holds any more.
fn alone(shared: Arc<Checkpoint>) -> Result<Checkpoint> {
    Arc::try_unwrap(shared).map_err(|shared| {
        Error::Invalid(format!("{}: is in use, and cannot be seen otherwise", shared.root().display()))
    })
}

/// The checkpoint with transformations folded into its tensors, which are then rounded to their dtypes. It lists them.
///
/// # Errors
/// Those of [`Model::folds`]; a checkpoint that is transformed already.
pub fn folded(checkpoint: Checkpoint, transforms: Vec<Transform>) -> Result<Checkpoint> {
    if transforms.is_empty() {
        return Ok(checkpoint);
    }
    if let Some(done) = checkpoint.transforms().first() {
        return Err(super::twice(&checkpoint, done));
    }
    Ok(view(checkpoint, &transforms, Way::Fold)?.with_transforms(transforms))
}

fn view(checkpoint: Checkpoint, transforms: &[Transform], way: Way) -> Result<Checkpoint> {
    let shared = Arc::new(checkpoint);
    let folds = Model::open(shared.clone())?.folds(transforms)?;
    let checkpoint = alone(shared)?;
    let names = folds.tensors().map(str::to_owned).collect();
    // As many as threads read at a time.
    let held = rayon::current_num_threads() + 1;
    checkpoint.remade(names, Arc::new(View { folds, way, whole: Mutex::default(), held }))
}

type Whole = Arc<OnceLock<Result<Vec<u8>, String>>>;

#[derive(Debug)]
struct View {
    folds: Folds,
    way: Way,
    /// Matrices that are made as a whole, the last one used at the end.
    whole: Mutex<VecDeque<(String, Whole)>>,
    held: usize,
}

impl Remake for View {
    fn remake(&self, stored: &Checkpoint, tensor: &str, offset: u64, out: &mut [u8]) -> Result<()> {
        let Some(target) = self.folds.0.get(tensor) else { return stored.read_stored(tensor, offset, out) };
        let dtype = stored.tensor(tensor)?.dtype;
        let width = dtype.bits() as usize / 8;
        let row = target.cols * width;
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        if row == 0 || out.is_empty() {
            return Ok(());
        }
        if target.steps.iter().all(Step::by_rows) {
            let (first, last) = (offset / row, (offset + out.len()).div_ceil(row));
            let bytes = self.rows(stored, target, tensor, dtype, first..last)?;
            out.copy_from_slice(&bytes[offset - first * row..][..out.len()]);
            return Ok(());
        }
        let whole = self.slot(tensor);
        // Whoever waits here waits for a thread that waits for nobody: what it does runs on it alone.
        let made = whole.get_or_init(|| {
            self.rows(stored, target, tensor, dtype, 0..target.rows).map_err(|e| e.to_string())
        });
        match made {
            Ok(bytes) => {
                out.copy_from_slice(&bytes[offset..][..out.len()]);
                Ok(())
            }
            Err(e) => Err(Error::Invalid(e.clone())),
        }
    }
}

impl View {
    fn slot(&self, tensor: &str) -> Whole {
        let mut whole = self.whole.lock().unwrap_or_else(PoisonError::into_inner);
        let at = whole.iter().position(|(name, _)| name == tensor);
        let found =
            at.and_then(|at| whole.remove(at)).unwrap_or_else(|| (tensor.to_owned(), Whole::default()));
        let slot = found.1.clone();
        whole.push_back(found);
        while whole.len() > self.held {
            whole.pop_front();
        }
        slot
    }

    /// Some rows, in their dtype.
    fn rows(
        &self,
        stored: &Checkpoint,
        target: &Target,
        tensor: &str,
        dtype: Dtype,
        range: Range<usize>,
    ) -> Result<Vec<u8>> {
        let width = dtype.bits() as usize / 8;
        let mut words = vec![0u64; (range.len() * target.cols * width).div_ceil(8)];
        let bytes = &mut bytemuck::cast_slice_mut::<u64, u8>(&mut words)[..range.len() * target.cols * width];
        stored.read_stored(tensor, (range.start * target.cols * width) as u64, bytes)?;
        let half = |b: &[u8]| u16::from_le_bytes([b[0], b[1]]);
        let mut values: Vec<f32> = match dtype {
            Dtype::BF16 => bytes.chunks_exact(2).map(|b| half::bf16::from_bits(half(b)).to_f32()).collect(),
            Dtype::F16 => bytes.chunks_exact(2).map(|b| half::f16::from_bits(half(b)).to_f32()).collect(),
            _ => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        };
        let step = |step: &Step| step.run_alone(&mut values, target.cols, range.start, self.way);
        match self.way {
            Way::Fold => target.steps.iter().for_each(step),
            Way::Undo => target.steps.iter().rev().for_each(step),
        }
        Ok(match dtype {
            Dtype::BF16 => values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
            Dtype::F16 => values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        })
    }
}
