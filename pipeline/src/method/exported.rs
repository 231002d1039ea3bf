//! Quantised matrices in the layouts of other tools: the same codes, scales and zero points in other places.
//!
//! ```text
//! abq: planes, scale, zero --> compressed-tensors or GPTQ     decoded again and compared like every other unit
//! ```

use std::collections::BTreeMap;

use llmpress_formats::encoding::abq::{Abq, Packed, Zero, matrix};
use llmpress_formats::encoding::{ComponentSpec, Encoding};
use llmpress_formats::foreign::{self, Foreign, Layout, bit_stream};
use llmpress_formats::{Dtype, Tensor, Unit};

use super::kept::decoded_digests;
use super::room::{Coding, Encoder, Fit, Room, SizedEncoder, Survey};
use crate::sink::{Encoded, Sink, Slots};
use crate::source::UnitSource;
use crate::work::Work;
use crate::{Error, Result};

/// Decoded ranges begin and end on whole elements of any dtype.
const STEP: usize = 16;

/// A layout as a way of storing.
pub(crate) struct Exported(pub(crate) Layout);

impl Room for Exported {
    fn name(&self) -> &'static str {
        match self.0 {
            Layout::IntQuantized => "intquantized",
            Layout::Gptq { .. } => "gptq",
            _ => "packquantized",
        }
    }

    fn fit(&self, _tensor: &Tensor) -> Fit {
        Fit::Suits
    }

    fn expected_bytes(&self, _tensor: Option<&Tensor>, bytes: u64) -> u64 {
        bytes
    }

    fn components(&self) -> &'static [&'static str] {
        &[]
    }

    fn indivisible_bytes(&self, tensor: &Tensor) -> u64 {
        // The transposed layout is written from all codes.
        if matches!(self.0, Layout::Gptq { .. }) { tensor.bytes } else { 0 }
    }

    fn survey(&self, unit: &UnitSource<'_>, first: &Tensor, _work: Work<'_>) -> Result<Survey> {
        let stored = unit.checkpoint().unit_of(first)?;
        let target = Target::new(self.0, stored, first)
            .map_err(|why| Error::Invalid(format!("tensor {}: {why}", first.unit)))?;
        let spec = target.spec();
        Ok(Ok(Coding {
            encoding: Encoding::Foreign(target.foreign),
            spec,
            step: STEP,
            encoder: Encoder::Sized(Box::new(target)),
            fallback: None,
        }))
    }
}

/// What a matrix becomes.
pub(crate) struct Target {
    pub(crate) foreign: Foreign,
    rows: u64,
    cols: u64,
    dtype: Dtype,
    /// Is added to each code: a balanced grid lies in the middle of one that is a bit wider.
    shift: u8,
}

impl Target {
    /// How a quantised matrix is said in a layout, or why it cannot be.
    pub(crate) fn new(layout: Layout, unit: &Unit, tensor: &Tensor) -> Result<Self, String> {
        let Encoding::Abq(abq) = *unit.encoding() else {
            return Err("is not stored as abq".to_owned());
        };
        let (rows, cols) = matrix(&tensor.shape).ok_or("is no matrix")?;
        if tensor.shape.len() != 2 {
            return Err(format!("has {} dimensions, and the layout has matrices", tensor.shape.len()));
        }
        let component = |name: &str| unit.components().get(name);
        if component(llmpress_formats::encoding::abq::OFFSET).is_some() {
            return Err("has real zero points, which other formats cannot say: quantise with `int` or `symmetric` zero \
                        points (as in gptq:w4,g128,symmetric)"
                .to_owned());
        }
        let scale = component(llmpress_formats::encoding::abq::SCALE).map(|scale| scale.dtype());
        if scale != Some(tensor.dtype) {
            return Err(format!(
                "has scales in {} where the layout has them in the dtype of the model, {}: quantise again with `int` or \
                 `symmetric` zero points",
                scale.map_or("none", |dtype| dtype.name()),
                tensor.dtype.name()
            ));
        }
        let zeros = component(llmpress_formats::encoding::abq::ZERO).is_some();
        let group_size = abq.group_size.filter(|size| u64::from(*size) < cols);
        if let Some(size) = group_size.filter(|size| !cols.is_multiple_of(u64::from(*size))) {
            return Err(format!(
                "has a last group of {} columns after groups of {size}, which the layout cannot say",
                cols % u64::from(size)
            ));
        }
        let bits = abq.bits + u8::from(abq.balanced);
        if matches!(layout, Layout::Gptq { .. }) {
            gptq_holds(&abq, rows, cols, bits)?;
        }
        let foreign = Foreign {
            layout,
            bits,
            group_size,
            zeros: zeros || matches!(layout, Layout::Gptq { .. }),
            scattered: false,
            activation_bits: abq.activation_bits,
        };
        // The middle of the wider grid is 2^bits, that of the balanced one 2^(bits - 1).
        let shift = if abq.balanced { abq.centre() } else { 0 };
        if abq.balanced && zeros {
            return Err("is balanced and has zero points, which no layout says".to_owned());
        }
        Ok(Self { foreign, rows, cols, dtype: tensor.dtype, shift })
    }

