//! All that is trained of a model.

use std::collections::BTreeMap;

use llmpress_formats::{Dtype, Error, Result};
use llmpress_learn::{Decoder, DecoderGradients, Given, GivenAll, Turned};
use llmpress_model::Model;

use super::matrix::{Matrix, Start};
use super::optimiser::Update;
use super::vector::{Vector, squares};

/// A matrix of a sub-layer.
#[derive(Debug)]
pub(super) enum Either {
    Trained(Box<Matrix>),
    /// Dense, as it is.
    Still(Vec<f32>),
}

impl Either {
    fn seen(&self) -> &[f32] {
        match self {
            Self::Trained(matrix) => &matrix.seen,
            Self::Still(weights) => weights,
        }
    }
}

/// A sub-layer.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) matrices: Vec<Either>,
    pub(super) norm: Vector,
    norm_tensor: String,
    turned: Turned,
}

/// A norm as training left it.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainedNorm {
    /// Its tensor.
    pub tensor: String,
    /// As it is stored.
    pub values: Vec<f32>,
}

/// What training left.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Matrices.
    pub matrices: Vec<Start>,
    /// Norms: those of what sub-layers read, and the last one.
    pub norms: Vec<TrainedNorm>,
}

/// What is trained.
#[derive(Debug)]
pub(super) struct Student {
    pub(super) parts: Vec<Part>,
    pub(super) last: Vector,
    last_tensor: String,
}

impl llmpress_learn::Student for Student {
    fn lend(&self, then: &mut dyn FnMut(GivenAll<'_>) -> Result<()>) -> Result<()> {
        let seen: Vec<Vec<&[f32]>> =
            self.parts.iter().map(|part| part.matrices.iter().map(Either::seen).collect()).collect();
        let given: Vec<Given<'_>> = self
            .parts
            .iter()
            .zip(&seen)
            .map(|(part, seen)| Given {
                norm: Some(&part.norm.seen),
                turned: Some(&part.turned),
                ..Given::of(seen)
            })
            .collect();
        then((&given, Some(&self.last.seen)))
    }
}

impl Student {
    /// Of the dense model and where each matrix begins; others stay dense as they are.
    pub(super) fn new(decoder: &Decoder, dense: &Model, starts: &[Start], slorb: bool) -> Result<Self> {
        let by_name: BTreeMap<&str, &Start> = starts.iter().map(|s| (s.tensor.as_str(), s)).collect();
        let offset = if dense.config().norm_offset() { 1.0 } else { 0.0 };
        let vector = |tensor: &str, seen: &[f32]| -> Result<Vector> {
            Ok(Vector::new(seen, dense.checkpoint().tensor(tensor)?.dtype, offset))
        };
        let mut used = 0;
        let mut parts = Vec::new();
        for net in decoder.nets() {
            let matrices = net
                .tensors()
                .iter()
                .map(|tensor| {
                    let weights = dense.weights(tensor)?;
                    Ok(match by_name.get(tensor.as_str()) {
                        Some(start) => {
                            used += 1;
                            Either::Trained(Box::new(Matrix::new(start, weights, slorb)?))
                        }
                        None => Either::Still(weights),
                    })
                })
                .collect::<Result<Vec<_>>>()?;
            // Empty where nothing norms what it reads.
            let norm_tensor = dense.norm_tensor(net.site()).unwrap_or_default().to_owned();
            let norm = match norm_tensor.is_empty() {
                true => Vector::new(&[], Dtype::F32, 0.0),
                false => vector(&norm_tensor, net.norm())?,
            };
            parts.push(Part { matrices, norm, norm_tensor, turned: Turned::default() });
        }
        if used == 0 || used != starts.len() {
            return Err(Error::Invalid(format!(
                "{} sparse matrices were given to train, and {used} of them are linears of the decoder",
                starts.len()
            )));
        }
        let (tensor, seen) = decoder.last_norm();
        let mut student = Self { parts, last: vector(tensor, seen)?, last_tensor: tensor.to_owned() };
        student.turn(decoder);
        Ok(student)
    }

