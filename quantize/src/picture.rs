//! The record of learning as pictures: lines over the layers.

use llmpress_formats::{Error, Result};
use llmpress_plot::Lines;

use crate::{Lesson, Taught};

/// An SVG of the loss by layer, before and after; of matrices that are learned by themselves the mean of a layer's.
///
/// # Errors
/// It cannot be drawn.
pub fn loss_svg(lessons: &[Lesson]) -> Result<String> {
    let mut lines = Means::default();
    for lesson in lessons {
        let what = match lesson.what {
            Taught::Attention | Taught::Mlp | Taught::Block => lesson.what.name(),
            Taught::Matrix => "single matrices",
        };
        // What was no better stayed.
        let after = if lesson.learned.taken { lesson.learned.after } else { Some(lesson.learned.before) };
        lines.add(&format!("{what} before"), lesson.layer, Some(lesson.learned.before));
        lines.add(&format!("{what} after"), lesson.layer, after);
    }
    lines.svg("loss of what was learned", "loss")
}

/// An SVG of the relative errors by layer that error feedback left before, of tensors by their last name.
///
/// # Errors
/// It cannot be drawn.
pub fn error_svg(lessons: &[Lesson]) -> Result<String> {
    let mut lines = Means::default();
    for lesson in lessons {
        for (tensor, error) in lesson.tensors.iter().zip(&lesson.relative_errors) {
            let tensor = tensor.strip_suffix(".weight").unwrap_or(tensor);
            lines.add(tensor.rsplit('.').next().unwrap_or(tensor), lesson.layer, *error);
        }
    }
    lines.svg("relative error before learning", "relative error")
}

/// Lines through the means of what there is of each layer.
#[derive(Default)]
struct Means(Vec<(String, Vec<Mean>)>);

struct Mean {
    layer: usize,
    sum: f64,
    count: u64,
}

impl Means {
    fn add(&mut self, series: &str, layer: usize, value: Option<f64>) {
        let at = self.0.iter().position(|(name, _)| name == series).unwrap_or(self.0.len());
        if at == self.0.len() {
            self.0.push((series.to_owned(), Vec::new()));
        }
        let Some((_, means)) = self.0.get_mut(at) else { return };
        // Layers come one after the other.
        match (means.last_mut().filter(|mean| mean.layer == layer), value) {
            (Some(mean), Some(value)) => (mean.sum, mean.count) = (mean.sum + value, mean.count + 1),
            (None, Some(value)) => means.push(Mean { layer, sum: value, count: 1 }),
            (_, None) => {}
        }
    }

    fn svg(self, title: &str, y: &str) -> Result<String> {
        let points = |means: Vec<Mean>| -> Vec<(f64, f64)> {
            means.iter().map(|mean| (mean.layer as f64, mean.sum / mean.count as f64)).collect()
        };
        let lines = Lines {
            title: title.to_owned(),
            x: "layer".to_owned(),
            y: y.to_owned(),
            series: self.0.into_iter().map(|(name, means)| (name, points(means))).collect(),
        };
        lines.svg().map_err(|e| Error::Invalid(e.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Learned;

    #[test]
    fn every_layer_has_its_point_before_and_after_and_experts_their_mean() {
        let lesson = |layer, what, tensor: &str, before: f64, after: Option<f64>| Lesson {
            layer,
            what,
            tensors: vec![format!("model.layers.{layer}.{tensor}.weight")],
            relative_errors: vec![Some(before)],
            steps: 3,
            learned: Learned { before, after, taken: after.is_some_and(|after| after < before) },
        };
        let lessons = [
            lesson(0, Taught::Attention, "self_attn.q_proj", 0.3, Some(0.2)),
            lesson(0, Taught::Matrix, "mlp.experts.0.up_proj", 0.5, Some(0.25)),
            lesson(0, Taught::Matrix, "mlp.experts.1.up_proj", 0.7, Some(0.35)),
            lesson(1, Taught::Attention, "self_attn.q_proj", 0.4, None),
            lesson(1, Taught::Mlp, "mlp.up_proj", f64::NAN, None),
        ];
        let svg = loss_svg(&lessons).unwrap();
        // Two of each attention, two of the experts, none of what is no number.
        assert_eq!(svg.matches("<circle").count(), 6, "{svg}");
        for name in ["attention before", "attention after", "single matrices after", "MLP before", "layer"] {
            assert!(svg.contains(name), "{name}");
        }
        let svg = error_svg(&lessons).unwrap();
        assert_eq!(svg.matches("<circle").count(), 3, "{svg}");
        assert!(svg.contains("q_proj") && svg.contains("up_proj"));
        assert!(loss_svg(&[]).unwrap().starts_with("<svg"));
    }
}
