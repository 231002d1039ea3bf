//! Errors as the package's exceptions, which are defined in Python: some of them are built-in ones, too.

use llmpress_formats::Error;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

/// The exception of a kind of error.
fn class_name(kind: &str) -> &'static str {
    match kind {
        "io" => "IoError",
        "corrupt" => "CorruptError",
        "unsupported" => "UnsupportedError",
        "invalid" | "usage" => "InvalidError",
        "limit" => "LimitError",
        "mismatch" => "MismatchError",
        "refused" => "HubError",
        "findings" => "FindingsError",
        _ => "LlmpressError",
    }
}

/// The exception for an error of this kind.
pub(crate) fn of_kind(py: Python<'_>, kind: &str, message: String) -> PyErr {
    let class = py.import("llmpress._errors").and_then(|module| module.getattr(class_name(kind)));
    match class.and_then(|class| class.call1((message.clone(),))) {
        Ok(exception) => PyErr::from_value(exception),
        // The package is not there as a whole.
        Err(_) => PyRuntimeError::new_err(message),
    }
}

/// The exception for an error of a checkpoint.
pub(crate) fn of_format(py: Python<'_>, error: &Error) -> PyErr {
    of_kind(py, error.kind(), error.to_string())
}

/// An argument that makes no sense.
pub(crate) fn invalid(py: Python<'_>, message: impl Into<String>) -> PyErr {
    of_kind(py, "invalid", message.into())
}
