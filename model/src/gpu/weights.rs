//! Weights in a GPU's memory: as they are stored, or encoded anew when they are loaded.
//!
//! ```text
//! plain        [rows, cols]           BF16, F16 or F32, multiplied as it is
//! fixed12      tiles                  multiplied as it is
//! DFloat11     units of some tensors  decoded into one scratch buffer when a layer begins
//! dfloat8      FP8 and its scales     decoded there when it is multiplied
//! abq          tiles of codes         multiplied as it is; in integers where activations are quantised, too
//! two in four  kept values, positions multiplied as it is, values plain or in fixed12
//! lowrank      a base and sums        the base as above, sums plain or abq, of inputs added up
//! ```

use std::collections::HashMap;
use std::mem::discriminant;

use bytemuck::Pod;
use llmpress_entropy::{dfloat11, fixed12};
use llmpress_formats::encoding::abq::Abq;
use llmpress_formats::encoding::dfloat11::{ENCODED_EXPONENT, GAPS, LUTS, OUTPUT_POSITIONS, SIGN_MANTISSA};
use llmpress_formats::encoding::lowrank::{Base, BaseRows, Lowrank, Packed as WithSums, Sums};
use llmpress_formats::encoding::scaled::{ELEMENTS, Scaled};
use llmpress_formats::encoding::sparse24::{Inner, Kept, Packed};
use llmpress_formats::{Checkpoint, Dtype, Encoding, Error, Result, encoding};
use llmpress_kernels::gpu::abq::{self, integer};
use llmpress_kernels::gpu::dense::{self, Element, padded, row_stride};
use llmpress_kernels::gpu::dfloat11::{Components, Scales, Unit};
use llmpress_kernels::gpu::fixed12::{Encoded, Matrix, Part};
use llmpress_kernels::gpu::sparse24;
use llmpress_kernels::gpu::{Buffer, Gpu, View};

use super::device;
use super::experts::ExpertLinear;
use super::session::padded as padded_input;
use crate::Weights;
use crate::linear::Linear;
use crate::linear::abq::Components as Codes;

/// A matrix of `rows` x `cols` weights, or several with the same input one below the other.
#[derive(Debug)]
pub(super) struct GpuLinear {
    pub(super) rows: usize,
    /// Rows of all matrices with the same input: products add in the order that these have together, whether they lie in
    /// one matrix or not.
    pub(super) whole: usize,
    pub(super) cols: usize,
    pub(super) source: Source,
    pub(super) bias: Option<Buffer>,
}

/// Where the weights are.
#[derive(Debug)]
pub(super) enum Source {
    /// Rows of [`llmpress_kernels::gpu::dense::row_stride`] elements.
    Dense {
        words: Buffer,
        element: Element,
    },
    Fixed12(Matrix),
    Abq(abq::Matrix),
    /// Activations are quantised; one that is not finite is told by the label, a place in the list of names and one more.
    Integers {
        matrix: integer::Matrix,
        label: u32,
    },
    /// Elements from `first` on of a decoded unit, of FP8 too.
    Dfloat11 {
        unit: usize,
        first: usize,
    },
    Sparse24(sparse24::Matrix),
    /// A base, and sums that are multiplied with what blocks of so many inputs add up to.
    WithSums {
        base: Box<GpuLinear>,
        sums: Box<GpuLinear>,
        block: usize,
    },
}

impl GpuLinear {
    /// Bytes of what blocks of inputs of so many tokens add up to.
    pub(super) fn sums_bytes(&self, tokens: usize) -> usize {
        match &self.source {
            Source::WithSums { sums, .. } => 2 * tokens * padded_input(sums.cols),
            _ => 0,
        }
    }

    /// Itself, or the matrices that it is the sum of.
    pub(super) fn terms(&self) -> Vec<&Self> {
        match &self.source {
            Source::WithSums { base, sums, .. } => vec![base, sums],
            _ => vec![self],
        }
    }
}

/// Loads matrices, and keeps the units that they share.
pub(super) struct Loader<'a> {
    pub(super) gpu: &'a Gpu,
    pub(super) checkpoint: &'a Checkpoint,
    weights: Weights,
    pub(super) units: Vec<Unit>,
    by_name: HashMap<String, usize>,
    /// Matrices whose activations are quantised.
    labels: Vec<String>,
    /// Unit and first element of the matrices of a layer that were encoded anew.
    made: HashMap<String, (usize, usize)>,
}

