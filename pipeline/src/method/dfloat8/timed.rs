//! dfloat8 in memory.

use llmpress_entropy::dfloat8;
use llmpress_entropy::dfloat11::{Code, EncodedUnit, Span, decode_span};

use crate::Result;
use crate::method::timed::{Joined, Timed, invalid};

/// One tensor.
#[derive(Default)]
pub(super) struct Unit {
    unit: EncodedUnit,
    sign_mantissa: Vec<u8>,
    words: Vec<u16>,
}

impl Timed for Unit {
    fn encode(&mut self, unit: &Joined) -> Result<usize> {
        self.unit = dfloat8::encode(unit.bytes()).map_err(invalid)?;
        let EncodedUnit { luts, encoded_exponent, sign_mantissa, output_positions, gaps } = &self.unit;
        Ok([luts, encoded_exponent, sign_mantissa, output_positions, gaps]
            .iter()
            .map(|part| part.len())
            .sum())
    }

    fn decode(&mut self, out: &mut [u8]) -> Result<()> {
        let code = Code::from_luts(&self.unit.luts).map_err(invalid)?;
        dfloat8::unpack(&self.unit.sign_mantissa, 0, out.len(), &mut self.sign_mantissa);
        let span = Span {
            encoded_exponent: &self.unit.encoded_exponent,
            gaps: &self.unit.gaps,
            output_positions: &self.unit.output_positions,
            sign_mantissa: &self.sign_mantissa,
        };
        self.words.resize(out.len(), 0);
        decode_span(&code, &span, 0, &mut self.words).map_err(invalid)?;
        dfloat8::narrow(&self.words, out);
        Ok(())
    }
}
