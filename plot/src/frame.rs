//! What both kinds of pictures have: a title, a legend, axes.

use plotters::chart::{ChartBuilder, ChartContext};
use plotters::coord::Shift;
use plotters::coord::cartesian::Cartesian2d;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};
use plotters::prelude::{
    BLACK, DrawingArea, IntoDrawingArea, IntoFont, IntoTextStyle, RGBColor, Rectangle, SVGBackend, Text,
    WHITE,
};
use plotters::style::Color;

use crate::Error;
use crate::axis::Axis;

pub(crate) const COLOURS: [RGBColor; 8] = [
    RGBColor(31, 119, 180),
    RGBColor(255, 127, 14),
    RGBColor(44, 160, 44),
    RGBColor(214, 39, 40),
    RGBColor(148, 103, 189),
    RGBColor(140, 86, 75),
    RGBColor(227, 119, 194),
    RGBColor(127, 127, 127),
];

pub(crate) const MARGIN: u32 = 16;
const TITLE_SIZE: u32 = 15;
const TEXT_SIZE: u32 = 12;
/// Room of a letter, for sizes that text needs: generous, since fonts differ.
const LETTER: f64 = 0.62;
const X_AXIS: u32 = 46;
const PLOT_HEIGHT: u32 = 280;
const MIN_PLOT_WIDTH: u32 = 240;
const MAX_PLOT_WIDTH: u32 = 6000;
/// Letters of a title or name that are shown.
const MAX_LETTERS: usize = 160;

/// A picture to be: what stands around the plot.
pub(crate) struct Frame<'a> {
    pub(crate) title: &'a str,
    pub(crate) x_name: &'a str,
    pub(crate) y_name: &'a str,
    pub(crate) series: Vec<&'a str>,
    pub(crate) x: (f64, f64),
    pub(crate) x_ticks: Vec<f64>,
    pub(crate) y: Axis,
    pub(crate) plot_width: u32,
}

pub(crate) type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<Ticked, Ticked>>;

/// A range with ticks of our own.
#[derive(Clone)]
pub(crate) struct Ticked {
    low: f64,
    high: f64,
    ticks: Vec<f64>,
}

impl Ranged for Ticked {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        let span = self.high - self.low;
        let share = if span == 0.0 { 0.5 } else { (value - self.low) / span };
        (f64::from(limit.0) + share * f64::from(limit.1 - limit.0)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _hint: Hint) -> Vec<f64> {
        self.ticks.clone()
    }

    fn range(&self) -> std::ops::Range<f64> {
        self.low..self.high
    }
}

/// The width of a text, rather too much than too little.
pub(crate) fn width(text: &str, size: u32) -> u32 {
    (text.chars().count() as f64 * f64::from(size) * LETTER).ceil() as u32
}

/// A text of bounded length.
fn shown(text: &str) -> String {
    match text.char_indices().nth(MAX_LETTERS) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}

impl Frame<'_> {
    /// The SVG, with what `draw` puts into the plot.
    pub(crate) fn svg(
        &self,
        x_label: &dyn Fn(&f64) -> String,
        draw: impl FnOnce(&mut Chart<'_, '_>) -> Result<(), Error>,
    ) -> Result<String, Error> {
        let (title, names) = (shown(self.title), self.series.iter().map(|s| shown(s)).collect::<Vec<_>>());
        let ticks = self.y.ticks();
        let labels = ticks.iter().map(|t| width(&self.y.label(*t), TEXT_SIZE)).max().unwrap_or(0);
        // Labels of the axis, its name, and air between them.
        let y_axis = labels + 3 * TEXT_SIZE + 8;
        let plot = self.plot_width.clamp(MIN_PLOT_WIDTH, MAX_PLOT_WIDTH);
        let entry = |name: &String| width(name, TEXT_SIZE) + 34;
        let legend: u32 = names.iter().map(entry).sum();
        let inner = (y_axis + plot).max(width(&title, TITLE_SIZE)).max(legend);
        let top = MARGIN + 26 + 22;
        let height =
            (top + PLOT_HEIGHT + X_AXIS + MARGIN).max(width(&shown(self.y_name), TEXT_SIZE) + X_AXIS);
        let mut out = String::new();
        {
            let size = (inner + 2 * MARGIN, height);
            let root = SVGBackend::with_string(&mut out, size).into_drawing_area();
            root.fill(&WHITE).map_err(Error::new)?;
            self.head(&root, &title, &names, &entry)?;
            let area = root.margin(top, MARGIN, MARGIN, MARGIN);
            let x = Ticked { low: self.x.0, high: self.x.1, ticks: self.x_ticks.clone() };
            let y = Ticked { low: self.y.low, high: self.y.high, ticks: ticks.clone() };
            let mut chart = ChartBuilder::on(&area)
                .x_label_area_size(X_AXIS)
                .y_label_area_size(y_axis)
                .build_cartesian_2d(x, y)
                .map_err(Error::new)?;
            chart
                .configure_mesh()
                .disable_x_mesh()
                .x_labels(self.x_ticks.len().max(1))
                .y_labels(ticks.len())
                .y_max_light_lines(0)
                .bold_line_style(RGBColor(221, 221, 221))
                .label_style(("sans-serif", TEXT_SIZE))
                .x_label_formatter(x_label)
                .y_label_formatter(&|v| self.y.label(*v))
                .x_desc(shown(self.x_name))
                .y_desc(shown(self.y_name))
                .draw()
                .map_err(Error::new)?;
            draw(&mut chart)?;
            drop(chart);
            root.present().map_err(Error::new)?;
        }
        Ok(out)
    }

    /// Title and legend.
    fn head(
        &self,
        root: &DrawingArea<SVGBackend<'_>, Shift>,
        title: &str,
        names: &[String],
        entry: &dyn Fn(&String) -> u32,
    ) -> Result<(), Error> {
        let left = MARGIN as i32;
        let style = ("sans-serif", TITLE_SIZE).into_font().into_text_style(root);
        root.draw(&Text::new(title.to_owned(), (left, MARGIN as i32), style)).map_err(Error::new)?;
        let top = MARGIN as i32 + 26;
        let mut at = left;
        for (index, name) in names.iter().enumerate() {
            let colour = colour(index);
            let square = [(at, top), (at + 11, top + 11)];
            root.draw(&Rectangle::new(square, colour.filled())).map_err(Error::new)?;
            let style = ("sans-serif", TEXT_SIZE).into_font().color(&BLACK);
            root.draw(&Text::new(name.clone(), (at + 16, top), style)).map_err(Error::new)?;
            at += entry(name) as i32;
        }
        Ok(())
    }
}

/// The colour of a series.
pub(crate) fn colour(index: usize) -> RGBColor {
    COLOURS[index % COLOURS.len()]
}