/// The matrices of a layer.
#[derive(Debug, Default)]
pub(super) struct LayerLinears<'a> {
    /// In groups with the same input: of attention, then those of the MLP, or the router alone.
    pub(super) groups: Vec<Vec<&'a Linear>>,
    /// How many groups are of attention.
    pub(super) of_attention: usize,
    /// Of each expert the gate and up.
    pub(super) gate_up: Vec<Vec<&'a Linear>>,
    /// Of each expert the way back.
    pub(super) down: Vec<Vec<&'a Linear>>,
}

impl<'a> LayerLinears<'a> {
    /// Those that DFloat11 holds together: all but a router.
    pub(super) fn members(&self) -> impl Iterator<Item = &'a Linear> {
        let groups = if self.gate_up.is_empty() { self.groups.len() } else { self.of_attention };
        let experts =
            self.gate_up.iter().zip(&self.down).flat_map(|(gate_up, down)| gate_up.iter().chain(down));
        self.groups[..groups].iter().flatten().chain(experts).copied()
    }

    /// Whether loading encodes them anew as one unit.
    pub(super) fn becomes_unit(&self, checkpoint: &Checkpoint, weights: Weights) -> Result<bool> {
        let (mut is_stored, mut fit) = (true, true);
        for linear in self.members() {
            let encoding = stored(checkpoint, linear)?;
            is_stored &= matches!(encoding, Encoding::Dfloat11);
            fit &= decodes_in_place(linear) && stays_abq(&encoding, weights).is_none();
        }
        Ok(weights == Weights::Dfloat11 && !is_stored && fit)
    }
}

/// A layer in a GPU's memory.
pub(super) struct LoadedLayer {
    /// As [`LayerLinears`] groups them.
    pub(super) groups: Vec<Vec<GpuLinear>>,
    pub(super) gate_up: Vec<ExpertLinear>,
    pub(super) down: Option<ExpertLinear>,
}

impl<'a> Loader<'a> {
    pub(super) fn new(gpu: &'a Gpu, checkpoint: &'a Checkpoint, weights: Weights) -> Self {
        let (by_name, made) = (HashMap::new(), HashMap::new());
        Self { gpu, checkpoint, weights, units: Vec::new(), by_name, labels: Vec::new(), made }
    }

    /// The units that matrices lie in, and the names of those whose activations are quantised.
    pub(super) fn finish(self) -> (Vec<Unit>, Vec<String>) {
        (self.units, self.labels)
    }

    /// The matrices of a layer: those of a group become one where their encoding lets them, which saves launches. Those that become
    /// DFloat11 share a unit.
    pub(super) fn layer(&mut self, layer: &LayerLinears<'_>) -> Result<LoadedLayer> {
        if layer.becomes_unit(self.checkpoint, self.weights)? {
            self.make_unit(layer)?;
        }
        let groups = layer.groups.iter().map(|group| self.group(group)).collect::<Result<_>>()?;
        let gate_up = self.experts(&layer.gate_up)?;
        let down = self.experts(&layer.down)?.pop();
        let all = layer.gate_up.iter().zip(&layer.down);
        let all: Vec<Vec<&Linear>> = all.map(|(gate_up, down)| [&gate_up[..], &down[..]].concat()).collect();
        self.own(&all)?;
        self.made.clear();
        Ok(LoadedLayer { groups, gate_up, down })
    }

    /// Encodes the matrices of a layer as one unit. What the format cannot hold stays plain, as it does on disk.
    fn make_unit(&mut self, layer: &LayerLinears<'_>) -> Result<()> {
        let (mut words, mut firsts) = (Vec::new(), Vec::new());
        for linear in layer.members() {
            firsts.push((linear.tensor(), words.len()));
            words.extend(self.elements::<u16>(linear)?);
        }
        let Ok(encoded) = dfloat11::encode(&words) else { return Ok(()) };
        let positions: Vec<u32> = bytemuck::pod_collect_to_vec(&encoded.output_positions);
        let unit = self.upload(&Components {
            luts: &encoded.luts,
            encoded_exponent: &encoded.encoded_exponent,
            sign_mantissa: &encoded.sign_mantissa,
            output_positions: &positions,
            gaps: &encoded.gaps,
        })?;
        self.made = firsts.into_iter().map(|(name, first)| (name.to_owned(), (unit, first))).collect();
        Ok(())
    }

