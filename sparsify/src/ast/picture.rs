//! The record of training as pictures: lines over the steps.

use llmpress_formats::{Error, Result};
use llmpress_plot::Lines;

use super::record::Record;

/// Points of a line at most: of more the means of as many runs of steps.
const POINTS: usize = 200;

/// An SVG of the loss by step.
///
/// # Errors
/// It cannot be drawn.
pub fn loss_svg(records: &[Record]) -> Result<String> {
    let points = steps(records, |step| Some(step.loss));
    svg("loss of training", "loss, nats a token", [("loss", points)])
}

/// An SVG of how many quads' masks changed when they were found again.
///
/// # Errors
/// It cannot be drawn.
pub fn flips_svg(records: &[Record]) -> Result<String> {
    let points = steps(records, |step| step.flips.map(|flips| flips as f64));
    svg("masks that changed", "quads", [("changed", points)])
}

/// An SVG of perplexity on windows that no step saw, beside the dense model's.
///
/// # Errors
/// It cannot be drawn.
pub fn perplexity_svg(records: &[Record]) -> Result<String> {
    let of = |value: fn(&super::Evaluated) -> f64| evaluated(records, value);
    svg(
        "perplexity on held-back windows",
        "perplexity",
        [("2:4", of(|found| found.perplexity)), ("dense", of(|found| found.dense))],
    )
}

/// An SVG of the divergence from the dense model on these.
///
/// # Errors
/// It cannot be drawn.
pub fn divergence_svg(records: &[Record]) -> Result<String> {
    let points = evaluated(records, |found| found.divergence);
    svg("divergence from the dense model", "KL, nats a token", [("2:4", points)])
}

fn steps(records: &[Record], value: impl Fn(&super::Stepped) -> Option<f64>) -> Vec<(f64, f64)> {
    let all: Vec<(f64, f64)> = records
        .iter()
        .filter_map(|record| match record {
            Record::Stepped(step) => Some((f64::from(step.step), value(step)?)),
            Record::Evaluated(_) => None,
        })
        .collect();
    let mean = |run: &[(f64, f64)], of: fn(&(f64, f64)) -> f64| {
        run.iter().map(of).sum::<f64>() / run.len().max(1) as f64
    };
    let runs = all.chunks(all.len().div_ceil(POINTS).max(1));
    runs.map(|run| (mean(run, |point| point.0), mean(run, |point| point.1))).collect()
}

fn evaluated(records: &[Record], value: impl Fn(&super::Evaluated) -> f64) -> Vec<(f64, f64)> {
    let of = |record: &Record| match record {
        Record::Evaluated(found) => Some((f64::from(found.step), value(found))),
        Record::Stepped(_) => None,
    };
    records.iter().filter_map(of).collect()
}

fn svg<const N: usize>(title: &str, y: &str, series: [(&str, Vec<(f64, f64)>); N]) -> Result<String> {
    let lines = Lines {
        title: title.to_owned(),
        x: "step".to_owned(),
        y: y.to_owned(),
        series: series.into_iter().map(|(name, points)| (name.to_owned(), points)).collect(),
    };
    lines.svg().map_err(|e| Error::Invalid(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ast::{Evaluated, Stepped};

    #[test]
    fn every_evaluation_has_its_point_and_many_steps_are_drawn_as_means() {
        let step = |step: u32| {
            Record::Stepped(Stepped {
                step,
                tokens: 0,
                loss: f64::from(step),
                divergence: None,
                likelihood: 1.0,
                gradient: 1.0,
                rate: 0.1,
                lambda: 0.0,
                flips: step.is_multiple_of(10).then_some(7),
            })
        };
        let found =
            |step| Record::Evaluated(Evaluated { step, perplexity: 9.0, dense: 8.0, divergence: 0.5 });
        let mut records: Vec<Record> = (1..=1000).map(step).collect();
        records.extend([found(0), found(500), found(1000)]);
        let circles = |svg: String| svg.matches("<circle").count();
        assert_eq!(circles(loss_svg(&records).unwrap()), 200);
        assert_eq!(circles(flips_svg(&records).unwrap()), 100);
        assert_eq!(circles(perplexity_svg(&records).unwrap()), 6);
        assert_eq!(circles(divergence_svg(&records).unwrap()), 3);
        assert_eq!(steps(&records, |s| Some(s.loss))[0], (3.0, 3.0));
        assert!(loss_svg(&[]).unwrap().starts_with("<svg"));
        for record in [step(10), step(3), found(4)] {
            let line = serde_json::to_string(&record).unwrap();
            assert_eq!(serde_json::from_str::<Record>(&line).unwrap(), record, "{line}");
        }
    }
}
