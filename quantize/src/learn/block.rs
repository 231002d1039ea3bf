//! Both sub-layers of a block learned together, and what is folded into them.
//!
//! ```text
//! streams before the block:  of the model as it is so far (q, fp2)     of the original (fp)
//! error feedback on both sub-layers --> start --> learn_block --> units, scales for the model
//! ```

use std::collections::BTreeMap;
use std::time::Instant;

use llmpress_calibrate::Streams;
use llmpress_formats::{Result, Transform};
use llmpress_learn::{Block, BlockStreams, Given, Gradients, Losses, Rate, Settings, Variables, learn_block};
use llmpress_model::Model;

use super::beside::Besides;
use super::{Changed, Either, SLOWER, settings, take, unlearned};
use crate::{Beside, Finished, Grain, Learn, Spec};

/// How much the divergence of attention maps counts, in nats, beside shares of what the block gives out.
const MAPS: f32 = 0.1;

/// The matrices of a block that are to be learned.
pub(crate) struct ToLearnBlock {
    layer: usize,
    block: Block,
    /// Of each matrix of attention and of the MLP; none of one that stays as it is.
    specs: [Vec<Option<Spec>>; 2],
    settings: Settings,
    beside: Beside,
}

/// What learning a block came to.
pub(crate) struct Learned {
    pub(crate) changed: Vec<Changed>,
    /// What the model gets with it.
    pub(crate) transforms: Vec<Transform>,
}

/// The streams of a block.
pub(crate) struct StreamsOf<'a> {
    /// Before it, of the model as it is so far.
    pub(crate) inputs: &'a mut Streams,
    /// After the original's block, on those.
    pub(crate) second: &'a mut Streams,
    /// After the original's block, on its own.
    pub(crate) targets: &'a mut Streams,
    /// Before that, where attention maps are compared.
    pub(crate) original: Option<&'a mut Streams>,
}

impl ToLearnBlock {
    /// Of a layer; none where blocks are not to be learned whole, or it cannot be: experts.
    pub(crate) fn of(
        model: &Model,
        layer: usize,
        (specs, windows): (&BTreeMap<String, Spec>, usize),
    ) -> Option<Self> {
        let block = Block::new(model, layer)?;
        let whole = |spec: &Spec| spec.learn.is_some_and(|learn| learn.grain == Grain::Block);
        let specs = block.parts().map(|net| {
            let tensors = net.map_or(&[][..], |net| net.tensors());
            let specs = tensors.iter().map(|tensor| specs.get(tensor).copied());
            specs.map(|spec| spec.filter(|spec| spec.by_layer().is_some())).collect::<Vec<_>>()
        });
        let all = || specs.iter().flatten().flatten();
        if !all().any(whole) {
            return None;
        }
        let of = |learn: Learn| learn.beside;
        let beside = all().filter_map(|spec| spec.learn).map(of).fold(Beside::default(), |a, b| Beside {
            scale: a.scale || b.scale,
            compensate: a.compensate || b.compensate,
            correct: a.correct || b.correct,
            maps: a.maps || b.maps,
        });
        let settings = settings(all(), windows, 2 * layer as u64)?;
        Some(Self { layer, block, specs, settings, beside })
    }

    /// Steps that it takes.
    pub(crate) fn steps(&self) -> u32 {
        self.settings.steps
    }

    /// The tensors of the block.
    pub(crate) fn tensors(&self) -> Vec<&String> {
        self.block.parts().into_iter().flatten().flat_map(|net| net.tensors()).collect()
    }

    /// Whether attention maps are compared, which takes the original's streams before the block.
    pub(crate) fn compares_maps(&self) -> bool {
        self.beside.maps
    }

