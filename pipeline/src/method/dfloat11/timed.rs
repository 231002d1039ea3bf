//! DFloat11 in memory.

use llmpress_entropy::dfloat11;

use crate::Result;
use crate::method::timed::{Joined, Timed, invalid};

/// Words of a piece: its buffers stay in the cache.
const PIECE_WORDS: usize = 1 << 16;

/// One unit.
#[derive(Default)]
pub(super) struct Unit {
    luts: Vec<u8>,
    sign_mantissa: Vec<u8>,
    sections: dfloat11::Sections,
    piece: dfloat11::Piece,
}

impl Timed for Unit {
    fn encode(&mut self, unit: &Joined) -> Result<usize> {
        let mut histogram = dfloat11::Histogram::new();
        histogram.add(unit.words());
        let code = dfloat11::Code::build(&histogram).map_err(invalid)?;
        let layout = dfloat11::Layout::new(&code, &histogram).map_err(invalid)?;
        self.luts.clear();
        self.luts.extend_from_slice(code.luts());
        self.sign_mantissa.clear();
        self.sections.encoded_exponent.clear();
        self.sections.gaps.clear();
        self.sections.output_positions.clear();
        let mut assembler = dfloat11::Assembler::new(&layout);
        let mut at = dfloat11::Position::default();
        for words in unit.words().chunks(PIECE_WORDS) {
            dfloat11::encode_piece(&code, at, words, &mut self.piece);
            at = self.piece.end();
            self.sign_mantissa.extend_from_slice(&self.piece.sign_mantissa);
            assembler.push(&self.piece, &mut self.sections);
        }
        assembler.finish(&code, &mut self.sections).map_err(invalid)?;
        let index = self.sections.gaps.len() + self.sections.output_positions.len();
        Ok(self.luts.len() + self.sign_mantissa.len() + self.sections.encoded_exponent.len() + index)
    }

    fn decode(&mut self, out: &mut [u8]) -> Result<()> {
        let code = dfloat11::Code::from_luts(&self.luts).map_err(invalid)?;
        let span = dfloat11::Span {
            encoded_exponent: &self.sections.encoded_exponent,
            gaps: &self.sections.gaps,
            output_positions: &self.sections.output_positions,
            sign_mantissa: &self.sign_mantissa,
        };
        dfloat11::decode_span(&code, &span, 0, bytemuck::cast_slice_mut(out)).map_err(invalid)
    }
}
