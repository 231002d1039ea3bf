//! The report as files.

use std::path::Path;

use llmpress_formats::{Error, Result, write_atomic};

use super::page::page;
use super::report::Report;

/// The report in the output directory.
pub const REPORT_JSON: &str = "report.json";
/// The same as a page.
pub const REPORT_PAGE: &str = "report.md";

/// Writes both files, each whole or not at all, so many seconds after everything began.
pub(super) fn write(report: &mut Report, out: &Path, seconds: f64) -> Result<()> {
    report.stamp(seconds);
    let json =
        serde_json::to_vec_pretty(report).map_err(|e| Error::Invalid(format!("{REPORT_JSON}: {e}")))?;
    write_atomic(&out.join(REPORT_JSON), &json)?;
    write_atomic(&out.join(REPORT_PAGE), page(report).as_bytes())
}