    /// A matrix by itself.
    pub(super) fn matrix(&mut self, linear: &Linear) -> Result<GpuLinear> {
        let mut group = self.group(&[linear])?;
        group.pop().ok_or_else(|| Error::Invalid(format!("{} was not loaded", linear.tensor())))
    }

    /// What a matrix becomes.
    pub(super) fn target(&self, linear: &Linear) -> Result<Target> {
        if self.made.contains_key(linear.tensor()) {
            return Ok(Target::Unit);
        }
        let encoding = self.stored(linear)?;
        if let Some(abq) = stays_abq(&encoding, self.weights) {
            return Ok(Target::Abq(abq));
        }
        if let Some(scaled) = stays_fp8(self.checkpoint, linear, self.weights)? {
            return Ok(Target::Fp8(scaled));
        }
        if let Some(in_fixed12) = stays_sparse(&encoding, self.weights, linear) {
            return Ok(Target::Sparse24 { in_fixed12 });
        }
        if let Some(lowrank) = stays_lowrank(&encoding, self.weights, linear) {
            return Ok(Target::WithSums(lowrank));
        }
        Ok(match (self.weights, encoding) {
            (Weights::Stored | Weights::Fixed12, Encoding::Fixed12 { .. }) => Target::Fixed12,
            (Weights::Stored | Weights::Dfloat11, Encoding::Dfloat11) if decodes_in_place(linear) => {
                Target::Unit
            }
            (Weights::Fixed12, _) if linear.dtype() == Dtype::BF16 => Target::Fixed12,
            _ => Target::Plain,
        })
    }

    fn group(&mut self, group: &[&Linear]) -> Result<Vec<GpuLinear>> {
        let targets = group.iter().map(|linear| self.target(linear)).collect::<Result<Vec<_>>>()?;
        let all = |wanted: fn(&Target) -> bool| targets.iter().all(wanted);
        if all(|target| matches!(target, Target::Plain)) {
            return self.plain_group(group);
        }
        if all(|target| matches!(target, Target::Unit)) {
            let places = group.iter().map(|linear| self.place(linear)).collect::<Result<Vec<_>>>()?;
            return self.units_group(group, &places);
        }
        if all(|target| matches!(target, Target::Fixed12)) && stacks(group) {
            return Ok(vec![self.fixed12_stack(group)?]);
        }
        if all(|target| matches!(target, Target::Abq(_)))
            && targets.windows(2).all(|pair| pair[0] == pair[1])
            && stacks(group)
            && let Some(one) = self.abq_stack(group)?
        {
            return Ok(vec![one]);
        }
        if let Some(Target::Sparse24 { in_fixed12 }) = targets.first()
            && targets.windows(2).all(|pair| pair[0] == pair[1])
            && stacks(group)
        {
            return Ok(vec![self.sparse_stack(group, *in_fixed12)?]);
        }
        if let Some(Target::WithSums(lowrank)) = targets.first()
            && targets.windows(2).all(|pair| pair[0] == pair[1])
            && stacks(group)
            && let Some(one) = self.lowrank_stack(group, *lowrank)?
        {
            return Ok(vec![one]);
        }
        group
            .iter()
            .zip(&targets)
            .map(|(linear, target)| {
                let mut one = match target {
                    Target::Sparse24 { in_fixed12 } => self.sparse_stack(&[linear], *in_fixed12)?,
                    Target::WithSums(lowrank) => self
                        .lowrank_stack(&[linear], *lowrank)?
                        .ok_or_else(|| Error::Invalid(format!("{} was not loaded", linear.tensor())))?,
                    Target::Abq(_) => self
                        .abq_stack(&[linear])?
                        .ok_or_else(|| Error::Invalid(format!("{} was not loaded", linear.tensor())))?,
                    Target::Plain => self.plain_stack(&[linear])?,
                    Target::Unit => {
                        let (unit, first) = self.place(linear)?;
                        self.with(&[linear], Source::Dfloat11 { unit, first })?
                    }
                    Target::Fixed12 => self.fixed12_stack(&[linear])?,
                    Target::Fp8(scaled) => {
                        let unit = self.fp8(linear, scaled)?;
                        self.with(&[linear], Source::Dfloat11 { unit, first: 0 })?
                    }
                };
                one.whole = group.iter().map(|linear| linear.rows()).sum();
                if let Source::WithSums { base, sums, .. } = &mut one.source {
                    (base.whole, sums.whole) = (one.whole, one.whole);
                }
                Ok(one)
            })
            .collect()
    }

