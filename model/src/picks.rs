//! How a router picks experts for each token.
//!
//! ```text
//! logits --> scores: softmax of all | sigmoid | the logits themselves
//!   scores (+ correction) --> groups with the best experts --> the best experts of these groups
//!   scores of the picked  --> softmax of the picked, or their share of the sum, times a factor
//! ```
//!
//! Of equals the first is picked.

use llmpress_formats::blueprint::Scores;
use llmpress_kernels::cpu::{exp, softmax};

use crate::Panels;

/// Experts in groups of equal size, of which the best groups are looked at alone (DeepSeek-V2, section 2.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    /// How many there are.
    pub count: usize,
    /// How many of them are looked at.
    pub picked: usize,
    /// A group is as good as the sum of so many of its best experts.
    pub best: usize,
}

/// How a router picks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Picks {
    /// How many experts a token goes through.
    pub top_k: usize,
    /// What is compared.
    pub scores: Scores,
    /// Groups, where experts are in some.
    pub groups: Option<Groups>,
    /// Whether the weights of the picked ones are scaled to a sum of one.
    pub normalise: bool,
    /// What weights are multiplied by in the end.
    pub scale: f32,
    /// Whether a weight multiplies what its expert reads, instead of what it gives out.
    pub weighs_inputs: bool,
}

impl Picks {
    /// For each expert the tokens that go through it, with their weights. `logits`: experts x tokens; `correction` is added to scores where
    /// they are compared, and to no weight.
    pub(crate) fn routes(&self, logits: &mut Panels, correction: Option<&[f32]>) -> Vec<Vec<(usize, f32)>> {
        let experts = logits.features();
        match self.scores {
            Scores::Softmax => {
                for panel in 0..logits.count() {
                    let width = logits.width(panel);
                    softmax(logits.panel_mut(panel), width);
                }
            }
            Scores::Sigmoid => logits.data_mut().iter_mut().for_each(|x| *x = 1.0 / (1.0 + exp(-*x))),
            Scores::SoftmaxOfPicked => {}
        }
        let mut routes = vec![Vec::new(); experts];
        for token in 0..logits.tokens() {
            let scores: Vec<f32> = logits.token(token).collect();
            let mut picked = self.picked(&scores, correction);
            self.weigh(&mut picked);
            for (expert, weight) in picked {
                routes[expert].push((token, weight));
            }
        }
        routes
    }

    /// The picked experts, the best one first, with their scores.
    fn picked(&self, scores: &[f32], correction: Option<&[f32]>) -> Vec<(usize, f32)> {
        let mut compared: Vec<(usize, f32)> = scores.iter().copied().enumerate().collect();
        if let Some(correction) = correction {
            compared.iter_mut().zip(correction).for_each(|((_, score), by)| *score += by);
        }
        if let Some(groups) = self.groups.filter(|groups| groups.picked < groups.count) {
            let size = (scores.len() / groups.count.max(1)).max(1);
            let mut worth: Vec<(usize, f32)> = compared
                .chunks(size)
                .map(|group| {
                    let mut group = group.to_vec();
                    sort(&mut group);
                    group.iter().take(groups.best).map(|(_, score)| score).sum()
                })
                .enumerate()
                .collect();
            sort(&mut worth);
            worth.truncate(groups.picked);
            compared.retain(|(expert, _)| worth.iter().any(|(group, _)| *group == expert / size));
        }
        sort(&mut compared);
        compared.truncate(self.top_k);
        compared.iter().map(|(expert, _)| (*expert, scores[*expert])).collect()
    }

    /// Makes weights of scores.
    fn weigh(&self, picked: &mut [(usize, f32)]) {
        if self.scores == Scores::SoftmaxOfPicked {
            let mut weights: Vec<f32> = picked.iter().map(|(_, score)| *score).collect();
            softmax(&mut weights, 1);
            picked.iter_mut().zip(weights).for_each(|((_, score), weight)| *score = weight);
        }
        let sum: f32 = if self.normalise { picked.iter().map(|(_, score)| score).sum() } else { 1.0 };
        // Sigmoids of very small logits may all be zero.
        let sum = if sum == 0.0 { 1e-20 } else { sum };
        picked.iter_mut().for_each(|(_, score)| *score = *score / sum * self.scale);
    }
}

/// The largest first; of equals the first.
fn sort(all: &mut [(usize, f32)]) {
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Picks = Picks {
        top_k: 2,
        scores: Scores::Softmax,
        groups: None,
        normalise: false,
        scale: 1.0,
        weighs_inputs: false,
    };

    /// The experts of a token, and their weights.
    fn routes(picks: Picks, logits: &[f32], correction: Option<&[f32]>) -> Vec<(usize, f32)> {
        let mut panels = Panels::zeros(logits.len(), 1);
        panels.set_token(0, logits.iter().copied());
        let routes = picks.routes(&mut panels, correction);
        routes.iter().enumerate().filter_map(|(e, tokens)| Some((e, tokens.first()?.1))).collect()
    }

    #[test]
    fn groups_are_picked_by_their_best_and_corrections_weigh_nothing() {
        let groups = Groups { count: 3, picked: 1, best: 2 };
        let logits = [9.0, -9.0, 1.0, 1.5, -2.0, 0.5];
        let sigmoid = Picks { scores: Scores::Sigmoid, groups: Some(groups), ..PLAIN };
        let s = |x: f32| 1.0 / (1.0 + (-x).exp());
        let close = |found: Vec<(usize, f32)>, expected: &[(usize, f32)]| {
            let same = |(a, b): (&(usize, f32), &(usize, f32))| a.0 == b.0 && (a.1 - b.1).abs() < 1e-6;
            assert!(
                found.len() == expected.len() && found.iter().zip(expected).all(same),
                "{found:?} {expected:?}"
            );
        };
        // The group with the best expert has the smaller sum of two.
        close(routes(sigmoid, &logits, None), &[(2, s(1.0)), (3, s(1.5))]);
        let one = Picks { groups: Some(Groups { best: 1, ..groups }), ..sigmoid };
        close(routes(one, &logits, None), &[(0, s(9.0)), (1, s(-9.0))]);
        let correction = [0.0, 0.0, 0.0, 0.0, 2.0, 2.0];
        close(routes(sigmoid, &logits, Some(&correction)), &[(4, s(-2.0)), (5, s(0.5))]);
        let scaled = Picks { normalise: true, scale: 2.5, ..sigmoid };
        let sum = s(1.0) + s(1.5);
        close(routes(scaled, &logits, None), &[(2, s(1.0) / sum * 2.5), (3, s(1.5) / sum * 2.5)]);
        let picked = Picks { scores: Scores::SoftmaxOfPicked, ..PLAIN };
        close(routes(picked, &logits, None), &[(0, s(7.5)), (3, s(-7.5))]);
        close(routes(PLAIN, &[1.0, 1.0, 1.0], None), &[(0, 1.0 / 3.0), (1, 1.0 / 3.0)]);
    }

    #[test]
    fn weights_of_nothing_are_numbers() {
        let picks = Picks { scores: Scores::Sigmoid, normalise: true, ..PLAIN };
        for (_, weight) in routes(picks, &[-200.0, -300.0, -250.0], None) {
            assert!(weight.is_finite());
        }
    }
}
