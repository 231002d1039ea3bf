//! Weights of experts in a GPU's memory: the same matrix of all of them side by side, so that one launch reads those that are needed.
//!
//! ```text
//! plain      each expert's [rows, cols], one after the other     multiplied as it is
//! fixed12    each expert's tiles, one after the other            multiplied as it is
//! DFloat11   where they lie in the layer's unit                  what belongs to the experts at hand is decoded
//! ```

use llmpress_formats::{Error, Result};
use llmpress_kernels::gpu::Buffer;
use llmpress_kernels::gpu::dense::Element;
use llmpress_kernels::gpu::experts::Routing;
use llmpress_kernels::gpu::fixed12::{ExpertMatrix, ExpertPile};

use super::device;
use super::weights::{GpuLinear, Loader, Target, element, one_dtype, plain_bytes, stacks};
use crate::linear::Linear;

/// The experts of a layer.
#[derive(Debug)]
pub(super) struct GpuExperts {
    pub(super) routing: Routing,
    pub(super) router: GpuLinear,
    /// Gate and up: two matrices of each expert, or one where they could be stacked.
    pub(super) gate_up: Vec<ExpertLinear>,
    pub(super) down: ExpertLinear,
}

/// A matrix of each expert.
#[derive(Debug)]
pub(super) struct ExpertLinear {
    /// Of an expert.
    pub(super) rows: usize,
    /// Rows of all matrices of an expert with the same input.
    pub(super) whole: usize,
    pub(super) cols: usize,
    pub(super) source: ExpertSource,
}

/// Where the weights are.
#[derive(Debug)]
pub(super) enum ExpertSource {
    /// `firsts`: U64, the element at which each expert's begin.
    Dense {
        words: Buffer,
        element: Element,
        firsts: Buffer,
    },
    Fixed12(ExpertMatrix),
    /// In a decoded unit.
    Dfloat11 {
        unit: usize,
        firsts: Buffer,
    },
}

