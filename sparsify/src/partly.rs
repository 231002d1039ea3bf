//! Part sparse, part dense: which matrices are made 2:4 is settled by what each of them costs the model alone.
//!
//! ```text
//! dense=10%     the matrices that cost the most stay dense, up to a tenth of the weights
//! ratio=0.6     every matrix gets one of its forms, of the least losses together that fit six tenths of the bytes
//! ```
//!
//! What a matrix costs is measured with the masks that need no error feedback: those of its rule, or Wanda's for SparseGPT's.

use std::fmt;
use std::str::FromStr;

use llmpress_calibrate::{Choice, Moments, Sensitivity, allocate};
use llmpress_formats::{Error, Result};

use crate::masks::{magnitude, wanda};
use crate::quads::Sparse;
use crate::{Rule, Sparsifier};

/// A matrix costs at least so much of what all do on average, weight by weight: what few tokens show may be too little.
const LEAST: f64 = 0.01;

/// A share of a whole, in ten thousandths: more than none and less than all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Share(u32);

impl Share {
    const WHOLE: u32 = 10_000;

    /// As a fraction.
    pub fn fraction(self) -> f64 {
        f64::from(self.0) / f64::from(Self::WHOLE)
    }

    /// So much of a whole, rounded down.
    pub fn of(self, whole: u64) -> u64 {
        // No more than the whole.
        (u128::from(whole) * u128::from(self.0) / u128::from(Self::WHOLE)) as u64
    }

    /// The least share that holds `part` of `whole`.
    fn holding(part: u64, whole: u64) -> Self {
        let ten_thousandths = (u128::from(part) * u128::from(Self::WHOLE)).div_ceil(u128::from(whole.max(1)));
        Self(u32::try_from(ten_thousandths).unwrap_or(u32::MAX))
    }

    /// Reads a decimal number of so many units, of which `decimals` at most are behind the point.
    fn read(text: &str, unit: u32, decimals: u32) -> Option<Self> {
        let (whole, part) = text.split_once('.').unwrap_or((text, ""));
        let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse::<u32>().ok());
        let whole = digits(whole)??;
        let places = u32::try_from(part.len()).ok()?;
        let part = match part {
            "" if !text.ends_with('.') => 0,
            part if (1..=decimals).contains(&places) => digits(part)??,
            _ => return None,
        };
        let share =
            whole.checked_mul(unit)?.checked_add(part.checked_mul(unit / 10u32.checked_pow(places)?)?)?;
        Some(Self(share)).filter(|share| (1..Self::WHOLE).contains(&share.0))
    }

    /// Reads a percentage, as `10%` or `2.5%`.
    pub(crate) fn percent(text: &str) -> Option<Self> {
        Self::read(text.strip_suffix('%')?, 100, 2)
    }
}

impl FromStr for Share {
    type Err = Error;

    /// Reads a fraction, as `0.6`.
    fn from_str(text: &str) -> Result<Self> {
        Self::read(text, Self::WHOLE, 4).ok_or_else(|| {
            Error::Invalid(format!(
                "{text:?} is no share: above 0 and below 1, with four decimals at most, as 0.6"
            ))
        })
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.fraction().fmt(f)
    }
}

/// What is settled matrix by matrix, by what each costs the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Partly {
    /// Those that cost the most stay dense: so much of the weights at most.
    Dense(Share),
    /// Each gets one of its forms, so that all take so much of their bytes at most.
    Ratio(Share),
}

impl fmt::Display for Partly {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // Hundredths of a percent: exact when printed by the shortest decimal.
            Self::Dense(Share(share)) => write!(f, "dense={}%", f64::from(*share) / 100.0),
            Self::Ratio(share) => write!(f, "ratio={share}"),
        }
    }
}

impl Sparsifier {
    /// A matrix two in four as it is measured: by its own masks, without error feedback. `weights` are rows of as many columns as
    /// `moments` has features, a multiple of four.
    ///
    /// # Errors
    /// Not whole rows of quads.
    pub fn measured(&self, weights: &[f32], moments: &Moments) -> Result<Sparse> {
        let masks = match self.rule {
            Rule::Wanda | Rule::SparseGpt if moments.tokens() > 0 => wanda(weights, moments.diagonal()),
            _ => magnitude(weights),
        };
        Sparse::new(weights, masks, moments.features())
    }
}

