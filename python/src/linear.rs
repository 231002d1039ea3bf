//! A matrix to multiply by, from the form that it is stored in.

use std::sync::Arc;

use llmpress_formats::{Checkpoint, Dtype};
use llmpress_model::Panels;
use pyo3::prelude::*;

use crate::checkpoint::Threads;
use crate::dlpack::Borrowed;
use crate::errors::{invalid, of_format};

/// `y = W x`, where W lies as it is stored.
#[pyclass(frozen, module = "llmpress")]
pub(crate) struct Linear {
    checkpoint: Arc<Checkpoint>,
    threads: Threads,
    linear: llmpress_model::Linear,
}

impl Linear {
    pub(crate) fn new(checkpoint: Arc<Checkpoint>, threads: Threads, linear: llmpress_model::Linear) -> Self {
        Self { checkpoint, threads, linear }
    }
}

#[pymethods]
impl Linear {
    /// Output features.
    #[getter]
    fn out_features(&self) -> usize {
        self.linear.rows()
    }

    /// Input features.
    #[getter]
    fn in_features(&self) -> usize {
        self.linear.cols()
    }

    /// Bits to which its inputs are quantised; none where they are not.
    #[getter]
    fn activation_bits(&self) -> Option<u8> {
        self.linear.activation_bits()
    }

    /// Multiplies: `x` is float32 `[tokens, in_features]`, `out` float32 `[tokens, out_features]` and is filled.
    fn multiply(&self, py: Python<'_>, x: &Bound<'_, PyAny>, out: &Bound<'_, PyAny>) -> PyResult<()> {
        let (mut x, mut out) = (Borrowed::of(x, Dtype::F32)?, Borrowed::of(out, Dtype::F32)?);
        let (rows, cols) = (self.linear.rows(), self.linear.cols());
        let tokens = match (x.shape(), out.shape()) {
            (&[tokens, features], &[others, outputs])
                if tokens == others && features == cols && outputs == rows =>
            {
                tokens
            }
            (x, out) => {
                return Err(invalid(
                    py,
                    format!("multiplies [tokens, {cols}] to [tokens, {rows}], not {x:?} to {out:?}"),
                ));
            }
        };
        if x.overlaps(&out) {
            return Err(invalid(py, "x and out share memory: give the product a place of its own"));
        }
        let (x, out): (&[u8], &mut [u8]) = (x.as_mut_slice(), out.as_mut_slice());
        if tokens == 0 || rows == 0 || cols == 0 {
            out.fill(0);
            return Ok(());
        }
        let (Ok(x), Ok(out)) =
            (bytemuck::try_cast_slice::<_, f32>(x), bytemuck::try_cast_slice_mut::<_, f32>(out))
        else {
            return Err(invalid(py, "memory that is not aligned to its elements"));
        };
        let done = py.detach(|| {
            self.threads.run(|| {
                let mut panels = Panels::zeros(cols, tokens);
                for (token, values) in x.chunks_exact(cols).enumerate() {
                    panels.set_token(token, values.iter().copied());
                }
                let mut product = Panels::zeros(rows, tokens);
                self.linear.multiply(&self.checkpoint, &panels, &mut product)?;
                for (token, values) in out.chunks_exact_mut(rows).enumerate() {
                    values.iter_mut().zip(product.token(token)).for_each(|(to, value)| *to = value);
                }
                Ok(())
            })
        });
        done.map_err(|e: llmpress_formats::Error| of_format(py, &e))
    }

    fn __repr__(&self) -> String {
        format!("<Linear {} {} x {}>", self.linear.tensor(), self.linear.rows(), self.linear.cols())
    }
}
