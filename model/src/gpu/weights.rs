//! Weights in a GPU's memory: as they are stored, or encoded anew when they are loaded.
//!
//! ```text
//! plain BF16   [rows, cols]           multiplied as it is
//! fixed12      tiles                  multiplied as it is
//! DFloat11     units of some tensors  decoded into one scratch buffer when a layer begins
//! ```

use std::collections::HashMap;

use llmpress_entropy::{dfloat11, fixed12};
use llmpress_formats::{Checkpoint, Dtype, Encoding, Error, Result, encoding};
use llmpress_kernels::gpu::dfloat11::{Components, Unit};
use llmpress_kernels::gpu::fixed12::Matrix;
use llmpress_kernels::gpu::{Buffer, Gpu};

use super::device;
use crate::linear::Linear;

/// How weights lie in a GPU's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GpuWeights {
    /// DFloat11 and fixed12 as they are stored, every other encoding as plain BF16.
    #[default]
    Stored,
    /// Plain BF16.
    Bf16,
    /// DFloat11, a unit a layer, decoded when tokens are read.
    Dfloat11,
    /// fixed12, multiplied as it is.
    Fixed12,
}

/// A matrix of `rows` x `cols` weights.
#[derive(Debug)]
pub(super) struct GpuLinear {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) source: Source,
    pub(super) bias: Option<Buffer>,
}

/// Where the weights are.
#[derive(Debug)]
pub(super) enum Source {
    Dense(Buffer),
    Fixed12(Matrix),
    /// Elements from `first` on of a decoded unit.
    Dfloat11 {
        unit: usize,
        first: usize,
    },
}

/// Loads matrices, and keeps the units that they share.
pub(super) struct Loader<'a> {
    gpu: &'a Gpu,
    checkpoint: &'a Checkpoint,
    weights: GpuWeights,
    units: Vec<Unit>,
    by_name: HashMap<String, usize>,
}

impl<'a> Loader<'a> {
    pub(super) fn new(gpu: &'a Gpu, checkpoint: &'a Checkpoint, weights: GpuWeights) -> Self {
        Self { gpu, checkpoint, weights, units: Vec::new(), by_name: HashMap::new() }
    }

    /// The units that matrices lie in.
    pub(super) fn units(self) -> Vec<Unit> {
        self.units
    }

    /// The matrices of a layer: those that become DFloat11 share a unit.
    pub(super) fn layer(&mut self, linears: &[&Linear]) -> Result<Vec<GpuLinear>> {
        let mut stored = true;
        for linear in linears {
            stored &= matches!(self.stored(linear)?, Encoding::Dfloat11);
        }
        if self.weights != GpuWeights::Dfloat11 || stored {
            return linears.iter().map(|linear| self.matrix(linear)).collect();
        }
        let (mut words, mut firsts) = (Vec::new(), Vec::new());
        for linear in linears {
            firsts.push(words.len());
            words.extend(self.words(linear)?);
        }
        // What the format cannot hold stays plain, as it does on disk.
        let Ok(encoded) = dfloat11::encode(&words) else {
            return linears.iter().map(|linear| self.plain(linear)).collect();
        };
        let positions: Vec<u32> = bytemuck::pod_collect_to_vec(&encoded.output_positions);
        let unit = self.upload(&Components {
            luts: &encoded.luts,
            encoded_exponent: &encoded.encoded_exponent,
            sign_mantissa: &encoded.sign_mantissa,
            output_positions: &positions,
            gaps: &encoded.gaps,
        })?;
        let sources = firsts.into_iter().map(|first| Source::Dfloat11 { unit, first });
        linears.iter().zip(sources).map(|(linear, source)| self.with(linear, source)).collect()
    }

    /// A matrix by itself.
    pub(super) fn matrix(&mut self, linear: &Linear) -> Result<GpuLinear> {
        let unit = self.checkpoint.tensor(linear.tensor())?.unit.clone();
        match (self.weights, self.stored(linear)?) {
            (GpuWeights::Stored | GpuWeights::Fixed12, Encoding::Fixed12 { base }) => {
                self.stored_fixed12(linear, &unit, base)
            }
            (GpuWeights::Stored | GpuWeights::Dfloat11, Encoding::Dfloat11) => {
                self.stored_unit(linear, &unit)
            }
            (GpuWeights::Fixed12, _) => self.encoded_fixed12(linear),
            _ => self.plain(linear),
        }
    }

    /// A matrix that rows are gathered from: never a part of a unit, which would have to be decoded for a row.
    pub(super) fn table(&mut self, linear: &Linear) -> Result<GpuLinear> {
        match (self.weights, self.stored(linear)?) {
            (GpuWeights::Dfloat11, _) | (_, Encoding::Dfloat11) => self.plain(linear),
            _ => self.matrix(linear),
        }
    }