    fn plain_group(&self, group: &[&Linear]) -> Result<Vec<GpuLinear>> {
        let whole = group.iter().map(|linear| linear.rows()).sum();
        if stacks(group) && one_dtype(group) {
            return Ok(vec![self.plain_stack(group)?]);
        }
        group.iter().map(|linear| Ok(GpuLinear { whole, ..self.plain_stack(&[linear])? })).collect()
    }

    /// Plain matrices of one dtype, one below the other.
    fn plain_stack(&self, group: &[&Linear]) -> Result<GpuLinear> {
        let element = group.first().map_or(Element::Bf16, |linear| element(linear));
        let bytes: u64 = group.iter().map(|linear| plain_bytes(linear)).sum();
        let words = self.gpu.allocate(bytes as usize).map_err(device)?;
        let mut first = 0;
        for linear in group {
            let last = first + plain_bytes(linear) as usize;
            self.write_plain(linear, words.slice(first..last).map_err(device)?)?;
            first = last;
        }
        self.with(group, Source::Dense { words, element })
    }

    /// Copies a plain matrix to where it is to lie.
    pub(super) fn write_plain(&self, linear: &Linear, to: View<'_>) -> Result<()> {
        match element(linear) {
            Element::F32 => to.write(&padded(linear.cols(), &self.elements::<u32>(linear)?)),
            _ => to.write(&padded(linear.cols(), &self.elements::<u16>(linear)?)),
        }
        .map_err(device)
    }

    /// Matrices that lie in units: one, if each begins where the one before it ends.
    fn units_group(&self, group: &[&Linear], places: &[(usize, usize)]) -> Result<Vec<GpuLinear>> {
        let whole = group.iter().map(|linear| linear.rows()).sum();
        let one_after_the_other = places
            .windows(2)
            .zip(group)
            .all(|(pair, linear)| pair[1] == (pair[0].0, pair[0].1 + linear.rows() * linear.cols()));
        let source = |&(unit, first): &(usize, usize)| Source::Dfloat11 { unit, first };
        match places.first() {
            Some(first) if stacks(group) && one_after_the_other => Ok(vec![self.with(group, source(first))?]),
            _ => group
                .iter()
                .zip(places)
                .map(|(linear, place)| Ok(GpuLinear { whole, ..self.with(&[linear], source(place))? }))
                .collect(),
        }
    }

    /// A matrix that rows are gathered from: never a part of a unit, which would have to be decoded for a row.
    pub(super) fn table(&mut self, linear: &Linear) -> Result<GpuLinear> {
        match (self.weights, self.stored(linear)?) {
            (Weights::Dfloat11, _)
            | (
                _,
                Encoding::Dfloat11
                | Encoding::Abq(_)
                | Encoding::Foreign(_)
                | Encoding::Sparse24(_)
                | Encoding::Lowrank(_)
                | Encoding::Scaled(_),
            ) => self.plain_stack(&[linear]),
            _ => self.matrix(linear),
        }
    }

    /// Matrices of the same widths and groups; none where their zeros are of different kinds.
    fn abq_stack(&mut self, group: &[&Linear]) -> Result<Option<GpuLinear>> {
        let checkpoint = self.checkpoint;
        let mut parts = Vec::with_capacity(group.len());
        for linear in group {
            let info = checkpoint.tensor(linear.tensor())?;
            let encoding = checkpoint.unit_of(info)?.encoding();
            let Some(abq) = stays_abq(encoding, self.weights) else { return Ok(None) };
            parts.push(Codes::read(checkpoint, linear.tensor(), info, abq, linear.rows(), linear.cols())?);
        }
        let stored: Vec<_> = parts.iter().map(Codes::stored).collect();
        if stored.windows(2).any(|pair| discriminant(&pair[0].zero) != discriminant(&pair[1].zero)) {
            return Ok(None);
        }
        let source = if parts.first().is_some_and(|part| part.abq.activation_bits.is_some()) {
            let names: Vec<&str> = group.iter().map(|linear| linear.tensor()).collect();
            self.labels.push(names.join(", "));
            let matrix = integer::Matrix::stack(self.gpu, &stored).map_err(device)?;
            Source::Integers { matrix, label: self.labels.len() as u32 }
        } else {
            Source::Abq(abq::Matrix::stack(self.gpu, &stored).map_err(device)?)
        };
        Ok(Some(self.with(group, source)?))
    }

    fn stored(&self, linear: &Linear) -> Result<Encoding> {
        stored(self.checkpoint, linear)
    }