    /// Learns them, as [`super::ToLearn::learn`]. The streams are of the same windows.
    ///
    /// # Errors
    /// Weights or streams that cannot be read.
    pub(crate) fn learn(
        &self,
        (model, original): (&Model, &Model),
        mut streams: StreamsOf<'_>,
        finished: &mut [Finished],
        progress: &mut dyn FnMut(),
    ) -> Result<Learned> {
        let started = Instant::now();
        let parts = self.block.parts();
        let tensors = parts.map(|net| net.map_or(&[][..], |net| net.tensors()));
        let dense = Block::new(original, self.layer);
        let attention = dense.as_ref().and_then(|block| block.parts()[0]);
        let mut weights = Vec::new();
        for tensor in attention.filter(|_| self.beside.maps).map_or(&[][..], |net| net.tensors()) {
            weights.push(original.weights(tensor)?);
        }
        let weights: Vec<&[f32]> = weights.iter().map(Vec::as_slice).collect();
        let losses = Losses {
            second: true,
            correction: self.beside.correct,
            maps: if self.beside.maps { MAPS } else { 0.0 },
        };
        let mut learn = |variables: &mut BlockVariables, rate: f32, progress: &mut dyn FnMut()| {
            let streams = BlockStreams {
                inputs: &mut *streams.inputs,
                targets: &mut *streams.targets,
                second: &mut *streams.second,
                original: streams.original.as_deref_mut(),
            };
            let settings = Settings { rate, ..self.settings };
            let dense = attention.map(|net| (net, Given::of(&weights)));
            learn_block(&self.block, variables, streams, dense, (losses, settings), progress)
        };
        let mut variables = self.start((model, original), finished)?;
        let mut outcome = learn(&mut variables, 1.0, progress)?;
        if !outcome.is_better() && outcome.before.is_finite() {
            drop(variables);
            variables = self.start((model, original), finished)?;
            outcome = learn(&mut variables, SLOWER, &mut || ())?;
        }
        let BlockVariables { matrices, besides, .. } = variables;
        let transforms = besides.filter(|_| outcome.is_better()).map(|b| b.transforms()).unwrap_or_default();
        let seconds = started.elapsed().as_secs_f64() / 2.0;
        let mut changed = Vec::new();
        for ((tensors, specs), matrices) in tensors.into_iter().zip(&self.specs).zip(matrices) {
            let why = unlearned(&format!("layer {}", self.layer), outcome, (self.settings, specs));
            changed.extend(take((tensors, specs), matrices, (outcome, seconds, why), finished)?);
        }
        Ok(Learned { changed, transforms })
    }

    /// Each matrix as error feedback left it, and scales of 1.
    fn start(&self, models: (&Model, &Model), finished: &[Finished]) -> Result<BlockVariables> {
        let mut matrices: [Vec<Either>; 2] = Default::default();
        for ((part, net), specs) in matrices.iter_mut().zip(self.block.parts()).zip(&self.specs) {
            for (tensor, spec) in net.map_or(&[][..], |net| net.tensors()).iter().zip(specs) {
                part.push(Either::start((tensor, *spec), models, finished)?);
            }
        }
        let all_learned = matrices.iter().flatten().all(|m| matches!(m, Either::Learned(_)));
        // What stays as it is has no place that could be moved.
        let wanted = Beside {
            scale: self.beside.scale && all_learned,
            compensate: self.beside.compensate && matches!(matrices[1].last(), Some(Either::Learned(_))),
            ..self.beside
        };
        let besides = match wanted.scale || wanted.compensate {
            true => {
                let unrounded = |m: &Either| match m {
                    Either::Learned(matrix) => matrix.unrounded(),
                    Either::Still(still) => still.0.clone(),
                };
                let unrounded = matrices.each_ref().map(|part| part.iter().map(unrounded).collect());
                Besides::new(models.0, (self.layer, &self.block), wanted, unrounded)?
            }
            false => None,
        };
        let norms = self.block.parts().map(|net| net.map_or(0, |net| net.norm().len()));
        Ok(BlockVariables { matrices, besides, norms })
    }
}

/// What is learned of a block.
struct BlockVariables {
    matrices: [Vec<Either>; 2],
    besides: Option<Besides>,
    /// Weights of the norms.
    norms: [usize; 2],
}

impl Variables for BlockVariables {
    fn weights(&self) -> [Vec<&[f32]>; 2] {
        self.matrices.each_ref().map(|part| part.iter().map(Either::weights).collect())
    }

    fn norms(&self) -> [Option<&[f32]>; 2] {
        self.besides.as_ref().map_or([None, None], Besides::norms)
    }

    fn value_bias(&self) -> Option<&[f32]> {
        self.besides.as_ref().and_then(Besides::value_bias)
    }

    fn gradients(&self) -> [Gradients; 2] {
        let mut all = self.weights().map(|part| Gradients::zeros(part.into_iter().map(<[f32]>::len)));
        for ((gradients, norm), count) in all.iter_mut().zip(self.norms()).zip(self.norms) {
            gradients.norm = norm.map_or(Vec::new(), |_| vec![0.0; count]);
        }
        all[0].value_bias = vec![0.0; self.value_bias().map_or(0, <[f32]>::len)];
        all
    }

    fn step(&mut self, gradients: &mut [Gradients; 2], rate: &Rate) {
        for (part, gradients) in self.matrices.iter_mut().zip(&*gradients) {
            for (matrix, gradient) in part.iter_mut().zip(&gradients.matrices) {
                matrix.variable().step(gradient, rate);
            }
        }
        let Some(besides) = &mut self.besides else { return };
        for (part, gradients) in self.matrices.iter().zip(&mut *gradients) {
            for (matrix, gradient) in part.iter().zip(&mut gradients.matrices) {
                if let Either::Learned(matrix) = matrix {
                    matrix.pass(gradient);
                }
            }
        }
        besides.step(gradients, rate);
        for (part, matrices) in self.matrices.iter_mut().enumerate() {
            for (at, matrix) in matrices.iter_mut().enumerate() {
                if let Either::Learned(matrix) = matrix {
                    matrix.shift(besides.shift(part, at));
                }
            }
        }
    }
}
