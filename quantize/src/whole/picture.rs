//! The record of learning a whole model as pictures: lines over the steps.

use llmpress_formats::{Error, Result};
use llmpress_plot::Lines;

use super::Record;

/// The most points of a line; of more steps means of runs are drawn.
const POINTS: usize = 200;

/// An SVG of the loss by step.
///
/// # Errors
/// It cannot be drawn.
pub fn whole_loss_svg(records: &[Record]) -> Result<String> {
    let all: Vec<(f64, f64)> = records
        .iter()
        .filter_map(|record| match record {
            Record::Stepped(step) => Some((f64::from(step.step), step.loss)),
            Record::Evaluated(_) => None,
        })
        .collect();
    let mean = |run: &[(f64, f64)], of: fn(&(f64, f64)) -> f64| {
        run.iter().map(of).sum::<f64>() / run.len().max(1) as f64
    };
    let runs = all.chunks(all.len().div_ceil(POINTS).max(1));
    let points = runs.map(|run| (mean(run, |point| point.0), mean(run, |point| point.1))).collect();
    svg("loss of the whole model", "loss, nats a token", points)
}

/// An SVG of the divergence from the dense model, on windows that no step saw.
///
/// # Errors
/// It cannot be drawn.
pub fn whole_divergence_svg(records: &[Record]) -> Result<String> {
    let of = |record: &Record| match record {
        Record::Evaluated(found) => Some((f64::from(found.step), found.divergence)),
        Record::Stepped(_) => None,
    };
    svg("divergence from the dense model", "KL, nats a token", records.iter().filter_map(of).collect())
}

fn svg(title: &str, y: &str, points: Vec<(f64, f64)>) -> Result<String> {
    let lines = Lines {
        title: title.to_owned(),
        x: "step".to_owned(),
        y: y.to_owned(),
        series: vec![("quantised".to_owned(), points)],
    };
    lines.svg().map_err(|e| Error::Invalid(e.to_string()))
}

#[cfg(test)]
mod tests {
    use llmpress_learn::Evaluated;

    use super::*;
    use crate::Stepped;

    #[test]
    fn every_evaluation_has_its_point_many_steps_are_means_and_lines_read_back() {
        let step = |step: u32| {
            Record::Stepped(Stepped {
                step,
                tokens: 0,
                loss: f64::from(step),
                divergence: 0.5,
                likelihood: 1.0,
                gradient: 1.0,
                rate: 0.1,
                broken: step == 7,
            })
        };
        let found =
            |step| Record::Evaluated(Evaluated { step, perplexity: 9.0, dense: 8.0, divergence: 0.5 });
        let mut records: Vec<Record> = (1..=1000).map(step).collect();
        records.extend([found(0), found(500), found(1000)]);
        let circles = |svg: String| svg.matches("<circle").count();
        assert_eq!(circles(whole_loss_svg(&records).unwrap()), 200);
        assert_eq!(circles(whole_divergence_svg(&records).unwrap()), 3);
        assert!(whole_loss_svg(&[]).unwrap().starts_with("<svg"));
        for record in [step(10), found(4)] {
            let line = serde_json::to_string(&record).unwrap();
            assert_eq!(serde_json::from_str::<Record>(&line).unwrap(), record, "{line}");
        }
    }
}