    fn with(&self, group: &[&Linear], source: Source) -> Result<GpuLinear> {
        let mut bias = Vec::new();
        let (mut rows, mut cols) = (0, 0);
        for linear in group {
            cols = linear.cols();
            rows += linear.rows();
            bias.extend_from_slice(linear.bias().unwrap_or_default());
        }
        let bias = if bias.is_empty() { None } else { Some(self.gpu.upload(&bias).map_err(device)?) };
        Ok(GpuLinear { rows, whole: rows, cols, source, bias })
    }

    /// A matrix's elements, which take as many bytes as `T`.
    fn elements<T: Pod>(&self, linear: &Linear) -> Result<Vec<T>> {
        let (rows, cols) = (linear.rows(), linear.cols());
        let mut words = vec![T::zeroed(); rows * cols];
        self.checkpoint.read(linear.tensor(), 0, bytemuck::cast_slice_mut(&mut words))?;
        if !linear.is_transposed() {
            return Ok(words);
        }
        let row = |row: usize| words.iter().copied().skip(row).step_by(rows);
        Ok((0..rows).flat_map(row).collect())
    }

    fn upload(&mut self, components: &Components<'_>) -> Result<usize> {
        self.units.push(Unit::upload(self.gpu, components).map_err(device)?);
        Ok(self.units.len() - 1)
    }