    /// Bytes of its components.
    pub(crate) fn bytes(&self) -> u64 {
        self.spec().iter().filter_map(|c| c.dtype.byte_len(&c.shape)).fold(0, u64::saturating_add)
    }

    fn groups(&self) -> u64 {
        self.foreign.group_size.map_or(1, |size| self.cols.div_ceil(u64::from(size)))
    }

    fn spec(&self) -> Vec<ComponentSpec> {
        let (rows, cols, groups, bits) = (self.rows, self.cols, self.groups(), self.foreign.bits);
        let words = |count: u64| bit_stream::words(count, bits).unwrap_or(u64::MAX);
        let spec = |name, dtype, shape: &[u64]| ComponentSpec { name, dtype, shape: shape.to_vec() };
        let mut all = match self.foreign.layout {
            Layout::Gptq { .. } => {
                return vec![
                    spec(foreign::CODES, Dtype::I32, &[words(cols), rows]),
                    spec(foreign::SCALES, self.dtype, &[groups, rows]),
                    spec(foreign::ZEROS, Dtype::I32, &[groups, words(rows)]),
                    spec(foreign::GROUP_INDEX, Dtype::I32, &[cols]),
                ];
            }
            Layout::IntQuantized => vec![
                spec(foreign::CODES, Dtype::I8, &[rows, cols]),
                spec(foreign::SCALES, self.dtype, &[rows, groups]),
            ],
            _ => vec![
                spec(foreign::CODES, Dtype::I32, &[rows, words(cols)]),
                spec(foreign::SCALES, self.dtype, &[rows, groups]),
                spec(foreign::SHAPE, Dtype::I64, &[2]),
            ],
        };
        if self.foreign.zeros {
            all.push(match self.foreign.layout {
                Layout::IntQuantized => spec(foreign::ZEROS, Dtype::I8, &[rows, groups]),
                _ => spec(foreign::ZEROS, Dtype::I32, &[words(rows), groups]),
            });
        }
        all
    }

    /// The codes of a row of a strip, as the layout counts them.
    fn codes(&self, packed: &Packed<'_>, row: usize, out: &mut [u8]) {
        packed.codes(row, out);
        out.iter_mut().for_each(|code| *code += self.shift);
    }

    /// The zero points of a strip, row by row, as the layout counts them.
    fn zeros(&self, packed: &Packed<'_>) -> Vec<u8> {
        match packed.zero() {
            Zero::Integer(zeros) => zeros.to_vec(),
            _ => vec![1 << (self.foreign.bits - 1); packed.rows() * packed.groups()],
        }
    }

    /// Rows after rows.
    fn by_rows(&self, unit: &UnitSource<'_>, slots: &mut Slots, work: Work<'_>) -> Result<Vec<Sink>> {
        let name = unit.first_name();
        let cols = self.cols as usize;
        let mut codes = Sink::take(slots, foreign::CODES, work)?;
        let mut scales = Sink::take(slots, foreign::SCALES, work)?;
        let mut zeros = Vec::new();
        let mut row_codes = vec![0; cols];
        let mut words = vec![0u32; bit_stream::words(self.cols, self.foreign.bits).unwrap_or(0) as usize];
        let step = (work.piece_bytes / cols.max(1)).max(1) as u64;
        for first in (0..self.rows).step_by(step as usize) {
            let packed = unit.checkpoint().packed_rows(name, first..(first + step).min(self.rows))?;
            for row in 0..packed.rows() {
                self.codes(&packed, row, &mut row_codes);
                if self.foreign.layout == Layout::IntQuantized {
                    row_codes.iter_mut().for_each(|code| *code = code.wrapping_sub(128));
                    codes.append(&row_codes)?;
                } else {
                    bit_stream::pack(&row_codes, self.foreign.bits, &mut words);
                    codes.append(bytemuck::cast_slice(&words))?;
                }
            }
            scales.append(packed.scale().bytes())?;
            zeros.extend(self.zeros(&packed));
        }
        let mut sinks = vec![codes, scales];
        if self.foreign.zeros {
            let mut sink = Sink::take(slots, foreign::ZEROS, work)?;
            if self.foreign.layout == Layout::IntQuantized {
                zeros.iter_mut().for_each(|zero| *zero = zero.wrapping_sub(128));
                sink.append(&zeros)?;
            } else {
                // A stream down each column of groups.
                let groups = self.groups() as usize;
                let mut words =
                    vec![0u32; bit_stream::words(self.rows, self.foreign.bits).unwrap_or(0) as usize];
                let mut all = vec![0u32; words.len() * groups];
                for group in 0..groups {
                    let column: Vec<u8> = zeros.iter().skip(group).step_by(groups).copied().collect();
                    bit_stream::pack(&column, self.foreign.bits, &mut words);
                    all.iter_mut().skip(group).step_by(groups).zip(&words).for_each(|(to, word)| *to = *word);
                }
                sink.append(bytemuck::cast_slice(&all))?;
            }
            sinks.push(sink);
        }
        if self.foreign.layout != Layout::IntQuantized {
            let mut shape = Sink::take(slots, foreign::SHAPE, work)?;
            shape.append(bytemuck::cast_slice(&[self.rows, self.cols]))?;
            sinks.push(shape);
        }
        Ok(sinks)
    }

