//! Learning both sub-layers of a block together (ABQ-LLM, section 3).
//!
//! ```text
//! fp  = what the original block gives out on its own stream          x   the stream of the model as it is so far
//! fp2 = what the original block gives out on x                       q   what the block that is learned gives out on x
//!
//! loss = (|q - fp|^2 + |q - fp2|^2) / |fp2 - x|^2                                        reconstruction
//!      - ln mean cos(q, fp) - ln mean cos(q, fp2)         over tokens                    distribution correction
//!      + mean KL(P fp | P q) + mean KL(P fp2 | P q)       over heads and tokens          attention maps
//! ```

use llmpress_calibrate::Streams;
use llmpress_formats::{Error, Result};
use llmpress_kernels::cpu::PANEL;
use llmpress_model::{Model, Panels, SubLayer};
use rayon::prelude::*;

use crate::descend::{Task, descend};
use crate::{Given, Gradients, Kept, Maps, Net, Outcome, Rate, Settings};

/// The sub-layers of a block, without their weights.
#[derive(Clone, Debug)]
pub struct Block {
    parts: [Option<Net>; 2],
}

/// What the way back needs of the way there.
#[derive(Debug, Default)]
pub struct BlockKept {
    kept: [Kept; 2],
    /// What the MLP reads.
    middle: Panels,
    added: Panels,
    d: Panels,
    dx: Panels,
}

impl Block {
    /// Of a layer of a model; none where a sub-layer that there is has no [`Net`], or none is left.
    pub fn new(model: &Model, layer: usize) -> Option<Self> {
        let of = |site| match model.parts(site) {
            Some(_) => Net::new(model, site).map(Some),
            None => Some(None),
        };
        let parts = [of(SubLayer::Attention(layer))?, of(SubLayer::Mlp(layer))?];
        parts.iter().any(Option::is_some).then_some(Self { parts })
    }

    /// Attention and MLP, as far as they were not pruned away.
    pub fn parts(&self) -> [Option<&Net>; 2] {
        self.parts.each_ref().map(Option::as_ref)
    }

    /// The residual stream after both, into `y`.
    ///
    /// # Errors
    /// Those of [`Net::forward`].
    pub fn forward(
        &self,
        given: [Given<'_>; 2],
        x: &Panels,
        room: &mut BlockKept,
        y: &mut Panels,
    ) -> Result<()> {
        room.middle.clone_from(x);
        if let Some(net) = &self.parts[0] {
            net.forward(given[0], x, &mut room.kept[0], &mut room.added)?;
            add(&room.added, &mut room.middle);
        }
        y.clone_from(&room.middle);
        if let Some(net) = &self.parts[1] {
            net.forward(given[1], &room.middle, &mut room.kept[1], &mut room.added)?;
            add(&room.added, y);
        }
        Ok(())
    }

    /// Adds to `gradients` the derivatives of a loss by what is given; `dy` is that by what [`Self::forward`] gave out just
    /// before of `x`. Divergences from `maps` are added to the loss, each times its share.
    pub fn backward(
        &self,
        given: [Given<'_>; 2],
        x: &Panels,
        room: &mut BlockKept,
        (dy, maps): (&mut Panels, &[(&Maps, f32)]),
        gradients: &mut [Gradients; 2],
    ) {
        let [of_attention, of_mlp] = gradients;
        if let Some(net) = &self.parts[1] {
            room.d.clone_from(dy);
            let dx = self.parts[0].is_some().then_some(&mut room.dx);
            let back = (&mut room.d, &[][..]);
            net.backward(given[1], &room.middle, &mut room.kept[1], back, of_mlp, dx);
            if self.parts[0].is_some() {
                add(&room.dx, dy);
            }
        }
        if let Some(net) = &self.parts[0] {
            net.backward(given[0], x, &mut room.kept[0], (dy, maps), of_attention, None);
        }
    }
}

/// What is learned of a block.
pub trait Variables {
    /// The weights that products see, of the matrices of attention and of the MLP.
    fn weights(&self) -> [Vec<&[f32]>; 2];

    /// The norms before both; the model's own where there are none.
    fn norms(&self) -> [Option<&[f32]>; 2];

    /// The bias of values; the model's own where there is none.
    fn value_bias(&self) -> Option<&[f32]>;

    /// Derivatives of what is learned, zero.
    fn gradients(&self) -> [Gradients; 2];

    /// One step down the derivatives of the loss by all of them.
    fn step(&mut self, gradients: &mut [Gradients; 2], rate: &Rate);
}

/// What a loss is made of, beside the distance from what the original gives out on its own stream.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Losses {
    /// The distance from what it gives out on the stream of the model so far.
    pub second: bool,
    /// Distribution correction, of the distances that there are.
    pub correction: bool,
    /// The divergence of attention maps, times this share, from those that it has on the streams that there are.
    pub maps: f32,
}

/// The streams of a block, of the same windows.
#[derive(Debug)]
pub struct BlockStreams<'a> {
    /// Before the block, of the model as it is so far.
    pub inputs: &'a mut Streams,
    /// After it, of the original.
    pub targets: &'a mut Streams,
    /// After the original's block on `inputs`.
    pub second: &'a mut Streams,
    /// Before it, of the original: where maps are compared.
    pub original: Option<&'a mut Streams>,
}

