//! A model beside its base, question by question.

use serde::Serialize;

use super::report::answers;
use super::{Question, Scored};

/// How many answers are others than the base's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Flips {
    /// Questions whose answer changed.
    pub changed: usize,
    /// Those that became right.
    pub to_right: usize,
    /// Those that became wrong.
    pub to_wrong: usize,
}

impl Flips {
    fn add(&mut self, (from, to): (usize, usize), right: usize) {
        self.changed += usize::from(from != to);
        self.to_right += usize::from(from != right && to == right);
        self.to_wrong += usize::from(from == right && to != right);
    }
}

/// Of a set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TaskFlips {
    /// Of questions with choices, by log-likelihood.
    pub choice: Flips,
    /// By log-likelihood a character.
    pub choice_normalised: Flips,
    /// Of texts to go on from.
    pub cloze: Flips,
}

/// What changed from the base to the model: both answered these questions.
pub fn flips(questions: &[Question], base: &[Scored], model: &[Scored]) -> TaskFlips {
    let mut found = TaskFlips::default();
    for ((question, base), model) in questions.iter().zip(base).zip(model) {
        let (base, model) = (answers(question, base), answers(question, model));
        match question {
            Question::Choice { .. } => {
                found.choice.add((base.plain, model.plain), base.right);
                found.choice_normalised.add((base.normalised, model.normalised), base.right);
            }
            Question::Cloze { .. } => found.cloze.add((base.plain, model.plain), base.right),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flips_are_counted_by_what_they_became() {
        let question = Question::Choice {
            context: "c".into(),
            choices: ["a", "bb", "c"].map(str::to_owned).to_vec(),
            answer: 0,
        };
        let pick = |at: usize| {
            let lls = (0..3).map(|i| if i == at { -1.0 } else { -9.0 }).collect();
            Scored { log_likelihoods: lls, greedy: vec![false; 3], cut: false }
        };
        let questions = vec![question; 5];
        let base: Vec<Scored> = [0, 0, 1, 1, 2].map(pick).to_vec();
        let model: Vec<Scored> = [0, 2, 0, 2, 2].map(pick).to_vec();
        let found = flips(&questions, &base, &model);
        assert_eq!(found.choice, Flips { changed: 3, to_right: 1, to_wrong: 1 });
        assert_eq!(found.choice_normalised, found.choice);
        assert_eq!(found.cloze, Flips::default());
    }
}
