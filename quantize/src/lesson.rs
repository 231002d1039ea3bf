//! The record of learning: a line for what was learned together.
//!
//! ```text
//! {"layer":3,"what":"mlp","tensors":[...],"relative_errors":[...],"steps":400,"before":0.021,"after":0.013,"taken":true}
//! ```

use llmpress_model::SubLayer;
use serde::{Deserialize, Serialize};

use crate::{Finished, Learned};

/// What was learned together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Taught {
    /// The matrices of an attention.
    Attention,
    /// Those of an MLP.
    Mlp,
    /// Those of both.
    Block,
    /// One matrix by itself: an expert's, or one that quantises what it shares with others to other bits.
    Matrix,
}

impl Taught {
    /// A whole sub-layer.
    pub(crate) fn of(site: SubLayer) -> Self {
        match site {
            SubLayer::Attention(_) => Self::Attention,
            SubLayer::Mlp(_) => Self::Mlp,
        }
    }

    /// Its name for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Attention => "attention",
            Self::Mlp => "MLP",
            Self::Block => "block",
            Self::Matrix => "matrix by itself",
        }
    }
}

/// What learning some matrices together came to. Holds no times: it is the same whenever it is made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Lesson {
    /// Their layer, from 0.
    pub layer: usize,
    /// What they are.
    pub what: Taught,
    /// Which.
    pub tensors: Vec<String>,
    /// [`Report::relative_error`](crate::Report::relative_error) of each, before it was learned; none where that is NaN or infinite.
    pub relative_errors: Vec<Option<f64>>,
    /// Steps.
    pub steps: u32,
    /// The loss before and after.
    #[serde(flatten)]
    pub learned: Learned,
}

impl Lesson {
    /// Of tensors of a sub-layer that were learned together; none where they were not.
    pub(crate) fn of(site: SubLayer, what: Taught, tensors: &[&Finished], steps: u32) -> Option<Self> {
        let (SubLayer::Attention(layer) | SubLayer::Mlp(layer)) = site;
        let learned: Vec<_> = tensors.iter().filter(|done| done.report.learned.is_some()).collect();
        let error = |report: &crate::Report| Some(report.relative_error).filter(|error| error.is_finite());
        Some(Self {
            layer,
            what,
            tensors: learned.iter().map(|done| done.tensor.clone()).collect(),
            relative_errors: learned.iter().map(|done| error(&done.report)).collect(),
            steps,
            learned: learned.first()?.report.learned?,
        })
    }
}

/// A number that may be NaN, which JSON has no word for: null.
pub(crate) mod number {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(crate) fn serialize<S: Serializer>(number: &f64, to: S) -> Result<S::Ok, S::Error> {
        Some(*number).filter(|number| number.is_finite()).serialize(to)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
        Ok(Option::deserialize(from)?.unwrap_or(f64::NAN))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_back_as_it_was_written_also_where_a_loss_is_no_number() {
        let lesson = |before: f64, after| Lesson {
            layer: 3,
            what: Taught::Mlp,
            tensors: vec!["a".to_owned(), "b".to_owned()],
            relative_errors: vec![Some(0.1 + 0.2), None],
            steps: 400,
            learned: Learned { before, after, taken: after.is_some() },
        };
        let line = serde_json::to_string(&lesson(1.0 / 3.0, Some(1e-300))).unwrap();
        assert!(line.starts_with(r#"{"layer":3,"what":"mlp","tensors":["a","b"],"#), "{line}");
        assert_eq!(serde_json::from_str::<Lesson>(&line).unwrap(), lesson(1.0 / 3.0, Some(1e-300)));
        let line = serde_json::to_string(&lesson(f64::NAN, None)).unwrap();
        assert!(line.contains(r#""before":null,"after":null,"taken":false"#), "{line}");
        let back: Lesson = serde_json::from_str(&line).unwrap();
        assert!(back.learned.before.is_nan() && back.learned.after.is_none());
    }
}
