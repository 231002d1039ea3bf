//! One group's grid.

/// Adding and subtracting it rounds a number from 0 to 2^22 to the nearest integer, of two to the even one, and a compiler
/// makes vector instructions of it on every processor.
const ROUND: f32 = 12_582_912.0;

/// The values of the codes of a group: `scale * (code - zero) + offset`, where one of zero and offset is 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Line {
    pub(crate) scale: f32,
    inverse: f32,
    pub(crate) offset: f32,
    pub(crate) zero: f32,
}

impl Line {
    /// With a real zero point.
    pub(crate) fn real(scale: f32, offset: f32) -> Self {
        Self { scale, inverse: 1.0 / scale, offset, zero: 0.0 }
    }

    /// With zero on a code.
    pub(crate) fn on_code(scale: f32, zero: u8) -> Self {
        Self { scale, inverse: 1.0 / scale, offset: 0.0, zero: f32::from(zero) }
    }

    /// Whether both numbers, and the inverse, are such as to compute with.
    pub(crate) fn is_sound(&self) -> bool {
        self.inverse.is_finite() && self.scale.is_finite() && self.scale != 0.0 && self.offset.is_finite()
    }

    /// Where a weight lies on it, in steps.
    #[inline(always)]
    pub(crate) fn place(&self, weight: f32) -> f32 {
        (weight - self.offset) * self.inverse + self.zero
    }

    /// The code whose value is nearest; of NaN, 0. `top` is the greatest code.
    #[inline(always)]
    pub(crate) fn code(&self, weight: f32, top: f32) -> f32 {
        round(self.place(weight), top)
    }

    /// The value of a code, as the encoding's reader computes it.
    #[inline(always)]
    pub(crate) fn value(&self, code: f32) -> f32 {
        self.scale * (code - self.zero) + self.offset
    }
}

/// The code nearest to a place.
#[inline(always)]
pub(crate) fn round(place: f32, top: f32) -> f32 {
    // `max` takes 0 for NaN.
    (place.max(0.0).min(top) + ROUND) - ROUND
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_the_nearest_ones_and_stay_on_the_grid() {
        for (line, top) in [(Line::real(0.25, -1.0), 15.0), (Line::on_code(-0.5, 2), 3.0)] {
            for i in -4000..4000 {
                let weight = i as f32 / 500.0;
                let code = line.code(weight, top);
                let best = (0..=top as u8)
                    .map(|c| (line.value(f32::from(c)) - weight).abs())
                    .fold(f32::INFINITY, f32::min);
                assert!(code >= 0.0 && code <= top && code.fract() == 0.0);
                assert!((line.value(code) - weight).abs() <= best + 1e-6, "{weight} {code}");
            }
        }
        let line = Line::real(1.0, 0.0);
        for (weight, code) in [
            (0.5, 0.0),
            (1.5, 2.0),
            (2.5, 2.0),
            (f32::INFINITY, 255.0),
            (f32::NEG_INFINITY, 0.0),
            (f32::NAN, 0.0),
        ] {
            assert_eq!(line.code(weight, 255.0), code);
        }
    }
}