    /// The transposed layout.
    fn transposed(&self, unit: &UnitSource<'_>, slots: &mut Slots, work: Work<'_>) -> Result<Vec<Sink>> {
        let packed = unit.checkpoint().packed_rows(unit.first_name(), 0..self.rows)?;
        let (rows, cols, groups) = (self.rows as usize, self.cols as usize, self.groups() as usize);
        let bits = self.foreign.bits;
        let width = bit_stream::words(self.cols, bits).unwrap_or(0) as usize;
        let mut codes = Sink::take(slots, foreign::CODES, work)?;
        let mut row_codes = vec![0; cols];
        let mut words = vec![0u32; width * rows];
        let mut row_words = vec![0u32; width];
        for row in 0..rows {
            self.codes(&packed, row, &mut row_codes);
            bit_stream::pack(&row_codes, bits, &mut row_words);
            words.iter_mut().skip(row).step_by(rows).zip(&row_words).for_each(|(to, word)| *to = *word);
        }
        codes.append(bytemuck::cast_slice(&words))?;
        let mut scales = Sink::take(slots, foreign::SCALES, work)?;
        let of_scale = self.dtype.bits() as usize / 8;
        for group in 0..groups {
            let column = packed.scale().bytes().chunks_exact(of_scale).skip(group).step_by(groups);
            scales.append(&column.flatten().copied().collect::<Vec<u8>>())?;
        }
        let mut zeros = Sink::take(slots, foreign::ZEROS, work)?;
        let all = self.zeros(&packed);
        let mut line = vec![0u32; bit_stream::words(self.rows, bits).unwrap_or(0) as usize];
        for group in 0..groups {
            let stored = all.iter().skip(group).step_by(groups).map(|zero| zero.checked_sub(1));
            let stored = stored.collect::<Option<Vec<u8>>>().ok_or_else(|| {
                Error::Invalid(format!(
                    "tensor {}: a zero point is 0, which GPTQ cannot say: quantise with `symmetric` zero points, or export \
                     as compressed-tensors",
                    unit.first_name()
                ))
            })?;
            bit_stream::pack(&stored, bits, &mut line);
            zeros.append(bytemuck::cast_slice(&line))?;
        }
        let mut index = Sink::take(slots, foreign::GROUP_INDEX, work)?;
        let step = self.foreign.group_size.map_or(cols, |size| size as usize);
        index.append(bytemuck::cast_slice(&(0..cols).map(|k| (k / step) as u32).collect::<Vec<u32>>()))?;
        Ok(vec![codes, scales, zeros, index])
    }
}

/// What GPTQ's layout asks of a matrix.
fn gptq_holds(abq: &Abq, rows: u64, cols: u64, bits: u8) -> Result<(), String> {
    if let Some(activations) = abq.activation_bits {
        return Err(format!(
            "quantises what it multiplies to {activations} bits, which GPTQ cannot say: export as compressed-tensors"
        ));
    }
    if ![2, 3, 4, 8].contains(&bits) {
        return Err(format!("has codes of {bits} bits; GPTQ has 2, 3, 4 and 8"));
    }
    if !cols.is_multiple_of(32) || !rows.is_multiple_of(32) {
        return Err(format!("is {rows} x {cols}, and GPTQ has multiples of 32"));
    }
    Ok(())
}

impl SizedEncoder for Target {
    fn encode(&self, unit: &UnitSource<'_>, mut slots: Slots, work: Work<'_>) -> Result<Encoded> {
        let sinks = match self.foreign.layout {
            Layout::Gptq { .. } => self.transposed(unit, &mut slots, work)?,
            _ => self.by_rows(unit, &mut slots, work)?,
        };
        let mut components = BTreeMap::new();
        for sink in sinks {
            sink.finish(&mut components)?;
        }
        Ok(Encoded { tensors: decoded_digests(unit, work)?, components })
    }
}
