//! What a set of questions comes to.

use serde::Serialize;

use super::{Question, Scored};
use crate::likelihood::Mean;

/// A share of questions, 0 to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Share {
    /// The share.
    pub value: f64,
    /// Its standard error: the sample's standard deviation (of n - 1) over the square root of n.
    pub standard_error: f64,
}

impl Share {
    fn of(right: &Mean) -> Self {
        Self { value: right.mean(), standard_error: right.standard_error() }
    }
}

/// Of questions with choices.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ChoiceReport {
    /// How many.
    pub questions: usize,
    /// The likeliest choice is the right one.
    pub accuracy: Share,
    /// The one whose log-likelihood divided by its characters is the highest.
    pub accuracy_normalised: Share,
}

/// Of texts that are to be gone on from.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ClozeReport {
    /// How many.
    pub questions: usize,
    /// Every token of the target is the likeliest.
    pub accuracy: Share,
    /// e to the mean negative log-likelihood of the targets.
    pub perplexity: f64,
    /// Its standard error: that of the mean times the perplexity.
    pub perplexity_standard_error: f64,
}

/// Of a set.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TaskReport {
    /// Its questions with choices, if there are any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub choice: Option<ChoiceReport>,
    /// Its texts to go on from, if there are any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cloze: Option<ClozeReport>,
    /// Questions whose context was too long and lost its beginning.
    pub cut: usize,
}

/// What a model answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Answers {
    /// The choice by log-likelihood; of a cloze 0 if it is what the model would say, else 1.
    pub(super) plain: usize,
    /// The choice by log-likelihood a character.
    pub(super) normalised: usize,
    pub(super) right: usize,
}

/// The answers to a question.
pub(super) fn answers(question: &Question, scored: &Scored) -> Answers {
    match question {
        Question::Choice { choices, answer, .. } => {
            let characters = choices.iter().map(|choice| choice.chars().count() as f64);
            let each = scored.log_likelihoods.iter().zip(characters).map(|(ll, count)| ll / count);
            Answers {
                plain: first_best(scored.log_likelihoods.iter().copied()),
                normalised: first_best(each),
                right: *answer,
            }
        }
        Question::Cloze { .. } => {
            let said = usize::from(!scored.greedy.iter().all(|greedy| *greedy));
            Answers { plain: said, normalised: said, right: 0 }
        }
    }
}

/// Where the highest value is, of equals the first.
fn first_best(values: impl Iterator<Item = f64>) -> usize {
    let best = values
        .enumerate()
        .fold((0, f64::NEG_INFINITY), |best, (at, value)| if value > best.1 { (at, value) } else { best });
    best.0
}

/// Adds up what a model answered: `scored` is of these questions.
pub fn task_report(questions: &[Question], scored: &[Scored]) -> TaskReport {
    let (mut plain, mut normalised) = (Mean::default(), Mean::default());
    let (mut said, mut nats) = (Mean::default(), Mean::default());
    for (question, of) in questions.iter().zip(scored) {
        let answers = answers(question, of);
        let right = |answer: usize| f64::from(u8::from(answer == answers.right));
        match question {
            Question::Choice { .. } => {
                plain.add(right(answers.plain));
                normalised.add(right(answers.normalised));
            }
            Question::Cloze { .. } => {
                said.add(right(answers.plain));
                nats.add(-of.log_likelihoods.iter().sum::<f64>());
            }
        }
    }
    let perplexity = nats.mean().exp();
    TaskReport {
        choice: (plain.count() > 0).then(|| ChoiceReport {
            questions: plain.count(),
            accuracy: Share::of(&plain),
            accuracy_normalised: Share::of(&normalised),
        }),
        cloze: (said.count() > 0).then(|| ClozeReport {
            questions: said.count(),
            accuracy: Share::of(&said),
            perplexity,
            perplexity_standard_error: perplexity * nats.standard_error(),
        }),
        cut: scored.iter().filter(|of| of.cut).count(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(choices: [&str; 3], answer: usize) -> Question {
        Question::Choice { context: "c".into(), choices: choices.map(str::to_owned).to_vec(), answer }
    }

    fn scored(lls: [f64; 3]) -> Scored {
        Scored { log_likelihoods: lls.to_vec(), greedy: vec![false; 3], cut: false }
    }

    #[test]
    fn accuracies_and_their_errors_are_those_of_the_definition() {
        // Characters count, not bytes: "ééé" has three.
        let questions = vec![
            choice(["a", "ééé", "ccc"], 1),
            choice(["aaaa", "b", "cc"], 0),
            choice(["a", "a", "b"], 0),
            choice(["a", "bb", "c"], 2),
        ];
        // By the sum: 0, 1, 0 (of equals the first), 0. By characters: 1, 0, 0, 1.
        let scored = vec![
            scored([-2.0, -3.0, -4.5]),
            scored([-4.0, -1.5, -9.0]),
            scored([-1.0, -1.0, -2.0]),
            scored([-2.5, -3.0, -3.5]),
        ];
        let report = task_report(&questions, &scored);
        let choice = report.choice.unwrap();
        assert!(report.cloze.is_none());
        assert_eq!((choice.accuracy.value, choice.accuracy_normalised.value), (0.25, 0.75));
        // Of 1, 0, 0, 0: variance 3/16 * 4/3 = 1/4 of n - 1, over 4.
        assert!((choice.accuracy.standard_error - 0.25).abs() < 1e-12);
        assert!((choice.accuracy_normalised.standard_error - 0.25).abs() < 1e-12);
    }

    #[test]
    fn a_cloze_is_right_if_every_token_is_the_likeliest() {
        let question = Question::Cloze { text: "t".into(), target: "u".into() };
        let of = |ll: f64, greedy| Scored { log_likelihoods: vec![ll], greedy: vec![greedy], cut: greedy };
        let report = task_report(&[question.clone(), question], &[of(-1.0, true), of(-3.0, false)]);
        let cloze = report.cloze.unwrap();
        assert_eq!((cloze.questions, cloze.accuracy.value, report.cut), (2, 0.5, 1));
        assert!((cloze.perplexity - 2f64.exp()).abs() < 1e-12);
        assert!((cloze.perplexity_standard_error - 2f64.exp()).abs() < 1e-12, "sd sqrt 2, over sqrt 2");
    }
}
