//! Bars and lines as SVG.
//!
//! ```text
//! title
//! [] series  [] series
//! y  |  ||  |
//!    +----------- x          round ticks, named axes, wide enough for all of it
//! ```
//!
//! ```
//! # fn main() -> Result<(), llmpress_plot::Error> {
//! let lines = llmpress_plot::Lines {
//!     title: "perplexity".into(),
//!     x: "sub-layers removed".into(),
//!     y: "perplexity".into(),
//!     series: vec![("finercut".into(), vec![(0.0, 9.1), (4.0, 9.4), (8.0, 10.2)])],
//! };
//! assert!(lines.svg()?.starts_with("<svg"));
//! # Ok(())
//! # }
//! ```

mod axis;
mod bars;
mod frame;
mod lines;

pub use bars::{Bar, Bars};
pub use lines::Lines;

/// A picture that could not be drawn.
#[derive(Debug, thiserror::Error)]
#[error("the picture cannot be drawn: {0}")]
pub struct Error(String);

impl Error {
    fn new(error: impl std::fmt::Display) -> Self {
        Self(error.to_string())
    }
}