/// One form of a matrix that is to be chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Form {
    /// Bytes, or weights, that count.
    pub cost: u64,
    /// Which of the distances measured it loses; none is as the matrix is.
    pub measured: Option<usize>,
}

/// Chooses a form of every matrix, by its index, for the least sum of losses within a budget: never worse than one index for all
/// that fits. `None` where not even the cheapest forms fit.
///
/// Losses count as independent, and each as at least a hundredth of what the form costs on average, weight by weight.
pub fn choose(measured: &[Sensitivity], forms: &[Vec<Form>], budget: u64) -> Option<Vec<usize>> {
    let weights: u64 = measured.iter().map(|matrix| matrix.weights).fold(0, u64::saturating_add);
    let most = measured.iter().map(|matrix| matrix.distances.len()).max().unwrap_or(0);
    let mean = |form: usize| {
        let all = measured.iter().filter_map(|matrix| matrix.distances.get(form)).sum::<f64>();
        all / weights.max(1) as f64
    };
    let means: Vec<f64> = (0..most).map(mean).collect();
    let choices = measured.iter().zip(forms).map(|(matrix, forms)| {
        let loss = |form: usize| {
            let least = LEAST * means.get(form).copied().unwrap_or(0.0) * matrix.weights as f64;
            matrix.distances.get(form).copied().unwrap_or(0.0).max(least)
        };
        let choice = |form: &Form| Choice { cost: form.cost, loss: form.measured.map_or(0.0, loss) };
        forms.iter().map(choice).collect()
    });
    allocate(&choices.collect::<Vec<Vec<Choice>>>(), budget)
}

/// Which of the matrices stay dense, of those whose first distance is of two in four: a share of the weights at most, for the
/// least sum of losses.
///
/// # Errors
/// [`Error::Invalid`] where not one of them fits, with the share that one would take.
pub fn keep_dense(measured: &[Sensitivity], share: Share) -> Result<Vec<bool>> {
    let sizes: Vec<u64> = measured.iter().map(|matrix| matrix.weights).collect();
    check_dense(&sizes, share)?;
    let all = sizes.iter().copied().fold(0, u64::saturating_add);
    let forms =
        |&weights: &u64| vec![Form { cost: 0, measured: Some(0) }, Form { cost: weights, measured: None }];
    let forms: Vec<Vec<Form>> = sizes.iter().map(forms).collect();
    let chosen = choose(measured, &forms, share.of(all)).unwrap_or_default();
    Ok(chosen.into_iter().map(|form| form == 1).collect())
}

/// Refuses a share of dense weights that holds none of the matrices, of so many weights each.
///
/// # Errors
/// [`Error::Invalid`], with the least share that would do.
pub fn check_dense(sizes: &[u64], share: Share) -> Result<()> {
    let all = sizes.iter().copied().fold(0, u64::saturating_add);
    match sizes.iter().min() {
        Some(&least) if least > share.of(all) => {
            let (asked, holding) = (Partly::Dense(share), Partly::Dense(Share::holding(least, all)));
            Err(Error::Invalid(format!(
                "{asked}: the smallest of these {} matrices has more of their weights: give {holding} at least",
                sizes.len()
            )))
        }
        _ => Ok(()),
    }
}

