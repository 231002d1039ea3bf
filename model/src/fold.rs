//! What transformations did to the weights of a decoder, tensor by tensor: folded into them, and taken out again.
//!
//! ```text
//! norm -> q, k, v -> (attention) -> o -> +          scale   reader's columns x s, producer's rows / s
//!         readers    producer   reader              turn    reader's columns R^T, producer's rows R
//! ```
//!
//! A fold changes every reader of a norm, and biases with their rows. The function of the model stays what it was; what
//! is left to whoever runs it are the [online](crate::online) operations.

mod sites;
mod steps;
mod view;

use std::collections::BTreeMap;

use llmpress_formats::{Checkpoint, Dtype, Error, Result, RotationSite, Transform};

use crate::decoder::Layer;
use crate::linear::{check, vector};
use crate::norm::Norm;
use crate::online::Online;
use crate::{Model, SubLayer};
use steps::{Step, Way};
pub use view::{changed, folded, undone};

/// What a list of transformations does to each tensor that it changes.
#[derive(Clone, Debug, Default)]
pub struct Folds(BTreeMap<String, Target>);

#[derive(Clone, Debug)]
struct Target {
    rows: usize,
    cols: usize,
    steps: Vec<Step>,
}

impl Folds {
    /// The tensors that change.
    pub fn tensors(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// Whether a tensor changes.
    pub fn changes(&self, tensor: &str) -> bool {
        self.0.contains_key(tensor)
    }

    /// Folds into a tensor's values, row-major. Others stay as they are.
    ///
    /// # Errors
    /// Not as many values as it has.
    pub fn apply(&self, tensor: &str, values: &mut [f32]) -> Result<()> {
        self.run(tensor, values, Way::Fold)
    }

    /// Takes the transformations out of a tensor's values again. A column that was multiplied by 0 stays 0.
    ///
    /// # Errors
    /// Not as many values as it has.
    pub fn undo(&self, tensor: &str, values: &mut [f32]) -> Result<()> {
        self.run(tensor, values, Way::Undo)
    }

    /// Second moments of what a matrix multiplies, `[columns, columns]`, gathered before the fold: as they are after it. With W' = W A^-1
    /// the inputs are A x, so H' = A H A^T.
    ///
    /// # Errors
    /// No matrix; not as many moments; a column that is multiplied by 0, whose inputs before say nothing of those after.
    pub fn turn_moments(&self, tensor: &str, moments: &mut [f32]) -> Result<()> {
        let Some(target) = self.0.get(tensor) else { return Ok(()) };
        let n = target.cols;
        if moments.len() != n * n {
            let found = moments.len();
            return Err(Error::Invalid(format!("{tensor}: {found} moments are not {n} x {n}")));
        }
        for step in &target.steps {
            if !step.turn_moments(moments, n) {
                let what = "has a scale of 0, so that moments must be gathered after the fold";
                return Err(Error::Invalid(format!("{tensor}: {what}")));
            }
        }
        Ok(())
    }

    fn run(&self, tensor: &str, values: &mut [f32], way: Way) -> Result<()> {
        let Some(target) = self.0.get(tensor) else { return Ok(()) };
        if values.len() != target.rows * target.cols {
            return Err(Error::Invalid(format!(
                "{tensor}: {} values are not {} x {}",
                values.len(),
                target.rows,
                target.cols
            )));
        }
        target.run(values, way);
        Ok(())
    }
}

impl Target {
    fn run(&self, values: &mut [f32], way: Way) {
        match way {
            Way::Fold => self.steps.iter().for_each(|step| step.run(values, self.cols, way)),
            Way::Undo => self.steps.iter().rev().for_each(|step| step.run(values, self.cols, way)),
        }
    }
}

impl Model {
    /// What was done to its weights, or is to be folded into them in memory.
    pub fn transforms(&self) -> &[Transform] {
        &self.transforms
    }

    /// What transformations do to its tensors.
    ///
    /// # Errors
    /// What its family does not support, by name; sizes and scales that do not fit it.
    pub fn folds(&self, transforms: &[Transform]) -> Result<Folds> {
        sites::folds(self, transforms)
    }

    /// Why its family cannot have a transformation, where it cannot.
    pub fn refuses(&self, transform: &Transform) -> Option<String> {
        sites::check_support(self.config(), transform).err()
    }

    /// A turned residual stream needs input norms without weights: theirs were folded before.
    pub(crate) fn check_turned_norms(&self, transforms: &[Transform]) -> Result<()> {
        let turned = |t: &Transform| matches!(t, Transform::Rotation { site: RotationSite::Residual, .. });
        if !transforms.iter().any(turned) {
            return Ok(());
        }
        self.layers.iter().try_for_each(|layer| layer.check_turned_norms(&self.checkpoint))
    }

    /// Runs online operations from now on, as if these transformations were folded into its weights: fold every layer that
    /// is to run, with [`Self::fold_layer`].
    ///
    /// # Errors
    /// Those of [`Self::folds`]; a checkpoint that is transformed already.
    pub fn transform(&mut self, transforms: Vec<Transform>) -> Result<()> {
        if let Some(done) = self.checkpoint.transforms().first() {
            return Err(twice(&self.checkpoint, done));
        }
        self.folds(&transforms)?;
        self.go_online(transforms)
    }

    /// Takes up the online operations of a list that fits.
    pub(crate) fn go_online(&mut self, transforms: Vec<Transform>) -> Result<()> {
        let online = Online::of(&transforms, self.config().head_dim)?;
        for gated in
            self.layers.iter_mut().filter_map(|l| l.mlp.as_mut()).flat_map(|mlp| mlp.body.gated_mut())
        {
            gated.turn = online.down.iter().find(|by| by.size() == gated.down.cols()).cloned();
        }
        (self.online, self.transforms) = (online, transforms);
        Ok(())
    }

