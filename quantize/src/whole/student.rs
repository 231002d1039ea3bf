//! All matrices of a decoder, those on their grids as they are learned.

use std::io::{Read, Write};

use llmpress_formats::encoding::abq::Packed;
use llmpress_formats::{Error, Result};
use llmpress_learn::{Decoder, DecoderGradients, Given, GivenAll, Rate, Student, Turned, Variable};
use rayon::prelude::*;

use super::WholeTask;
use crate::latent::{Latent, Rates, Snapshot};

/// A matrix of a sub-layer.
enum Either {
    Learned(String, Box<Latent>),
    /// As it is.
    Still(Vec<f32>),
}

impl Either {
    fn weights(&self) -> &[f32] {
        match self {
            Self::Learned(_, matrix) => matrix.weights(),
            Self::Still(weights) => weights,
        }
    }
}

/// A sub-layer.
struct Part {
    matrices: Vec<Either>,
    turned: Turned,
}

/// What is learned.
pub(super) struct Matrices(Vec<Part>);

/// Values that a task sums or scales.
const PIECE: usize = 1 << 14;

impl Matrices {
    /// As the rungs below left them.
    pub(super) fn new(task: &WholeTask<'_>, decoder: &Decoder) -> Result<Self> {
        // A checkpoint that was transformed before is so for both.
        let transforms = match task.dense.transforms() {
            [] => task.start.transforms(),
            _ => &[],
        };
        let folds = task.dense.folds(transforms)?;
        let original = |tensor: &str| {
            let mut weights = task.dense.weights(tensor)?;
            folds.apply(tensor, &mut weights).map(|()| weights)
        };
        let mut parts = Vec::new();
        let mut learned = 0;
        for net in decoder.nets() {
            let matrices = net
                .tensors()
                .iter()
                .map(|tensor| match task.specs.get(tensor).filter(|spec| spec.whole().is_some()) {
                    Some(spec) => {
                        learned += 1;
                        let (unit, original) = ((task.unit)(tensor)?, original(tensor)?);
                        if unit.abq() != &spec.abq || unit.rows() * unit.cols() != original.len() {
                            return Err(Error::Invalid(format!(
                                "{tensor}: what it is to be learned from is not what {} makes of it",
                                crate::Quantiser::of(*spec)
                            )));
                        }
                        let latent = Latent::new(&unit, *spec, &original).with(Rates::of_whole(unit.cols()));
                        Ok(Either::Learned(tensor.clone(), Box::new(latent)))
                    }
                    None => Ok(Either::Still(task.start.weights(tensor)?)),
                })
                .collect::<Result<Vec<_>>>()?;
            parts.push(Part { matrices, turned: Turned::default() });
        }
        if learned == 0 {
            return Err(Error::Invalid(
                "no matrix of the decoder is to be learned with the whole model".to_owned(),
            ));
        }
        let mut all = Self(parts);
        all.turn(decoder);
        Ok(all)
    }

    fn learned(&self) -> impl Iterator<Item = (&str, &Latent)> {
        self.0.iter().flat_map(|part| &part.matrices).filter_map(|matrix| match matrix {
            Either::Learned(tensor, matrix) => Some((tensor.as_str(), matrix.as_ref())),
            Either::Still(_) => None,
        })
    }

    fn learned_mut(&mut self) -> impl Iterator<Item = &mut Latent> {
        self.0.iter_mut().flat_map(|part| &mut part.matrices).filter_map(|matrix| match matrix {
            Either::Learned(_, matrix) => Some(matrix.as_mut()),
            Either::Still(_) => None,
        })
    }

    /// Turns what products see, once for all windows of a step.
    pub(super) fn turn(&mut self, decoder: &Decoder) {
        for (net, part) in decoder.nets().iter().zip(&mut self.0) {
            let seen: Vec<&[f32]> = part.matrices.iter().map(Either::weights).collect();
            net.turn(&seen, &mut part.turned);
        }
    }

    /// The norm of the derivatives by all that is learned, the same on any number of threads.
    pub(super) fn norm(&self, gradients: &DecoderGradients) -> f64 {
        let mut sum = 0.0;
        for (part, gradients) in self.0.iter().zip(&gradients.sub_layers) {
            for (matrix, gradient) in part.matrices.iter().zip(&gradients.matrices) {
                if matches!(matrix, Either::Learned(..)) {
                    let of = |piece: &[f32]| piece.iter().map(|g| f64::from(*g) * f64::from(*g)).sum::<f64>();
                    let sums: Vec<f64> = gradient.par_chunks(PIECE).map(of).collect();
                    sum += sums.iter().sum::<f64>();
                }
            }
        }
        sum.sqrt()
    }

    /// One step down `share` of the derivatives.
    pub(super) fn step(&mut self, gradients: &mut DecoderGradients, share: f32, rate: &Rate) {
        for (part, gradients) in self.0.iter_mut().zip(&mut gradients.sub_layers) {
            for (matrix, gradient) in part.matrices.iter_mut().zip(&mut gradients.matrices) {
                let Either::Learned(_, matrix) = matrix else { continue };
                if share != 1.0 {
                    gradient.par_chunks_mut(PIECE).for_each(|g| g.iter_mut().for_each(|g| *g *= share));
                }
                matrix.step(gradient, rate);
            }
        }
    }

    /// What all would be stored as now.
    pub(super) fn snapshots(&self) -> Vec<Snapshot> {
        self.learned().map(|(_, matrix)| matrix.snapshot()).collect()
    }

    /// Back to what all were.
    pub(super) fn go_back(&mut self, snapshots: &[Snapshot]) {
        self.learned_mut().zip(snapshots).for_each(|(matrix, snapshot)| matrix.go_back(snapshot));
    }

    /// What is stored of snapshots, by tensor.
    pub(super) fn pack(&self, snapshots: &[Snapshot]) -> Result<Vec<(String, Packed<'static>)>> {
        let all = self.learned().zip(snapshots);
        all.map(|((tensor, matrix), snapshot)| Ok((tensor.to_owned(), matrix.pack(snapshot)?))).collect()
    }

    /// The tensors that are learned.
    pub(super) fn tensors(&self) -> Vec<String> {
        self.learned().map(|(tensor, _)| tensor.to_owned()).collect()
    }

    /// Room for snapshots that are read.
    pub(super) fn rooms(&self) -> Vec<Snapshot> {
        self.learned().map(|(_, matrix)| matrix.room()).collect()
    }

    pub(super) fn write(&self, to: &mut dyn Write) -> std::io::Result<()> {
        self.learned().try_for_each(|(_, matrix)| matrix.write(to))
    }

    pub(super) fn read(&mut self, from: &mut dyn Read) -> std::io::Result<()> {
        self.learned_mut().try_for_each(|matrix| matrix.read(from))
    }
}

impl Student for Matrices {
    fn lend(&self, then: &mut dyn FnMut(GivenAll<'_>) -> Result<()>) -> Result<()> {
        let seen: Vec<Vec<&[f32]>> =
            self.0.iter().map(|part| part.matrices.iter().map(Either::weights).collect()).collect();
        let parts = self.0.iter().zip(&seen);
        let given: Vec<Given<'_>> =
            parts.map(|(part, seen)| Given { turned: Some(&part.turned), ..Given::of(seen) }).collect();
        then((&given, None))
    }
}
