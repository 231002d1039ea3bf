//! The Python package.
//!
//! ```text
//! llmpress.open(DIR) --> Checkpoint --> Buffer                  NumPy and torch memory: decoded, or where it lies
//!                            '--------> Linear                  products from compressed weights, for transformers
//! llmpress.convert(...) --> call --> the command's own verbs    progress, warnings, Ctrl-C
//! llmpress ...          --> main --> the command
//! ```
//!
//! No logic of its own: what a verb does is in the command's crates, how a tensor is read in `llmpress-formats`.

mod buffer;
mod checkpoint;
mod dlpack;
mod errors;
mod job;
mod linear;

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::OnceLock;

use pyo3::prelude::*;

/// Keeps kernels to the instructions that the environment allows, when something is to be read or done for the first time.
fn limit_instructions(py: Python<'_>) -> PyResult<()> {
    static LIMITED: OnceLock<Result<(), String>> = OnceLock::new();
    LIMITED.get_or_init(llmpress_cli::limit_instructions).clone().map_err(|e| errors::invalid(py, e))
}

/// Runs the command with these arguments, the first of which is its name; `itself` is the program that does so.
#[pyfunction]
fn main(py: Python<'_>, arguments: Vec<OsString>, itself: Option<PathBuf>) -> u8 {
    let code = py.detach(|| llmpress_cli::main(arguments, itself));
    // An `ExitCode` says nothing of itself: there is no other than these two and what is usage.
    [0, 1, 2].into_iter().find(|n| std::process::ExitCode::from(*n) == code).unwrap_or(1)
}

#[pymodule(gil_used = false)]
fn _llmpress(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<buffer::Buffer>()?;
    module.add_class::<checkpoint::Checkpoint>()?;
    module.add_class::<checkpoint::TensorInfo>()?;
    module.add_class::<linear::Linear>()?;
    module.add_function(wrap_pyfunction!(job::call, module)?)?;
    module.add_function(wrap_pyfunction!(job::download, module)?)?;
    module.add_function(wrap_pyfunction!(checkpoint::open, module)?)?;
    module.add_function(wrap_pyfunction!(main, module)?)
}