    /// Folds the transformations given to [`Self::transform`] into a layer's weights in memory: norms, biases and matrices, from what the
    /// checkpoint stores. [`Self::weights`] are the folded ones then, until [`Self::restore`] takes a matrix back.
    ///
    /// # Errors
    /// Weights that cannot be read; no such layer.
    pub fn fold_layer(&mut self, index: usize) -> Result<()> {
        let folds = self.folds(&self.transforms)?;
        self.take_layer(index, &folds)?;
        match self.layers.get(index).filter(|_| self.online.residual.is_some()) {
            Some(layer) => layer.check_turned_norms(&self.checkpoint),
            None => Ok(()),
        }
    }

    /// What a layer stores, folded.
    fn take_layer(&mut self, index: usize, folds: &Folds) -> Result<()> {
        let (checkpoint, offset) = (self.checkpoint.clone(), self.config().norm_offset());
        let missing =
            || Error::Invalid(format!("{}: there is no layer {index}", checkpoint.root().display()));
        let layer = self.layers.get_mut(index).ok_or_else(missing)?;
        for norm in layer.norms_mut() {
            let mut values = rounded(&checkpoint, folds, &norm.name, norm.weight.len())?;
            if offset {
                values.iter_mut().for_each(|w| *w += 1.0);
            }
            norm.weight = values;
        }
        for linear in layer.linears_mut() {
            if linear.bias().is_some() {
                let name = linear.bias_tensor();
                linear.set_bias(rounded(&checkpoint, folds, &name, linear.rows())?);
            }
            linear.restore();
            if folds.changes(linear.tensor()) {
                let mut weights = linear.weights(&checkpoint)?;
                folds.apply(linear.tensor(), &mut weights)?;
                linear.replace(weights, linear.activation_bits())?;
            }
        }
        Ok(())
    }

    /// Takes a layer's own norms, biases and matrices again, as the checkpoint stores them.
    ///
    /// # Errors
    /// Weights that cannot be read; no such layer.
    pub fn unfold_layer(&mut self, index: usize) -> Result<()> {
        self.take_layer(index, &Folds::default())
    }

    /// The tensor of the norm before a sub-layer; none where it was pruned away, or nothing norms what it reads.
    pub fn norm_tensor(&self, sub_layer: SubLayer) -> Option<&str> {
        let norm = match sub_layer {
            SubLayer::Attention(l) => self.layers.get(l)?.attention.as_ref()?.norm.as_ref(),
            SubLayer::Mlp(l) => self.layers.get(l)?.mlp.as_ref()?.norm.as_ref(),
        };
        norm.map(|norm| norm.name.as_str())
    }

    /// The weights of the norms before a layer's attention and MLP, as they multiply.
    pub fn norms(&self, layer: usize) -> [Option<&[f32]>; 2] {
        let Some(layer) = self.layers.get(layer) else { return [None, None] };
        let norms = [
            layer.attention.as_ref().and_then(|a| a.norm.as_ref()),
            layer.mlp.as_ref().and_then(|m| m.norm.as_ref()),
        ];
        norms.map(|norm| norm.map(|norm| norm.weight.as_slice()))
    }
}

impl Layer {
    fn check_turned_norms(&self, checkpoint: &Checkpoint) -> Result<()> {
        match self.norms().find(|norm| norm.weight.iter().any(|w| *w != 1.0)) {
            Some(Norm { name, .. }) => {
                let what = "has weights other than 1, which a rotation of the residual stream does not commute with: a scale \
                            must fold them into what reads them first";
                Err(Error::corrupt(checkpoint.root(), Some(name), what))
            }
            None => Ok(()),
        }
    }

    /// The norms of its sub-layers' inputs.
    fn norms(&self) -> impl Iterator<Item = &Norm> {
        let attention = self.attention.iter().flat_map(|a| &a.norm);
        attention.chain(self.mlp.iter().flat_map(|m| &m.norm))
    }

    /// The norms of its sub-layers' inputs.
    fn norms_mut(&mut self) -> impl Iterator<Item = &mut Norm> {
        let attention = self.attention.iter_mut().flat_map(|a| &mut a.norm);
        attention.chain(self.mlp.iter_mut().flat_map(|m| &mut m.norm))
    }
}

/// A checkpoint that has transformations cannot have others: theirs would have to stand between.
fn twice(checkpoint: &Checkpoint, done: &Transform) -> Error {
    let what = format!("has a {} already: transform the checkpoint that it was made from", done.name());
    Error::unsupported(checkpoint.root(), None, what)
}

/// A folded norm or bias, as it will be stored: rounded to its dtype.
fn rounded(checkpoint: &Checkpoint, folds: &Folds, tensor: &str, len: usize) -> Result<Vec<f32>> {
    let dtype = check(checkpoint, tensor, &[len])?;
    let mut values = vector(checkpoint, tensor, len)?;
    if folds.changes(tensor) {
        folds.apply(tensor, &mut values)?;
        values.iter_mut().for_each(|value| *value = round(dtype, *value));
    }
    Ok(values)
}

/// The nearest value of a dtype, ties to even.
fn round(dtype: Dtype, value: f32) -> f32 {
    match dtype {
        Dtype::BF16 => half::bf16::from_f32(value).to_f32(),
        Dtype::F16 => half::f16::from_f32(value).to_f32(),
        _ => value,
    }
}