    /// Whether matrices lie in one unit.
    pub(super) fn share_unit<'l>(&self, linears: impl Iterator<Item = &'l &'l Linear>) -> Result<bool> {
        let mut unit = None;
        for linear in linears {
            let own = match self.made.get(linear.tensor()) {
                Some((unit, _)) => unit.to_string(),
                None => self.checkpoint.tensor(linear.tensor())?.unit.clone(),
            };
            if *unit.get_or_insert_with(|| own.clone()) != own {
                return Ok(false);
            }
        }
        Ok(unit.is_some())
    }

    /// The unit that a matrix lies in, and where it begins there.
    pub(super) fn place(&mut self, linear: &Linear) -> Result<(usize, usize)> {
        match self.made.get(linear.tensor()) {
            Some(place) => Ok(*place),
            None => self.stored_unit(linear),
        }
    }

    /// The unit that a matrix is stored in, and where it begins there.
    fn stored_unit(&mut self, linear: &Linear) -> Result<(usize, usize)> {
        let checkpoint = self.checkpoint;
        let info = checkpoint.tensor(linear.tensor())?;
        let (name, unit) = (&info.unit, checkpoint.unit_of(info)?);
        let before = unit.parts().iter().take_while(|part| part.name != linear.tensor());
        let first = before.map(|part| part.shape.iter().product::<u64>()).sum::<u64>() as usize;
        if let Some(index) = self.by_name.get(name) {
            return Ok((*index, first));
        }
        let view = |component| checkpoint.view(name, component);
        let positions: Vec<u32> = bytemuck::pod_collect_to_vec(view(OUTPUT_POSITIONS)?);
        let index = self.upload(&Components {
            luts: view(LUTS)?,
            encoded_exponent: view(ENCODED_EXPONENT)?,
            sign_mantissa: view(SIGN_MANTISSA)?,
            output_positions: &positions,
            gaps: view(GAPS)?,
        })?;
        self.by_name.insert(name.clone(), index);
        Ok((index, first))
    }

    /// The unit that an FP8 matrix becomes.
    fn fp8(&mut self, linear: &Linear, scaled: &Scaled) -> Result<usize> {
        let checkpoint = self.checkpoint;
        let name = &checkpoint.tensor(linear.tensor())?.unit;
        let view = |component| checkpoint.view(name, &format!("{ELEMENTS}.{component}"));
        let positions: Vec<u32> = bytemuck::pod_collect_to_vec(view(OUTPUT_POSITIONS)?);
        let components = Components {
            luts: view(LUTS)?,
            encoded_exponent: view(ENCODED_EXPONENT)?,
            sign_mantissa: view(SIGN_MANTISSA)?,
            output_positions: &positions,
            gaps: view(GAPS)?,
        };
        let scales = Scales {
            values: &checkpoint.scales(linear.tensor())?,
            rows: linear.rows(),
            cols: linear.cols(),
            block: scaled.block.map(|side| usize::try_from(side).unwrap_or(usize::MAX)),
        };
        let unit = Unit::upload_fp8(self.gpu, &components, &scales);
        self.units.push(unit.map_err(|e| match device(e) {
            Error::Invalid(what) => Error::Invalid(format!("tensor {}: {what}", linear.tensor())),
            other => other,
        })?);
        Ok(self.units.len() - 1)
    }

    /// Matrices of two in four, one below the other.
    fn sparse_stack(&self, group: &[&Linear], in_fixed12: bool) -> Result<GpuLinear> {
        let cols = group.first().map_or(0, |linear| linear.cols());
        let all = |linear: &&Linear| self.checkpoint.sparse_rows(linear.tensor(), 0..linear.rows() as u64);
        let packed = group.iter().map(all).collect::<Result<Vec<_>>>()?;
        let packed: Vec<&Packed<'_>> = packed.iter().collect();
        self.with(group, self.sparse_source(cols, &packed, in_fixed12)?)
    }

    fn sparse_source(&self, cols: usize, packed: &[&Packed<'_>], in_fixed12: bool) -> Result<Source> {
        let mut parts = Vec::with_capacity(packed.len());
        for packed in packed {
            let Kept::Plain(values) = packed.values() else {
                return Err(Error::Invalid(
                    "kept values that are codes are not multiplied on a GPU".to_owned(),
                ));
            };
            let values = bytemuck::pod_collect_to_vec::<u8, u16>(values.bytes()).into();
            parts.push(sparse24::Part { rows: packed.rows(), values, positions: packed.positions() });
        }
        Ok(Source::Sparse24(sparse24::Matrix::stack(self.gpu, cols, &parts, in_fixed12).map_err(device)?))
    }

    /// Matrices with sums, one below the other; none where their sums are not alike.
    fn lowrank_stack(&self, group: &[&Linear], lowrank: Lowrank) -> Result<Option<GpuLinear>> {
        let cols = group.first().map_or(0, |linear| linear.cols());
        let all = |linear: &&Linear| self.checkpoint.lowrank_rows(linear.tensor(), 0..linear.rows() as u64);
        let packed = group.iter().map(all).collect::<Result<Vec<_>>>()?;
        let Some(sums) = self.sums(&packed, lowrank.blocks(cols as u64) as usize)? else { return Ok(None) };
        let base = match lowrank.base {
            Base::Sparse24(_) => {
                let bases: Vec<&Packed<'_>> = packed
                    .iter()
                    .filter_map(|packed| match packed.base() {
                        BaseRows::Sparse24(base) => Some(base),
                        BaseRows::Raw(_) => None,
                    })
                    .collect();
                self.sparse_source(
                    cols,
                    &bases,
                    matches!(lowrank.base, Base::Sparse24(s) if s.values.is_some()),
                )?
            }
            Base::Raw => {
                let words: Vec<u16> = packed
                    .iter()
                    .filter_map(|packed| match packed.base() {
                        BaseRows::Raw(base) => Some(bytemuck::pod_collect_to_vec::<u8, u16>(base.bytes())),
                        BaseRows::Sparse24(_) => None,
                    })
                    .flatten()
                    .collect();
                let rows = group.iter().map(|linear| linear.rows()).sum();
                let words = dense::upload(self.gpu, rows, cols, &words).map_err(device)?;
                Source::Dense { words, element: Element::Bf16 }
            }
        };
        // The bias is a part of the whole.
        let whole = self.with(group, base)?;
        let (rows, bias, block) = (whole.rows, whole.bias, lowrank.block as usize);
        let base = Box::new(GpuLinear { bias: None, ..whole });
        let source = Source::WithSums { base, sums: Box::new(sums), block };
        Ok(Some(GpuLinear { rows, whole: rows, cols, source, bias }))
    }

    /// The sums of matrices, one below the other: plain ones of one dtype, or codes of the same widths and groups.
    fn sums(&self, packed: &[WithSums<'_>], blocks: usize) -> Result<Option<GpuLinear>> {
        let rows = packed.iter().map(WithSums::rows).sum();
        let (mut codes, mut plain) = (Vec::new(), Vec::new());
        for packed in packed {
            match packed.sums() {
                Sums::Plain(sums) => plain.push(sums),
                Sums::Abq(sums) => codes.push(Codes::of(sums.clone())),
            }
        }
        let source = match (&plain[..], &codes[..]) {
            ([first, rest @ ..], []) if rest.iter().all(|sums| sums.dtype() == first.dtype()) => {
                let bytes: Vec<u8> = plain.iter().flat_map(|sums| sums.bytes()).copied().collect();
                let upload = |element| {
                    let words = match element {
                        Element::F32 => {
                            let words: Vec<u32> = bytemuck::pod_collect_to_vec(&bytes);
                            dense::upload(self.gpu, rows, blocks, &words)
                        }
                        _ => {
                            let words: Vec<u16> = bytemuck::pod_collect_to_vec(&bytes);
                            dense::upload(self.gpu, rows, blocks, &words)
                        }
                    };
                    Ok::<_, Error>(Source::Dense { words: words.map_err(device)?, element })
                };
                upload(match first.dtype() {
                    Dtype::F32 => Element::F32,
                    Dtype::F16 => Element::F16,
                    _ => Element::Bf16,
                })?
            }
            ([], [_, ..]) => {
                let stored: Vec<_> = codes.iter().map(Codes::stored).collect();
                if stored.windows(2).any(|pair| discriminant(&pair[0].zero) != discriminant(&pair[1].zero)) {
                    return Ok(None);
                }
                Source::Abq(abq::Matrix::stack(self.gpu, &stored).map_err(device)?)
            }
            _ => return Ok(None),
        };
        Ok(Some(GpuLinear { rows, whole: rows, cols: blocks, source, bias: None }))
    }

    fn fixed12_stack(&self, group: &[&Linear]) -> Result<GpuLinear> {
        let cols = group.first().map_or(0, |linear| linear.cols());
        let parts = group.iter().map(|linear| self.fixed12(linear)).collect::<Result<Vec<_>>>()?;
        let parts: Vec<Part<'_>> = parts.iter().map(Fixed12::part).collect();
        let matrix = Matrix::stack(self.gpu, cols, &parts).map_err(device)?;
        self.with(group, Source::Fixed12(matrix))
    }

    /// A BF16 matrix in fixed12: as it is stored, or encoded.
    pub(super) fn fixed12(&self, linear: &Linear) -> Result<Fixed12<'a>> {
        if let Encoding::Fixed12 { base } = self.stored(linear)? {
            return self.stored_fixed12(linear, base);
        }
        let words = self.elements::<u16>(linear)?;
        Ok(Fixed12::Made(Encoded::new(linear.rows(), linear.cols(), &words).map_err(device)?))
    }

    fn stored_fixed12(&self, linear: &Linear, base: i16) -> Result<Fixed12<'a>> {
        use encoding::fixed12::{CODES, ESCAPE_EXPONENTS, ESCAPE_OFFSETS, ESCAPE_POSITIONS, SIGN_MANTISSA};
        let checkpoint = self.checkpoint;
        let name = &checkpoint.tensor(linear.tensor())?.unit;
        let view = |component| checkpoint.view(name, component);
        Ok(Fixed12::Stored {
            rows: linear.rows(),
            base,
            sign_mantissa: view(SIGN_MANTISSA)?,
            codes: view(CODES)?,
            escape_offsets: bytemuck::pod_collect_to_vec(view(ESCAPE_OFFSETS)?),
            escape_positions: bytemuck::pod_collect_to_vec(view(ESCAPE_POSITIONS)?),
            escape_exponents: view(ESCAPE_EXPONENTS)?,
        })
    }
}