    fn stored(&self, linear: &Linear) -> Result<Encoding> {
        let info = self.checkpoint.tensor(linear.tensor())?;
        Ok(self.checkpoint.unit_of(info)?.encoding().clone())
    }

    fn plain(&self, linear: &Linear) -> Result<GpuLinear> {
        let words = self.words(linear)?;
        self.with(linear, Source::Dense(self.gpu.upload(&words).map_err(device)?))
    }

    fn with(&self, linear: &Linear, source: Source) -> Result<GpuLinear> {
        let (rows, cols) = (linear.rows(), linear.cols());
        if !cols.is_multiple_of(8) {
            return Err(Error::unsupported(
                self.checkpoint.root(),
                Some(linear.tensor()),
                format!("has {cols} columns; products on a GPU take multiples of 8: leave out --device cuda"),
            ));
        }
        let bias = linear.bias().map(|bias| self.gpu.upload(bias).map_err(device)).transpose()?;
        Ok(GpuLinear { rows, cols, source, bias })
    }

    /// A matrix's words. Products on a GPU take BF16 only.
    fn words(&self, linear: &Linear) -> Result<Vec<u16>> {
        let info = self.checkpoint.tensor(linear.tensor())?;
        if info.dtype != Dtype::BF16 {
            return Err(Error::unsupported(
                self.checkpoint.root(),
                Some(linear.tensor()),
                format!(
                    "is {}; models run on a GPU from BF16 weights only: leave out --device cuda",
                    info.dtype.name()
                ),
            ));
        }
        let mut words = vec![0u16; linear.rows() * linear.cols()];
        self.checkpoint.read(linear.tensor(), 0, bytemuck::cast_slice_mut(&mut words))?;
        Ok(words)
    }

    fn upload(&mut self, components: &Components<'_>) -> Result<usize> {
        self.units.push(Unit::upload(self.gpu, components).map_err(device)?);
        Ok(self.units.len() - 1)
    }

    fn stored_unit(&mut self, linear: &Linear, name: &str) -> Result<GpuLinear> {
        use encoding::dfloat11::{ENCODED_EXPONENT, GAPS, LUTS, OUTPUT_POSITIONS, SIGN_MANTISSA};
        let checkpoint = self.checkpoint;
        let unit = checkpoint.unit_of(checkpoint.tensor(linear.tensor())?)?;
        let before = unit.parts().iter().take_while(|part| part.name != linear.tensor());
        let first = before.map(|part| part.shape.iter().product::<u64>()).sum::<u64>() as usize;
        let index = match self.by_name.get(name) {
            Some(index) => *index,
            None => {
                let view = |component| checkpoint.view(name, component);
                let positions: Vec<u32> = bytemuck::pod_collect_to_vec(view(OUTPUT_POSITIONS)?);
                let index = self.upload(&Components {
                    luts: view(LUTS)?,
                    encoded_exponent: view(ENCODED_EXPONENT)?,
                    sign_mantissa: view(SIGN_MANTISSA)?,
                    output_positions: &positions,
                    gaps: view(GAPS)?,
                })?;
                self.by_name.insert(name.to_owned(), index);
                index
            }
        };
        self.with(linear, Source::Dfloat11 { unit: index, first })
    }

    fn stored_fixed12(&self, linear: &Linear, name: &str, base: i16) -> Result<GpuLinear> {
        use encoding::fixed12::{CODES, ESCAPE_EXPONENTS, ESCAPE_OFFSETS, ESCAPE_POSITIONS, SIGN_MANTISSA};
        let view = |component| self.checkpoint.view(name, component);
        let (offsets, positions): (Vec<u32>, Vec<u16>) = (
            bytemuck::pod_collect_to_vec(view(ESCAPE_OFFSETS)?),
            bytemuck::pod_collect_to_vec(view(ESCAPE_POSITIONS)?),
        );
        let strips = fixed12::StripsRef {
            sign_mantissa: view(SIGN_MANTISSA)?,
            codes: view(CODES)?,
            escape_offsets: &offsets,
            escape_positions: &positions,
            escape_exponents: view(ESCAPE_EXPONENTS)?,
        };
        let matrix = Matrix::upload(self.gpu, linear.rows(), linear.cols(), base, &strips).map_err(device)?;
        self.with(linear, Source::Fixed12(matrix))
    }

    fn encoded_fixed12(&self, linear: &Linear) -> Result<GpuLinear> {
        let words = self.words(linear)?;
        let matrix = Matrix::encode(self.gpu, linear.rows(), linear.cols(), &words).map_err(device)?;
        self.with(linear, Source::Fixed12(matrix))
    }
}
