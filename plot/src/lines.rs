//! Lines: one a series, through its points.

use plotters::prelude::{Circle, Color, LineSeries};

use crate::Error;
use crate::axis::Axis;
use crate::frame::{Frame, colour};

/// A picture of lines over one another.
#[derive(Clone, Debug, PartialEq)]
pub struct Lines {
    /// What it shows.
    pub title: String,
    /// What goes from left to right.
    pub x: String,
    /// What values are.
    pub y: String,
    /// By name, the points of each line, left to right; what is not finite is left out.
    pub series: Vec<(String, Vec<(f64, f64)>)>,
}

impl Lines {
    /// The SVG.
    ///
    /// # Errors
    /// It cannot be drawn.
    pub fn svg(&self) -> Result<String, Error> {
        let points = || self.series.iter().flat_map(|(_, points)| points).filter(|p| finite(p));
        let x = Axis::around(points().map(|p| p.0), false);
        let y = Axis::around(points().map(|p| p.1), true);
        let frame = Frame {
            title: &self.title,
            x_name: &self.x,
            y_name: &self.y,
            series: self.series.iter().map(|(name, _)| name.as_str()).collect(),
            x: (x.low, x.high),
            x_ticks: x.ticks(),
            y,
            plot_width: 520,
        };
        frame.svg(&|at| x.label(*at), |chart| {
            for (index, (_, points)) in self.series.iter().enumerate() {
                let points: Vec<(f64, f64)> = points.iter().filter(|p| finite(p)).copied().collect();
                let dots = points.iter().map(|p| Circle::new(*p, 3, colour(index).filled()));
                chart.draw_series(dots).map_err(Error::new)?;
                let line = LineSeries::new(points.iter().copied(), colour(index).stroke_width(2));
                chart.draw_series(line).map_err(Error::new)?;
            }
            Ok(())
        })
    }
}

fn finite(point: &(f64, f64)) -> bool {
    point.0.is_finite() && point.1.is_finite()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_series_is_a_line_with_a_dot_for_every_point() {
        let lines = Lines {
            title: "t".to_owned(),
            x: "bits".to_owned(),
            y: "perplexity".to_owned(),
            series: vec![
                ("a".to_owned(), vec![(2.0, 14.0), (3.0, 9.0), (4.0, 8.2)]),
                ("b".to_owned(), vec![(2.0, 19.0), (3.0, f64::NAN), (4.0, 8.5)]),
            ],
        };
        let svg = lines.svg().unwrap();
        assert_eq!(svg.matches("<circle").count(), 5);
        assert!(svg.contains("bits") && svg.contains("perplexity"), "{svg}");
        // Nothing to draw is a frame.
        assert!(Lines { series: Vec::new(), ..lines }.svg().unwrap().starts_with("<svg"));
    }
}
