//! The stream of a unit's exponents, of BF16 and of FP8 weights.
//!
//! ```text
//! histogram of each piece --> code, layout, where each piece begins --> pieces --> assembler --> components
//! ```

use std::collections::BTreeMap;

use llmpress_entropy::{dfloat8, dfloat11};
use llmpress_formats::encoding::dfloat8 as names_of_fp8;
use llmpress_formats::encoding::dfloat11 as names;
use llmpress_formats::encoding::{ComponentSpec, Encoding};

use crate::Error;
use crate::Result;
use crate::method::room::{Coding, Encoder, SizedEncoder, Survey, would_not_shrink};
use crate::sink::{Encoded, Sink, Slots, SourceDigests};
use crate::source::UnitSource;
use crate::work::{Work, pieces};

/// Decoded ranges begin and end on whole elements of any dtype.
const STEP: usize = 16;

/// What the weights are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::method) enum Form {
    /// `dfloat11`: the words are the weights.
    Bf16,
    /// `dfloat8`: each byte makes a word, and half a byte is kept of it.
    Fp8,
}

impl Form {
    fn encoding(self) -> Encoding {
        match self {
            Self::Bf16 => Encoding::Dfloat11,
            Self::Fp8 => Encoding::Dfloat8,
        }
    }

    fn spec(self, layout: &dfloat11::Layout, luts_bytes: u64, tensors: u64) -> Vec<ComponentSpec> {
        match self {
            Self::Bf16 => names::components(layout, luts_bytes, tensors),
            Self::Fp8 => names_of_fp8::components(layout, luts_bytes),
        }
    }

    /// Bytes of a weight.
    fn width(self) -> u64 {
        match self {
            Self::Bf16 => 2,
            Self::Fp8 => 1,
        }
    }

    /// Pieces of a unit: an even number of weights each, whose words take as much as a piece may.
    fn pieces(self, unit: &UnitSource<'_>, work: Work<'_>) -> Vec<(u64, usize)> {
        let words = (work.piece_bytes / 2).max(2) & !1;
        pieces(unit.bytes(), words * self.width() as usize).collect()
    }

    /// Reads the words of some bytes, and these where they are not the words themselves.
    fn read(
        self,
        unit: &UnitSource<'_>,
        (offset, len): (u64, usize),
        words: &mut Vec<u16>,
        bytes: &mut Vec<u8>,
    ) -> Result<()> {
        match self {
            Self::Bf16 => {
                words.resize(len / 2, 0);
                unit.read(offset, bytemuck::cast_slice_mut(words))
            }
            Self::Fp8 => {
                bytes.resize(len, 0);
                unit.read(offset, bytes)?;
                dfloat8::widen(bytes, words);
                Ok(())
            }
        }
    }
}

/// Settles how a unit is stored.
pub(in crate::method) fn survey(form: Form, unit: &UnitSource<'_>, work: Work<'_>) -> Result<Survey> {
    let histograms = work.threads.map(
        form.pieces(unit, work),
        || (Vec::new(), Vec::new()),
        |(words, bytes), piece| {
            form.read(unit, piece, words, bytes)?;
            let mut histogram = dfloat11::Histogram::new();
            histogram.add(words);
            work.progress.advance(piece.1 as u64);
            Ok(histogram)
        },
    )?;
    let mut total = dfloat11::Histogram::new();
    histograms.iter().for_each(|histogram| total.merge(histogram));
    let code = match dfloat11::Code::build(&total) {
        Ok(code) => code,
        Err(e) => return Ok(Err(e.to_string())),
    };
    let layout = match dfloat11::Layout::new(&code, &total) {
        Ok(layout) => layout,
        Err(e) => return Ok(Err(e.to_string())),
    };
    let mut at = dfloat11::Position::default();
    let starts: Vec<dfloat11::Position> = histograms
        .iter()
        .map(|histogram| {
            let start = at;
            at.element += histogram.total();
            at.bit += code.encoded_bits(histogram);
            start
        })
        .collect();
    let stream = Stream { form, code, layout, starts };
    if stream.code.lengths().contains(&1) {
        let most = stream.most_block_symbols(unit, work)?;
        if most > dfloat11::MAX_BLOCK_SYMBOLS {
            return Ok(Err(dfloat11::Unrepresentable::BlockSymbols(most).to_string()));
        }
    }
    let spec = form.spec(&layout, stream.code.luts().len() as u64, unit.tensors().len() as u64);
    if let Some(reason) = would_not_shrink(&spec, unit.bytes()) {
        return Ok(Err(reason));
    }
    Ok(Ok(Coding {
        encoding: form.encoding(),
        spec,
        step: STEP,
        encoder: Encoder::Sized(Box::new(stream)),
        fallback: None,
    }))
}

struct Stream {
    form: Form,
    code: dfloat11::Code,
    layout: dfloat11::Layout,
    /// Where each piece starts in the stream.
    starts: Vec<dfloat11::Position>,
}

/// A piece on its way: the words, the bytes that they came from where these are others, and what becomes of them.
#[derive(Default)]
struct Buffers {
    words: Vec<u16>,
    bytes: Vec<u8>,
    piece: dfloat11::Piece,
    /// What is stored of signs and mantissas where that is not a byte a weight.
    halves: Vec<u8>,
}