/// What a matrix becomes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Target {
    Plain,
    Abq(Abq),
    Unit,
    Fixed12,
    Fp8(Scaled),
    Sparse24 { in_fixed12: bool },
    WithSums(Lowrank),
}

/// How a matrix is stored. What an edit made zero is not what its unit stores: its elements are read.
pub(super) fn stored(checkpoint: &Checkpoint, linear: &Linear) -> Result<Encoding> {
    let info = checkpoint.tensor(linear.tensor())?;
    Ok(if info.is_zero() || linear.is_transposed() {
        Encoding::Raw
    } else {
        checkpoint.unit_of(info)?.encoding().clone()
    })
}

/// Whether products run from a matrix's codes: always where activations are quantised, since that is a part of the model.
pub(super) fn stays_abq(encoding: &Encoding, weights: Weights) -> Option<Abq> {
    match encoding {
        Encoding::Abq(abq) if weights == Weights::Stored || abq.activation_bits.is_some() => Some(*abq),
        // Others of other tools are decoded once.
        Encoding::Foreign(foreign) if foreign.activation_bits.is_some() => foreign.abq().ok(),
        _ => None,
    }
}

/// Whether FP8 weights stay in DFloat11's stream, decoded to BF16 for each product: then how they are scaled.
pub(super) fn stays_fp8(
    checkpoint: &Checkpoint,
    linear: &Linear,
    weights: Weights,
) -> Result<Option<Scaled>> {
    let info = checkpoint.tensor(linear.tensor())?;
    if weights != Weights::Stored || !info.is_stored() || !decodes_in_place(linear) || linear.is_transposed()
    {
        return Ok(None);
    }
    let unit = checkpoint.unit_of(info)?;
    Ok(match unit.encoding() {
        Encoding::Scaled(scaled)
            if unit.encoding_within(ELEMENTS) == Some(&Encoding::Dfloat8)
                && !scaled.transposed
                && info.shape.len() == 2
                && Scales::in_eights(linear.cols(), scaled.block.map(|side| side as usize)) =>
        {
            Some(*scaled)
        }
        _ => None,
    })
}