    /// What is trained of matrices.
    pub(super) fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        self.parts.iter().flat_map(|part| &part.matrices).filter_map(|matrix| match matrix {
            Either::Trained(matrix) => Some(matrix.as_ref()),
            Either::Still(_) => None,
        })
    }

    pub(super) fn matrices_mut(&mut self) -> impl Iterator<Item = &mut Matrix> {
        self.parts.iter_mut().flat_map(|part| &mut part.matrices).filter_map(|matrix| match matrix {
            Either::Trained(matrix) => Some(matrix.as_mut()),
            Either::Still(_) => None,
        })
    }

    pub(super) fn vectors_mut(&mut self) -> impl Iterator<Item = &mut Vector> {
        self.parts.iter_mut().map(|part| &mut part.norm).chain([&mut self.last])
    }

    pub(super) fn vectors(&self) -> impl Iterator<Item = &Vector> {
        self.parts.iter().map(|part| &part.norm).chain([&self.last])
    }

    /// Turns what products see, once for all windows of a step.
    pub(super) fn turn(&mut self, decoder: &Decoder) {
        for (net, part) in decoder.nets().iter().zip(&mut self.parts) {
            let seen: Vec<&[f32]> = part.matrices.iter().map(Either::seen).collect();
            net.turn(&seen, &mut part.turned);
        }
    }

    /// The norm of all derivatives of what is trained.
    pub(super) fn norm(&self, gradients: &DecoderGradients) -> f64 {
        let mut sum = squares(&gradients.norm);
        for (part, gradients) in self.parts.iter().zip(&gradients.sub_layers) {
            sum += squares(&gradients.norm);
            for (matrix, gradient) in part.matrices.iter().zip(&gradients.matrices) {
                if let Either::Trained(matrix) = matrix {
                    sum += matrix.squares(gradient);
                }
            }
        }
        sum.sqrt()
    }

    /// One step; with `choose` masks are found again after it. Returns how many quads keep others.
    pub(super) fn step(&mut self, gradients: &DecoderGradients, update: Update, choose: bool) -> u64 {
        let mut flips = 0;
        for (part, gradients) in self.parts.iter_mut().zip(&gradients.sub_layers) {
            part.norm.step(&gradients.norm, update.plain());
            for (matrix, gradient) in part.matrices.iter_mut().zip(&gradients.matrices) {
                if let Either::Trained(matrix) = matrix {
                    matrix.step(gradient, update);
                    if choose {
                        flips += matrix.choose();
                    }
                    matrix.see();
                }
            }
        }
        self.last.step(&gradients.norm, update.plain());
        flips
    }

    /// Puts stored norms in the place of its own.
    pub(super) fn take_norms(&mut self, norms: &[TrainedNorm]) -> Result<()> {
        let own = self.parts.iter_mut().filter(|part| !part.norm_tensor.is_empty());
        let own = own.map(|part| (&part.norm_tensor, &mut part.norm));
        for (tensor, norm) in own.chain([(&self.last_tensor, &mut self.last)]) {
            let found = norms.iter().find(|n| n.tensor == *tensor && n.values.len() == norm.values.len());
            let Some(found) = found else {
                return Err(Error::Invalid(format!("{tensor}: is not among the norms that were trained")));
            };
            norm.values.clone_from(&found.values);
            norm.see();
        }
        Ok(())
    }

    pub(super) fn finish(&self) -> Result<Outcome> {
        let norm =
            |tensor: &String, norm: &Vector| TrainedNorm { tensor: tensor.clone(), values: norm.stored() };
        let own = self.parts.iter().filter(|part| !part.norm_tensor.is_empty());
        let norms = own.map(|part| norm(&part.norm_tensor, &part.norm));
        Ok(Outcome {
            matrices: self.matrices().map(Matrix::finish).collect::<Result<_>>()?,
            norms: norms.chain([norm(&self.last_tensor, &self.last)]).collect(),
        })
    }
}
