//! A checkpoint: what is in it, and its tensors as memory.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use llmpress_formats::{Base, Checkpoint as Opened, Dtype, Encoding, Error, Tensor};
use pyo3::exceptions::PyKeyError;
use pyo3::prelude::*;
use pyo3::types::{PySlice, PySliceMethods, PyTuple};
use rayon::ThreadPool;
use rayon::prelude::*;

use crate::buffer::{Buffer, Memory};
use crate::dlpack::Borrowed;
use crate::errors::{invalid, of_format};
use crate::linear::Linear;

/// Bytes that a thread decodes at a time.
const PIECE_BYTES: usize = 4 << 20;
/// Rows that encodings store together at most.
const TILE_ROWS: usize = 16;

/// An open checkpoint. What is decoded goes to new memory or the caller's; nothing is decoded before it is asked for.
#[pyclass(frozen, mapping, module = "llmpress")]
pub(crate) struct Checkpoint {
    opened: Arc<Opened>,
    threads: Threads,
}

/// Who decodes.
#[derive(Clone)]
pub(crate) enum Threads {
    /// The thread that asks; products, which are made by a pool, have one of a single thread, once there is one.
    Caller(Arc<OnceLock<ThreadPool>>),
    /// As many as there are processors, shared by all checkpoints.
    All,
    /// Its own.
    Pool(Arc<ThreadPool>),
}

impl Threads {
    fn new(py: Python<'_>, threads: Option<usize>) -> PyResult<Self> {
        match threads {
            None => Ok(Self::All),
            Some(0) => Err(invalid(py, "threads: at least one is needed")),
            Some(1) => Ok(Self::Caller(Arc::default())),
            Some(count) if count > 1024 => Err(invalid(py, "threads: 1024 at most")),
            Some(count) => {
                let pool = pool(count).map_err(|e| invalid(py, format!("threads: {e}")))?;
                Ok(Self::Pool(Arc::new(pool)))
            }
        }
    }

    /// Does a job whose parts go to these threads.
    pub(crate) fn run<R: Send>(&self, job: impl FnOnce() -> R + Send) -> R {
        match self {
            Self::Pool(pool) => pool.install(job),
            Self::All => job(),
            Self::Caller(single) => {
                if single.get().is_none() {
                    // Another thread may have been first; without one, the job takes what threads it finds.
                    let Ok(pool) = pool(1) else { return job() };
                    let _ = single.set(pool);
                }
                match single.get() {
                    Some(pool) => pool.install(job),
                    None => job(),
                }
            }
        }
    }
}

fn pool(threads: usize) -> Result<ThreadPool, rayon::ThreadPoolBuildError> {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build()
}

/// A tensor: what it is and how it is stored.
#[pyclass(frozen, get_all, module = "llmpress")]
pub(crate) struct TensorInfo {
    /// Its name.
    name: String,
    /// Its dtype by its name in safetensors, such as "BF16".
    dtype: &'static str,
    /// Sizes, outermost first.
    shape: Py<PyTuple>,
    /// Its size in bytes when decoded.
    nbytes: u64,
    /// The encoding that it is stored in, such as "raw" or "dfloat11".
    encoding: &'static str,
    /// What of the encoding says how many bits a weight takes, such as "w4,g128"; none where there is nothing to say.
    widths: Option<String>,
    /// The unit that it is stored in, alone or with others.
    unit: String,
    /// Bytes that the unit takes, those of other tensors in it included.
    unit_nbytes: u64,
}

#[pymethods]
impl TensorInfo {
    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let shape = self.shape.bind(py).repr()?;
        Ok(format!(
            "<TensorInfo {}: {} {shape}, {}, {} bytes>",
            self.name, self.dtype, self.encoding, self.nbytes
        ))
    }
}

