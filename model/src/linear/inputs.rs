//! What the products of a call multiply: as it is, or quantised, once for all matrices that take it so.
//!
//! ```text
//! x --> x                     products with weights
//!  \--> codes of x            products with codes, and with weights whose inputs are quantised (as their values)
//! ```

use llmpress_formats::encoding::abq::Abq;
use llmpress_formats::{Checkpoint, Error, Result};
use llmpress_kernels::cpu::abq::{self, quantise};

use super::Linear;
use crate::Panels;

/// The inputs of a call's products.
#[derive(Default)]
pub(super) struct Inputs<'a> {
    all: Vec<(&'a Panels, Kind, Form)>,
}

/// Which form of an input a product takes.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Plain,
    Codes(Abq),
    /// Weights in another form than their codes: the values of quantised inputs.
    Rounded(u8),
}

enum Form {
    Plain,
    Codes(Vec<abq::Inputs>),
    Rounded(Panels),
}

impl<'a> Inputs<'a> {
    /// The number of what `linear` multiplies when it is given `x`.
    ///
    /// # Errors
    /// A value that cannot be quantised: the linear is named.
    pub(super) fn add(&mut self, checkpoint: &Checkpoint, linear: &Linear, x: &'a Panels) -> Result<usize> {
        let codes = linear.source.quantised();
        let kind = match (codes, linear.activation_bits) {
            (Some(codes), _) => Kind::Codes(codes.abq()),
            (None, Some(bits)) => Kind::Rounded(bits),
            (None, None) => Kind::Plain,
        };
        let same = |(other, of, _): &(&Panels, Kind, Form)| std::ptr::eq(*other, x) && *of == kind;
        if let Some(found) = self.all.iter().position(same) {
            return Ok(found);
        }
        let form = match (codes, kind) {
            (Some(codes), _) => codes.prepare(x).map(Form::Codes),
            (None, Kind::Rounded(bits)) => rounded(x, bits).map(Form::Rounded),
            (None, _) => Ok(Form::Plain),
        };
        let form = form.map_err(|token| {
            Error::Invalid(format!(
                "{}: {}: what it multiplies is NaN or infinite, or too large, at token {token}: it cannot be quantised to \
                 {} bits",
                checkpoint.root().display(),
                linear.tensor,
                linear.activation_bits.unwrap_or_default()
            ))
        })?;
        self.all.push((x, kind, form));
        Ok(self.all.len() - 1)
    }

    /// Prepared panels, if that is the form.
    pub(super) fn codes(&self, number: usize) -> Option<&[abq::Inputs]> {
        match &self.all[number].2 {
            Form::Codes(inputs) => Some(inputs),
            Form::Plain | Form::Rounded(_) => None,
        }
    }

    /// Values.
    pub(super) fn values(&self, number: usize) -> &Panels {
        match &self.all[number] {
            (_, _, Form::Rounded(values)) => values,
            (x, ..) => x,
        }
    }
}

/// What the encoding `abq` makes of inputs (features x tokens) that it quantises to `bits`, each token by itself: the values
/// that their codes stand for, step x (code - zero).
///
/// # Errors
/// The token that has a value which cannot be quantised: NaN, infinite, or too large.
pub fn rounded(x: &Panels, bits: u8) -> Result<Panels, usize> {
    let mut out = Panels::zeros(x.features(), x.tokens());
    let (mut values, mut codes) = (vec![0.0; x.features()], vec![0; x.features()]);
    for token in 0..x.tokens() {
        values.iter_mut().zip(x.token(token)).for_each(|(to, value)| *to = value);
        let grid = quantise(&values, bits, &mut codes).map_err(|_| token)?;
        let value = |code: &u8| grid.step * f32::from(i16::from(*code) - i16::from(grid.zero));
        out.set_token(token, codes.iter().map(value));
    }
    Ok(out)
}