/// Refuses a share of the bytes that the cheapest forms do not fit, which take `least` of `all`.
///
/// # Errors
/// [`Error::Invalid`], with the least ratio that there is.
pub fn check_ratio(least: u64, all: u64, share: Share) -> Result<()> {
    if least <= share.of(all) {
        return Ok(());
    }
    let holding = Share::holding(least, all);
    Err(Error::Invalid(format!(
        "{}: these matrices take {holding} of their bytes at least: give {holding}, or quantise them more",
        Partly::Ratio(share)
    )))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn matrix(weights: u64, distances: &[f64]) -> Sensitivity {
        Sensitivity { tensor: weights.to_string(), weights, distances: distances.to_vec() }
    }

    #[test]
    fn shares_are_read_exactly_and_nothing_else_is_one() {
        for (text, share) in [("10%", 1000), ("2.5%", 250), ("0.01%", 1), ("99.99%", 9999), ("33.3%", 3330)] {
            assert_eq!(Share::percent(text), Some(Share(share)), "{text}");
        }
        for text in ["10", "0%", "100%", "1.234%", "-1%", "1.%", ".5%", "%", "1e1%", "9999999999%"] {
            assert_eq!(Share::percent(text), None, "{text}");
        }
        for (text, share) in [("0.6", 6000), ("0.5625", 5625), ("0.05", 500)] {
            assert_eq!(text.parse::<Share>().unwrap(), Share(share), "{text}");
        }
        for text in ["0", "1", "1.5", "0.00001", "0.", ".6", "60%", "nan", ""] {
            assert!(text.parse::<Share>().is_err(), "{text}");
        }
        assert_eq!(Share(2500).of(u64::MAX), u64::MAX / 4);
    }

    #[test]
    fn what_costs_most_stays_dense_up_to_the_share() {
        let all = [matrix(100, &[1.0]), matrix(100, &[5.0]), matrix(200, &[5.0]), matrix(600, &[1.0])];
        assert_eq!(keep_dense(&all, Share(1000)).unwrap(), [false, true, false, false]);
        assert_eq!(keep_dense(&all, Share(3000)).unwrap(), [false, true, true, false]);
        assert_eq!(keep_dense(&all, Share(4000)).unwrap(), [true, true, true, false]);
        let error = keep_dense(&all, Share(999)).unwrap_err().to_string();
        assert!(error.contains("dense=9.99%") && error.contains("dense=10% at least"), "{error}");
    }

    #[test]
    fn a_ratio_out_of_reach_names_the_nearest() {
        assert!(check_ratio(5625, 10_000, Share(5625)).is_ok());
        let error = check_ratio(5625, 10_000, Share(5000)).unwrap_err().to_string();
        assert!(error.contains("ratio=0.5:") && error.contains("give 0.5625"), "{error}");
        let error = check_ratio(1, 3, Share(1)).unwrap_err().to_string();
        assert!(error.contains("give 0.3334"), "{error}");
    }

    proptest! {
        #[test]
        fn what_is_chosen_fits_and_never_loses_more_than_one_form_for_all(
            matrices in proptest::collection::vec((1u64..50, 0u32..1000, 0u32..1000), 1..8),
            share in 1u32..10_000,
        ) {
            let measured: Vec<Sensitivity> = matrices
                .iter()
                .map(|&(weights, a, b)| matrix(weights, &[f64::from(a), f64::from(b)]))
                .collect();
            // Dense, two in four, quantised.
            let forms: Vec<Vec<Form>> = matrices
                .iter()
                .map(|&(weights, ..)| vec![
                    Form { cost: 16 * weights, measured: None },
                    Form { cost: 9 * weights, measured: Some(0) },
                    Form { cost: 4 * weights, measured: Some(1) },
                ])
                .collect();
            let all: u64 = matrices.iter().map(|(weights, ..)| 16 * weights).sum();
            let budget = Share(share).of(all);
            let found = choose(&measured, &forms, budget);
            prop_assert_eq!(found.is_some(), budget >= all / 4);
            let Some(found) = found else { return Ok(()) };
            let cost = |chosen: &[usize]| -> u64 { forms.iter().zip(chosen).map(|(f, &c)| f[c].cost).sum() };
            prop_assert!(cost(&found) <= budget);
            let weights: u64 = matrices.iter().map(|m| m.0).sum();
            let mean = |form: usize| measured.iter().map(|m| m.distances[form]).sum::<f64>() / weights as f64;
            let loss = |chosen: &[usize]| -> f64 {
                let of = |((matrix, forms), &chosen): ((&Sensitivity, &Vec<Form>), &usize)| {
                    forms[chosen].measured.map_or(0.0, |at| {
                        matrix.distances[at].max(LEAST * mean(at) * matrix.weights as f64)
                    })
                };
                measured.iter().zip(&forms).zip(chosen).map(of).sum()
            };
            for same in 0..3 {
                let same = vec![same; forms.len()];
                prop_assert!(cost(&same) > budget || loss(&found) <= loss(&same));
            }
        }
    }
}