/// Opens a checkpoint: a directory of any kind that llmpress reads, or a GGUF file.
#[pyfunction]
#[pyo3(signature = (path, *, base=None, threads=None, stored=false))]
pub(crate) fn open(
    py: Python<'_>,
    path: PathBuf,
    base: Option<PathBuf>,
    threads: Option<usize>,
    stored: bool,
) -> PyResult<Checkpoint> {
    crate::limit_instructions(py)?;
    let threads = Threads::new(py, threads)?;
    let opened = py.detach(|| {
        let opened = if stored { Opened::open(&path) } else { Opened::open_dequantised(&path) }?;
        match base {
            Some(base) => opened.with_base(&Base::open(&base)?),
            None => Ok(opened),
        }
    });
    Ok(Checkpoint { opened: Arc::new(opened.map_err(|e| of_format(py, &e))?), threads })
}

impl Checkpoint {
    fn tensor(&self, py: Python<'_>, name: &str) -> PyResult<&Tensor> {
        self.opened.tensor(name).map_err(|e| of_format(py, &e))
    }

    /// The rows that are asked for and the shape of what comes of it.
    fn rows(&self, py: Python<'_>, name: &str, rows: Option<&Bound<'_, PyAny>>) -> PyResult<Rows<'_>> {
        let tensor = self.tensor(py, name)?;
        let Some(rows) = rows else {
            let shape = tensor.shape.clone();
            return Ok(Rows { tensor, shape, offset: 0, bytes: tensor.bytes });
        };
        let Some(&count) = tensor.shape.first() else {
            return Err(invalid(py, format!("tensor {name}: is a number and has no rows")));
        };
        let range = range_of(rows, count)?;
        if range.start > range.end || range.end > count {
            return Err(invalid(py, format!("tensor {name}: rows {range:?} of {count} were asked for")));
        }
        let row = tensor.bytes.checked_div(count).unwrap_or(0);
        if row * count != tensor.bytes {
            return Err(invalid(py, format!("tensor {name}: its rows are no whole bytes")));
        }
        let mut shape = tensor.shape.clone();
        shape[0] = range.end - range.start;
        Ok(Rows { tensor, shape, offset: range.start * row, bytes: (range.end - range.start) * row })
    }

    /// Decodes into memory, with as many threads as are asked for.
    fn fill(&self, name: &str, rows: &Rows<'_>, out: &mut [u8]) -> Result<(), Error> {
        if matches!(self.threads, Threads::Caller(_)) || out.len() <= PIECE_BYTES {
            return self.opened.read(name, rows.offset, out);
        }
        let row =
            rows.tensor.shape.first().map_or(0, |&count| rows.tensor.bytes.checked_div(count).unwrap_or(0));
        // Whole rows, many enough that what is stored together is decoded once.
        let row = usize::try_from(row).unwrap_or(0).max(1);
        let step = (PIECE_BYTES / row).max(1).next_multiple_of(TILE_ROWS) * row;
        self.threads.run(|| {
            out.par_chunks_mut(step)
                .with_max_len(1)
                .enumerate()
                .try_for_each(|(i, part)| self.opened.read(name, rows.offset + (i * step) as u64, part))
        })
    }
}

/// Rows of a tensor.
struct Rows<'a> {
    tensor: &'a Tensor,
    shape: Vec<u64>,
    offset: u64,
    bytes: u64,
}

/// Rows as `slice(a, b)` or `(a, b)`.
fn range_of(rows: &Bound<'_, PyAny>, count: u64) -> PyResult<Range<u64>> {
    if let Ok(slice) = rows.cast::<PySlice>() {
        let found = slice.indices(count as isize)?;
        if found.step != 1 {
            return Err(invalid(rows.py(), "rows: a slice with a step of 1 is needed"));
        }
        let start = found.start as u64;
        return Ok(start..(found.stop as u64).max(start));
    }
    let (start, end) = rows.extract::<(u64, u64)>()?;
    Ok(start..end)
}

#[pymethods]
impl Checkpoint {
    /// The directory, or the file.
    #[getter]
    fn root(&self) -> PathBuf {
        self.opened.root().to_owned()
    }