/// Whether products run from two in four, and then whether kept values lie in fixed12: of BF16 matrices whose kept values are no codes.
pub(super) fn stays_sparse(encoding: &Encoding, weights: Weights, linear: &Linear) -> Option<bool> {
    let Encoding::Sparse24(sparse) = encoding else { return None };
    match sparse.values {
        _ if weights != Weights::Stored || linear.dtype() != Dtype::BF16 => None,
        None => Some(false),
        Some(Inner::Fixed12 { .. }) => Some(true),
        Some(Inner::Abq(_)) => None,
    }
}

/// Whether products run from a base and sums: of BF16 matrices whose base is no codes.
pub(super) fn stays_lowrank(encoding: &Encoding, weights: Weights, linear: &Linear) -> Option<Lowrank> {
    let Encoding::Lowrank(lowrank) = encoding else { return None };
    let base = match lowrank.base {
        Base::Raw => true,
        Base::Sparse24(sparse) => sparse.abq().is_none(),
    };
    (base && weights == Weights::Stored && linear.dtype() == Dtype::BF16).then_some(*lowrank)
}

/// What a matrix is made of, plain.
pub(super) fn element(linear: &Linear) -> Element {
    match linear.dtype() {
        Dtype::F32 => Element::F32,
        Dtype::F16 => Element::F16,
        // A model opens from no other.
        _ => Element::Bf16,
    }
}

/// Bytes of a plain matrix in a GPU's memory.
pub(super) fn plain_bytes(linear: &Linear) -> u64 {
    element(linear).bytes() as u64 * linear.rows() as u64 * row_stride(linear.cols()) as u64
}

/// Whether products read a matrix where a unit is decoded to: its rows begin at multiples of 16 bytes there.
pub(super) fn decodes_in_place(linear: &Linear) -> bool {
    linear.dtype() == Dtype::BF16 && row_stride(linear.cols()) == linear.cols()
}

/// Whether matrices are of one dtype.
pub(super) fn one_dtype(group: &[&Linear]) -> bool {
    group.windows(2).all(|pair| pair[0].dtype() == pair[1].dtype())
}

/// Whether matrices can lie one below the other: whole strips of 16 rows, and all or none have a bias.
pub(super) fn stacks(group: &[&Linear]) -> bool {
    let whole = group.split_last().is_none_or(|(_, above)| above.iter().all(|l| l.rows().is_multiple_of(16)));
    let cols = group.windows(2).all(|pair| pair[0].cols() == pair[1].cols());
    let biases = group.windows(2).all(|pair| pair[0].bias().is_some() == pair[1].bias().is_some());
    whole && cols && biases
}

/// A matrix in fixed12 on its way to the device.
pub(super) enum Fixed12<'a> {
    Stored {
        rows: usize,
        base: i16,
        sign_mantissa: &'a [u8],
        codes: &'a [u8],
        escape_offsets: Vec<u32>,
        escape_positions: Vec<u16>,
        escape_exponents: &'a [u8],
    },
    Made(Encoded),
}

impl Fixed12<'_> {
    pub(super) fn part(&self) -> Part<'_> {
        match self {
            Self::Made(encoded) => encoded.part(),
            Self::Stored {
                rows,
                base,
                sign_mantissa,
                codes,
                escape_offsets,
                escape_positions,
                escape_exponents,
            } => Part {
                rows: *rows,
                base: *base,
                strips: fixed12::StripsRef {
                    sign_mantissa,
                    codes,
                    escape_offsets,
                    escape_positions,
                    escape_exponents,
                },
            },
        }
    }
}