/// Learns the variables of a block. `dense` is the original's attention with its weights: where maps are compared. The variables
/// are as the last step left them.
///
/// # Errors
/// Streams that do not go together; a file that cannot be read; what cannot be quantised.
pub fn learn_block(
    block: &Block,
    variables: &mut dyn Variables,
    streams: BlockStreams<'_>,
    dense: Option<(&Net, Given<'_>)>,
    (losses, settings): (Losses, Settings),
    progress: &mut dyn FnMut(),
) -> Result<Outcome> {
    let windows = streams.inputs.windows();
    let sizes = |s: &Streams| (s.windows(), s.tokens(), s.features());
    let all = [&*streams.targets, &*streams.second].into_iter().chain(streams.original.as_deref());
    if windows == 0 || all.into_iter().any(|s| sizes(s) != sizes(streams.inputs)) {
        return Err(Error::Invalid("the streams of a block are not of the same windows".to_owned()));
    }
    let gradients = variables.gradients();
    let mut work = Work {
        block,
        variables,
        streams,
        dense: dense.filter(|_| losses.maps > 0.0),
        losses,
        gradients,
        room: BlockKept::default(),
        x: Panels::default(),
        y: Panels::default(),
        d: Panels::default(),
        target: Panels::default(),
        original: Panels::default(),
        kept: Kept::default(),
        maps: Vec::new(),
    };
    descend(&mut work, windows, settings, progress)
}

struct Work<'a> {
    block: &'a Block,
    variables: &'a mut dyn Variables,
    streams: BlockStreams<'a>,
    dense: Option<(&'a Net, Given<'a>)>,
    losses: Losses,
    gradients: [Gradients; 2],
    room: BlockKept,
    x: Panels,
    y: Panels,
    /// The derivative by `y`.
    d: Panels,
    target: Panels,
    original: Panels,
    kept: Kept,
    maps: Vec<Maps>,
}

impl Work<'_> {
    /// The loss of a window; its derivative by what comes out is left in `d`.
    fn forward(&mut self, window: usize) -> Result<f64> {
        self.streams.inputs.get(window, &mut self.x)?;
        let weights = self.variables.weights();
        let given = given(&weights, &*self.variables);
        // What it refuses is NaN or infinite where it is to be quantised: a loss that says nothing, too.
        if self.block.forward(given, &self.x, &mut self.room, &mut self.y).is_err() {
            return Ok(f64::NAN);
        }
        self.d.resize(self.y.features(), self.y.tokens());
        self.d.data_mut().fill(0.0);
        self.streams.second.get(window, &mut self.target)?;
        let energy = squares(&self.target, &self.x);
        let mut loss = 0.0;
        if self.losses.second {
            loss += self.towards(energy);
        }
        self.streams.targets.get(window, &mut self.target)?;
        loss += self.towards(energy);
        self.maps.clear();
        if let (Some((net, given)), Some(attention)) = (self.dense, self.block.parts()[0]) {
            if let Some(original) = &mut self.streams.original {
                original.get(window, &mut self.original)?;
            }
            let own = self.streams.original.is_some().then_some(&self.original);
            let second = self.losses.second.then_some(&self.x);
            for stream in own.into_iter().chain(second) {
                let mut maps = Maps::default();
                net.maps(given, stream, &mut self.kept, &mut maps)?;
                let found = attention.divergence(&self.room.kept[0], &maps);
                loss += f64::from(self.losses.maps) * found;
                self.maps.push(maps);
            }
        }
        Ok(loss)
    }

    /// Adds the derivative of the distance from the target, and returns it.
    fn towards(&mut self, energy: f64) -> f64 {
        let share = 1.0 / energy.max(f64::MIN_POSITIVE);
        let away = squares(&self.y, &self.target);
        let scale = (2.0 * share) as f32;
        let pieces = self.d.data_mut().par_chunks_mut(PIECE).zip(self.y.data().par_chunks(PIECE));
        pieces.zip(self.target.data().par_chunks(PIECE)).for_each(|((d, y), target)| {
            d.iter_mut().zip(y).zip(target).for_each(|((d, y), target)| *d += scale * (y - target));
        });
        let cosine = if self.losses.correction { cosine(&self.y, &self.target, &mut self.d) } else { 0.0 };
        away * share + cosine
    }
}