impl Buffers {
    fn source(&self, form: Form) -> &[u8] {
        match form {
            Form::Bf16 => bytemuck::cast_slice(&self.words),
            Form::Fp8 => &self.bytes,
        }
    }

    fn sign_mantissa(&self, form: Form) -> &[u8] {
        match form {
            Form::Bf16 => &self.piece.sign_mantissa,
            Form::Fp8 => &self.halves,
        }
    }
}

impl Stream {
    /// The most symbols of a block. Only a code with a word of one bit can exceed what the official decoder has room for, so the extra
    /// pass is rare.
    fn most_block_symbols(&self, unit: &UnitSource<'_>, work: Work<'_>) -> Result<u64> {
        let mut assembler = dfloat11::Assembler::new(&self.layout);
        let mut buffers = Buffers::default();
        for (piece, start) in self.form.pieces(unit, work).into_iter().zip(&self.starts) {
            self.form.read(unit, piece, &mut buffers.words, &mut buffers.bytes)?;
            dfloat11::encode_piece(&self.code, *start, &buffers.words, &mut buffers.piece);
            assembler.push(&buffers.piece, &mut dfloat11::Sections::default());
        }
        Ok(assembler.most_block_symbols(self.layout.elements))
    }

    fn encode_piece(
        &self,
        unit: &UnitSource<'_>,
        number: usize,
        piece: (u64, usize),
        b: &mut Buffers,
    ) -> Result<()> {
        self.form.read(unit, piece, &mut b.words, &mut b.bytes)?;
        let start = self.starts.get(number).copied().unwrap_or_default();
        dfloat11::encode_piece(&self.code, start, &b.words, &mut b.piece);
        if self.form == Form::Fp8 {
            b.halves.clear();
            dfloat8::pack(&b.piece.sign_mantissa, &mut b.halves);
        }
        Ok(())
    }
}

impl SizedEncoder for Stream {
    fn encode(&self, unit: &UnitSource<'_>, mut slots: Slots, work: Work<'_>) -> Result<Encoded> {
        let form = self.form;
        let mut done = Vec::new();
        let mut luts = Sink::take(&mut slots, names::LUTS, work)?;
        luts.append(self.code.luts())?;
        done.push(luts);
        if form == Form::Bf16 {
            let ends = names::split_positions(unit.tensors().iter().map(|t| t.bytes / 2));
            let mut splits = Sink::take(&mut slots, names::SPLIT_POSITIONS, work)?;
            splits.append(bytemuck::cast_slice(&ends))?;
            done.push(splits);
        }
        let mut encoded = Sink::take(&mut slots, names::ENCODED_EXPONENT, work)?;
        let mut sign_mantissa = Sink::take(&mut slots, names::SIGN_MANTISSA, work)?;
        let mut positions = Sink::take(&mut slots, names::OUTPUT_POSITIONS, work)?;
        let mut gaps = Sink::take(&mut slots, names::GAPS, work)?;
        let mut digests = SourceDigests::new(unit, work.threads);
        let mut assembler = dfloat11::Assembler::new(&self.layout);
        let mut sections = dfloat11::Sections::default();
        let mut write = |sections: &mut dfloat11::Sections| -> Result<()> {
            encoded.append(&sections.encoded_exponent)?;
            positions.append(&sections.output_positions)?;
            gaps.append(&sections.gaps)?;
            sections.encoded_exponent.clear();
            sections.output_positions.clear();
            sections.gaps.clear();
            Ok(())
        };
        let all = form.pieces(unit, work);
        let mut buffers: Vec<Buffers> = Vec::new();
        buffers.resize_with(work.batch.min(all.len()), Buffers::default);
        for (number, batch) in all.chunks(work.batch.max(1)).enumerate() {
            let first = number * work.batch.max(1);
            buffers.truncate(batch.len());
            work.threads.map(
                buffers.iter_mut().zip(batch).enumerate().collect(),
                || (),
                |(), (i, (buffers, piece))| self.encode_piece(unit, first + i, *piece, buffers),
            )?;
            for buffers in &buffers {
                assembler.push(&buffers.piece, &mut sections);
            }
            let (written, others) = work.threads.join(
                || write(&mut sections),
                || {
                    let (mantissas, ()) = work.threads.join(
                        || buffers.iter().try_for_each(|b| sign_mantissa.append(b.sign_mantissa(form))),
                        || buffers.iter().for_each(|b| digests.update(b.source(form))),
                    );
                    mantissas
                },
            );
            written.and(others)?;
            work.progress.advance(buffers.iter().map(|b| b.source(form).len() as u64).sum());
        }
        assembler.finish(&self.code, &mut sections).map_err(|e| Error::Invalid(e.to_string()))?;
        write(&mut sections)?;
        done.extend([encoded, sign_mantissa, positions, gaps]);
        let mut components = BTreeMap::new();
        for sink in done {
            sink.finish(&mut components)?;
        }
        Ok(Encoded { tensors: digests.finish(), components })
    }
}
