//! Bars: a value for each series of each category.

use plotters::prelude::{Color, Rectangle, WHITE};

use crate::Error;
use crate::axis::Axis;
use crate::frame::{Frame, colour, width};

/// Room of a category on the x axis.
const CATEGORY: u32 = 26;
/// Share of a category that its bars take up.
const FILLED: f64 = 0.84;

/// A value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bar {
    /// Where it stands on the x axis.
    pub category: usize,
    /// Which series it belongs to.
    pub series: usize,
    /// Its height.
    pub value: f64,
    /// Whether it is filled or only outlined.
    pub filled: bool,
}

/// A picture of bars side by side.
#[derive(Clone, Debug, PartialEq)]
pub struct Bars {
    /// What it shows.
    pub title: String,
    /// What categories are.
    pub x: String,
    /// What values are.
    pub y: String,
    /// The categories, first to last.
    pub categories: Vec<String>,
    /// The series by name.
    pub series: Vec<String>,
    /// The values; those of other categories and series, and what is not finite, are left out.
    pub bars: Vec<Bar>,
}

impl Bars {
    /// The SVG. The axis begins at 0 unless all values crowd far above it.
    ///
    /// # Errors
    /// It cannot be drawn.
    pub fn svg(&self) -> Result<String, Error> {
        let count = self.categories.len().max(1);
        let shown: Vec<Bar> = self
            .bars
            .iter()
            .filter(|b| b.value.is_finite() && b.category < count && b.series < self.series.len())
            .copied()
            .collect();
        let y = Axis::around(shown.iter().map(|b| b.value), true);
        // Every category is named while there is room for it.
        let widest = self.categories.iter().map(|c| width(c, 12)).max().unwrap_or(0) + 6;
        let plot_width = CATEGORY.saturating_mul(count.min(1 << 16) as u32).min(4000);
        let room = f64::from(plot_width) / count as f64;
        let every = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000, 10000]
            .into_iter()
            .find(|every| room * f64::from(*every) >= f64::from(widest))
            .unwrap_or(10000) as usize;
        let frame = Frame {
            title: &self.title,
            x_name: &self.x,
            y_name: &self.y,
            series: self.series.iter().map(String::as_str).collect(),
            x: (-0.5, count as f64 - 0.5),
            x_ticks: (0..count).step_by(every).map(|i| i as f64).collect(),
            y,
            plot_width,
        };
        let label = |at: &f64| self.categories.get(at.round() as usize).cloned().unwrap_or_default();
        let base = if y.low <= 0.0 && y.high >= 0.0 { 0.0 } else { y.low };
        let part = FILLED / self.series.len().max(1) as f64;
        frame.svg(&label, |chart| {
            let rectangles = shown.iter().flat_map(|bar| {
                let left = bar.category as f64 - FILLED / 2.0 + part * bar.series as f64;
                let corners = [(left, base), (left + part * 0.94, bar.value)];
                let colour = colour(bar.series);
                let fill = if bar.filled { colour.filled() } else { WHITE.filled() };
                [Rectangle::new(corners, fill), Rectangle::new(corners, colour.stroke_width(1))]
            });
            chart.draw_series(rectangles).map_err(Error::new)?;
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bars(layers: usize, title: &str) -> Bars {
        let values = (0..layers).flat_map(|layer| {
            (0..2).map(move |series| Bar {
                category: layer,
                series,
                value: 0.92 + 0.06 * (layer as f64 / layers as f64),
                filled: layer % 2 == series,
            })
        });
        Bars {
            title: title.to_owned(),
            x: "layer".to_owned(),
            y: "similarity".to_owned(),
            categories: (0..layers).map(|l| l.to_string()).collect(),
            series: vec!["attention".to_owned(), "MLP".to_owned()],
            bars: values.collect(),
        }
    }

    /// The numbers of an attribute.
    fn attribute(svg: &str, name: &str) -> Vec<f64> {
        let key = format!(" {name}=\"");
        svg.match_indices(&key)
            .filter_map(|(at, _)| svg[at + key.len()..].split('"').next()?.parse().ok())
            .collect()
    }

    #[test]
    fn nothing_is_cut_however_few_the_categories_or_long_the_title() {
        for (layers, title) in [
            (1, "a title that is a good deal longer than one layer is wide <&>"),
            (8, "drop:joint: score by layer, 4 removed (filled)"),
            (126, "finercut,distance=js,protect=0.4"),
            (0, ""),
            (3, &"x".repeat(5000)),
        ] {
            let svg = bars(layers, title).svg().unwrap();
            let (width, height) = (attribute(&svg, "width")[0], attribute(&svg, "height")[0]);
            for (x, y) in attribute(&svg, "x").into_iter().zip(attribute(&svg, "y")) {
                assert!((0.0..=width).contains(&x) && (0.0..=height).contains(&y), "{layers}: {x} {y}");
            }
            let shown = title.chars().count().min(160) as f64;
            assert!(width >= 16.0 + shown * 15.0 * 0.6, "{layers}: {width}");
            assert!(svg.contains("layer") && svg.contains("similarity"), "{layers}");
        }
        let svg = bars(2, "<script>").svg().unwrap();
        assert!(!svg.contains("<script>") && svg.contains("&lt;script&gt;"));
    }

    #[test]
    fn what_is_not_finite_or_has_no_place_is_left_out() {
        let mut bars = bars(2, "t");
        for (category, series, value) in [(0, 0, f64::NAN), (1, 0, f64::INFINITY), (9, 0, 1.0), (0, 9, 1.0)] {
            bars.bars.push(Bar { category, series, value, filled: true });
        }
        let before = super::tests::bars(2, "t").svg().unwrap();
        assert_eq!(bars.svg().unwrap(), before);
    }
}