impl Task for Work<'_> {
    fn loss(&mut self, windows: &[usize]) -> Result<f64> {
        let mut sum = 0.0;
        for &window in windows {
            sum += self.forward(window)?;
        }
        Ok(sum / windows.len().max(1) as f64)
    }

    fn add_gradients(&mut self, window: usize) -> Result<bool> {
        if !self.forward(window)?.is_finite() {
            return Ok(false);
        }
        let weights = self.variables.weights();
        let given = given(&weights, &*self.variables);
        let maps: Vec<(&Maps, f32)> = self.maps.iter().map(|maps| (maps, self.losses.maps)).collect();
        let back = (&mut self.d, &maps[..]);
        self.block.backward(given, &self.x, &mut self.room, back, &mut self.gradients);
        Ok(true)
    }

    fn step(&mut self, rate: &Rate) {
        self.variables.step(&mut self.gradients, rate);
        self.gradients.iter_mut().for_each(Gradients::clear);
    }
}

fn given<'a>(weights: &'a [Vec<&'a [f32]>; 2], variables: &'a dyn Variables) -> [Given<'a>; 2] {
    let (norms, bias) = (variables.norms(), variables.value_bias());
    [
        Given { norm: norms[0], value_bias: bias, ..Given::of(&weights[0]) },
        Given { norm: norms[1], ..Given::of(&weights[1]) },
    ]
}

/// Values that a task takes.
const PIECE: usize = 1 << 14;

/// `to += x`.
fn add(x: &Panels, to: &mut Panels) {
    let pieces = to.data_mut().par_chunks_mut(PIECE).zip(x.data().par_chunks(PIECE));
    pieces.for_each(|(to, x)| to.iter_mut().zip(x).for_each(|(to, x)| *to += x));
}

/// The squares of differences.
fn squares(a: &Panels, b: &Panels) -> f64 {
    let pieces = a.data().par_chunks(PIECE).zip(b.data().par_chunks(PIECE));
    let sum = |(a, b): (&[f32], &[f32])| -> f64 {
        let away = a.iter().zip(b).map(|(a, b)| f64::from(a - b));
        away.map(|d| d * d).sum()
    };
    let sums: Vec<f64> = pieces.map(sum).collect();
    sums.iter().sum()
}

/// `-ln |mean cos|` over tokens; its derivative by `y` is added to `d`.
fn cosine(y: &Panels, target: &Panels, d: &mut Panels) -> f64 {
    let tokens = y.tokens();
    // Of each token: y^2, y target, target^2.
    let sums: Vec<[[f32; PANEL]; 3]> = (0..y.count())
        .into_par_iter()
        .map(|panel| {
            let (width, mut sums) = (y.width(panel), [[0.0f32; PANEL]; 3]);
            let rows = y.panel(panel).chunks_exact(width).zip(target.panel(panel).chunks_exact(width));
            for (y, target) in rows {
                for (at, (y, target)) in y.iter().zip(target).enumerate() {
                    sums[0][at] += y * y;
                    sums[1][at] += y * target;
                    sums[2][at] += target * target;
                }
            }
            sums
        })
        .collect();
    let of = |sums: &[[f32; PANEL]; 3], at: usize| {
        let sizes = sums[0][at].sqrt() * sums[2][at].sqrt();
        // A token of zeros points nowhere.
        if sizes > 0.0 { sums[1][at] / sizes } else { 1.0 }
    };
    let all =
        sums.iter().enumerate().flat_map(|(panel, sums)| (0..y.width(panel)).map(move |at| of(sums, at)));
    let mean = all.map(f64::from).sum::<f64>() / tokens.max(1) as f64;
    let share = (-1.0 / (mean * tokens.max(1) as f64)) as f32;
    let widths: Vec<usize> = (0..y.count()).map(|panel| y.width(panel)).collect();
    let panels: Vec<_> = d.panels_mut().enumerate().collect();
    panels.into_par_iter().for_each(|(panel, d)| {
        let (width, sums) = (widths[panel], &sums[panel]);
        let (mut by_target, mut by_y) = ([0.0f32; PANEL], [0.0f32; PANEL]);
        for at in 0..width {
            let sizes = sums[0][at].sqrt() * sums[2][at].sqrt();
            if sizes > 0.0 {
                (by_target[at], by_y[at]) = (share / sizes, -share * of(sums, at) / sums[0][at]);
            }
        }
        let rows = y.panel(panel).chunks_exact(width).zip(target.panel(panel).chunks_exact(width));
        for (d, (y, target)) in d.chunks_exact_mut(width).zip(rows) {
            for (at, (d, (y, target))) in d.iter_mut().zip(y.iter().zip(target)).enumerate() {
                *d += by_target[at] * target + by_y[at] * y;
            }
        }
    });
    -mean.abs().ln()
}