impl Loader<'_> {
    /// The matrices of all experts with one input: of each expert those in `of_experts`, in the same order.
    pub(super) fn experts(&mut self, of_experts: &[Vec<&Linear>]) -> Result<Vec<ExpertLinear>> {
        let Some(first) = of_experts.first() else { return Ok(Vec::new()) };
        let whole: usize = first.iter().map(|linear| linear.rows()).sum();
        let all = || of_experts.iter().flatten();
        if let Some(linear) = all().find(|linear| linear.bias().is_some()) {
            return Err(self.refused(linear, "is of an expert and has a bias"));
        }
        let mut targets = Vec::new();
        for linear in all() {
            targets.push(self.target(linear)?);
        }
        // Only one unit is decoded at a time.
        if targets.iter().all(|target| matches!(target, Target::Unit)) && self.share_unit(all())? {
            let places = all().map(|linear| self.place(linear)).collect::<Result<Vec<_>>>()?;
            return self.experts_in_unit(of_experts, &places, whole);
        }
        let encodes = |target: &Target| matches!(target, Target::Fixed12);
        let fixed12 = targets.iter().any(encodes) && all().all(|linear| element(linear) == Element::Bf16);
        let stacked = of_experts.iter().all(|group| stacks(group) && one_dtype(group));
        let piles: Vec<Vec<&[&Linear]>> = if stacked {
            vec![of_experts.iter().map(Vec::as_slice).collect()]
        } else {
            (0..first.len())
                .map(|i| of_experts.iter().filter_map(|group| group.get(i..i + 1)).collect())
                .collect()
        };
        piles
            .into_iter()
            .map(|pile| {
                let rows = pile[0].iter().map(|linear| linear.rows()).sum();
                let source =
                    if fixed12 { self.fixed12_experts(&pile, rows)? } else { self.plain_experts(&pile)? };
                Ok(ExpertLinear { rows, whole, cols: first[0].cols(), source })
            })
            .collect()
    }

    /// `places`: unit and first element of each matrix, expert by expert.
    fn experts_in_unit(
        &self,
        of_experts: &[Vec<&Linear>],
        places: &[(usize, usize)],
        whole: usize,
    ) -> Result<Vec<ExpertLinear>> {
        let each = of_experts[0].len();
        let follows = |group: &[(usize, usize)]| {
            group
                .windows(2)
                .zip(&of_experts[0])
                .all(|(pair, linear)| pair[1].1 == pair[0].1 + linear.rows() * linear.cols())
        };
        let stacked = of_experts.iter().all(|group| stacks(group)) && places.chunks(each).all(follows);
        let linear = |first: usize, rows: usize| -> Result<ExpertLinear> {
            let firsts: Vec<u64> = places.chunks(each).map(|group| group[first].1 as u64).collect();
            let source = ExpertSource::Dfloat11 {
                unit: places[0].0,
                firsts: self.gpu.upload(&firsts).map_err(device)?,
            };
            Ok(ExpertLinear { rows, whole, cols: of_experts[0][0].cols(), source })
        };
        if stacked {
            return Ok(vec![linear(0, whole)?]);
        }
        (0..each).map(|i| linear(i, of_experts[0][i].rows())).collect()
    }

    fn plain_experts(&self, pile: &[&[&Linear]]) -> Result<ExpertSource> {
        let kind = element(pile[0][0]);
        if let Some(odd) = pile.iter().flat_map(|group| group.iter()).find(|linear| element(linear) != kind) {
            return Err(self.refused(odd, "has another dtype than other experts of its layer"));
        }
        let bytes = |group: &&[&Linear]| group.iter().map(|linear| plain_bytes(linear)).sum::<u64>() as usize;
        let words = self.gpu.allocate(pile.iter().map(bytes).sum()).map_err(device)?;
        let (mut first, mut firsts) = (0, Vec::with_capacity(pile.len()));
        for group in pile {
            firsts.push((first / kind.bytes()) as u64);
            for linear in *group {
                let last = first + plain_bytes(linear) as usize;
                self.write_plain(linear, words.slice(first..last).map_err(device)?)?;
                first = last;
            }
        }
        Ok(ExpertSource::Dense { words, element: kind, firsts: self.gpu.upload(&firsts).map_err(device)? })
    }

    fn fixed12_experts(&self, pile: &[&[&Linear]], rows: usize) -> Result<ExpertSource> {
        let cols = pile[0][0].cols();
        let mut tiles = ExpertPile::new(self.gpu, pile.len(), rows, cols).map_err(device)?;
        for linear in pile.iter().flat_map(|group| group.iter()) {
            tiles.add(&self.fixed12(linear)?.part()).map_err(device)?;
        }
        Ok(ExpertSource::Fixed12(tiles.finish(self.gpu).map_err(device)?))
    }

    fn refused(&self, linear: &Linear, what: &str) -> Error {
        let what = format!("{what}, which does not run on a GPU: leave out --device cuda");
        Error::unsupported(self.checkpoint.root(), Some(linear.tensor()), what)
    }

    /// Says which parts of the unit of a layer belong to its experts: of each expert all matrices.
    pub(super) fn own(&mut self, of_experts: &[Vec<&Linear>]) -> Result<()> {
        if !self.share_unit(of_experts.iter().flatten())? {
            return Ok(());
        }
        let mut ranges = std::collections::BTreeMap::<usize, Vec<(std::ops::Range<usize>, usize)>>::new();
        for (expert, group) in of_experts.iter().enumerate() {
            for linear in group {
                if !matches!(self.target(linear)?, Target::Unit) {
                    return Ok(());
                }
                let (unit, first) = self.place(linear)?;
                ranges.entry(unit).or_default().push((first..first + linear.rows() * linear.cols(), expert));
            }
        }
        for (unit, mut ranges) in ranges {
            ranges.sort_by_key(|(range, _)| range.start);
            self.units[unit].own(self.gpu, of_experts.len(), &ranges).map_err(device)?;
        }
        Ok(())
    }
}