    /// What it is: "huggingface", "llmpress", "dfloat11" (official) or "gguf".
    #[getter]
    fn kind(&self) -> &'static str {
        self.opened.kind().name()
    }

    /// `config.json` as text; none where there is none.
    #[getter]
    fn config_json(&self) -> Option<String> {
        self.opened.config().map(|config| config.text().to_owned())
    }

    /// Tensors that share another one's weights, with the tensor that is stored.
    #[getter]
    fn tied(&self) -> std::collections::BTreeMap<String, String> {
        self.opened.tied().clone()
    }

    /// What was done to the weights beside storing them, such as "rotation of residual"; those that whoever runs the model has to go
    /// on with, for every token, begin with "online: ".
    #[getter]
    fn transforms(&self) -> Vec<String> {
        let all = self.opened.transforms().iter();
        all.map(|t| if t.online() { format!("online: {}", t.name()) } else { t.name() }).collect()
    }

    /// The names of all tensors, in order.
    fn keys(&self) -> Vec<String> {
        self.opened.tensors().keys().cloned().collect()
    }

    fn __len__(&self) -> usize {
        self.opened.tensors().len()
    }

    fn __contains__(&self, name: &str) -> bool {
        self.opened.tensor(name).is_ok()
    }

    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        Ok(self.keys().into_pyobject(py)?.try_iter()?.into_any())
    }

    fn __getitem__(&self, py: Python<'_>, name: &str) -> PyResult<TensorInfo> {
        match self.opened.tensor(name) {
            Ok(_) => self.info(py, name),
            Err(e) => Err(PyKeyError::new_err(e.to_string())),
        }
    }

    /// What a tensor is and how it is stored.
    fn info(&self, py: Python<'_>, name: &str) -> PyResult<TensorInfo> {
        let tensor = self.tensor(py, name)?;
        let unit = self.opened.unit_of(tensor).map_err(|e| of_format(py, &e))?;
        Ok(TensorInfo {
            name: name.to_owned(),
            dtype: tensor.dtype.name(),
            shape: PyTuple::new(py, &tensor.shape)?.unbind(),
            nbytes: tensor.bytes,
            encoding: unit.encoding().name(),
            widths: unit.encoding().widths(),
            unit: tensor.unit.clone(),
            unit_nbytes: unit.stored_bytes(),
        })
    }

    /// A tensor, or rows of it: where it lies if it is stored raw, else decoded into new memory.
    #[pyo3(signature = (name, rows=None, *, copy=None))]
    fn read(
        &self,
        py: Python<'_>,
        name: &str,
        rows: Option<&Bound<'_, PyAny>>,
        copy: Option<bool>,
    ) -> PyResult<Buffer> {
        let rows = self.rows(py, name, rows)?;
        let dtype = rows.tensor.dtype;
        if copy != Some(true) {
            if let Some(memory) = self.mapped(py, &rows)? {
                return Ok(Buffer::new(memory, dtype, rows.shape));
            }
            if copy == Some(false) {
                return Err(invalid(
                    py,
                    format!(
                        "tensor {name}: cannot be had without a copy: it is not stored raw, or not aligned"
                    ),
                ));
            }
        }
        let memory = py.detach(|| {
            let mut memory = Memory::zeros(usize::try_from(rows.bytes).unwrap_or(usize::MAX));
            self.fill(name, &rows, memory.as_mut_slice()).map(|()| memory)
        });
        Ok(Buffer::new(memory.map_err(|e| of_format(py, &e))?, dtype, rows.shape))
    }

    /// Decodes a tensor, or rows of it, into a NumPy array or a torch tensor.
    #[pyo3(signature = (name, out, rows=None))]
    fn read_into(
        &self,
        py: Python<'_>,
        name: &str,
        out: &Bound<'_, PyAny>,
        rows: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let rows = self.rows(py, name, rows)?;
        let mut borrowed = Borrowed::of(out, rows.tensor.dtype)?;
        if borrowed.bytes() as u64 != rows.bytes {
            return Err(invalid(
                py,
                format!("tensor {name}: {} bytes do not go into {}", rows.bytes, borrowed.bytes()),
            ));
        }
        let out = borrowed.as_mut_slice();
        py.detach(|| self.fill(name, &rows, out)).map_err(|e| of_format(py, &e))
    }

    /// Rows of a matrix by their numbers, in this order: what an embedding does.
    fn gather(&self, py: Python<'_>, name: &str, rows: Vec<u64>) -> PyResult<Buffer> {
        let tensor = self.tensor(py, name)?;
        let count = tensor.shape.first().copied().unwrap_or(0);
        if let Some(row) = rows.iter().find(|row| **row >= count) {
            return Err(invalid(py, format!("tensor {name}: row {row} of {count} was asked for")));
        }
        let row = usize::try_from(tensor.bytes / count.max(1)).unwrap_or(0);
        let mut shape = tensor.shape.clone();
        shape[..1].copy_from_slice(&[rows.len() as u64]);
        let memory = py.detach(|| {
            let mut memory = Memory::zeros(row * rows.len());
            let out = memory.as_mut_slice();
            let read = |(out, row): (&mut [u8], &u64)| self.opened.read_rows(name, *row..*row + 1, out);
            let done = match self.threads {
                Threads::Caller(_) => out.chunks_mut(row.max(1)).zip(&rows).try_for_each(read),
                _ => self.threads.run(|| out.par_chunks_mut(row.max(1)).zip(&rows).try_for_each(read)),
            };
            done.map(|()| memory)
        });
        Ok(Buffer::new(memory.map_err(|e| of_format(py, &e))?, tensor.dtype, shape))
    }

    /// The stored tensors of the unit that a tensor is stored in, by the last part of their names, where they lie.
    fn components(&self, py: Python<'_>, name: &str) -> PyResult<std::collections::BTreeMap<String, Buffer>> {
        let unit = self.opened.unit_of(self.tensor(py, name)?).map_err(|e| of_format(py, &e))?;
        let lent = unit.components().iter().map(|(name, component)| {
            let memory = match component.bytes() {
                0 => Some(Memory::zeros(0)),
                bytes => Memory::mapped(component.map().map_err(|e| of_format(py, &e))?, 0, bytes as usize),
            };
            let memory = memory.ok_or_else(|| invalid(py, format!("component {name}: is not there")))?;
            Ok((name.to_owned(), Buffer::new(memory, component.dtype(), component.shape().to_vec())))
        });
        lent.collect()
    }

    /// A matrix to multiply by, from the form that it is stored in.
    fn linear(&self, py: Python<'_>, name: &str) -> PyResult<Linear> {
        let &[rows, cols] = &self.tensor(py, name)?.shape[..] else {
            return Err(invalid(py, format!("tensor {name}: is no matrix")));
        };
        let opened = py.detach(|| {
            self.threads
                .run(|| llmpress_model::Linear::open(&self.opened, name, rows as usize, cols as usize, None))
        });
        Ok(Linear::new(self.opened.clone(), self.threads.clone(), opened.map_err(|e| of_format(py, &e))?))
    }

    /// Refuses a checkpoint whose files changed since it was opened.
    fn check_unchanged(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.opened.check_unchanged()).map_err(|e| of_format(py, &e))
    }

    fn __repr__(&self) -> String {
        format!("<Checkpoint {}: {}, {} tensors>", self.opened.root().display(), self.kind(), self.__len__())
    }
}

impl Checkpoint {
    /// The file's own bytes of these rows, where they are what is asked for.
    fn mapped(&self, py: Python<'_>, rows: &Rows<'_>) -> PyResult<Option<Memory>> {
        let unit = self.opened.unit_of(rows.tensor).map_err(|e| of_format(py, &e))?;
        if *unit.encoding() != Encoding::Raw || !rows.tensor.is_stored() || rows.bytes == 0 {
            return Ok(None);
        }
        let [component] = &unit.components().values().collect::<Vec<_>>()[..] else { return Ok(None) };
        if component.bytes() != rows.tensor.bytes {
            return Ok(None);
        }
        if !(component.file_offset() + rows.offset).is_multiple_of(alignment(rows.tensor.dtype)) {
            return Ok(None);
        }
        let map = py.detach(|| component.map()).map_err(|e| of_format(py, &e))?;
        Ok(Memory::mapped(map, rows.offset as usize, rows.bytes as usize))
    }
}

/// What the address of an element must be a multiple of.
fn alignment(dtype: Dtype) -> u64 {
    match dtype {
        Dtype::C64 => 4,
        dtype => u64::from(dtype.bits()).div_ceil(8),
    }
}
