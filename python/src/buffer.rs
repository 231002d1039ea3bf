//! Memory that Python sees as an array: decoded, or where it lies in a file.

use std::sync::Arc;

use llmpress_formats::{Dtype, Mapped};
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyDict, PyTuple};

use crate::dlpack;
use crate::errors::invalid;

/// Bytes of a tensor, decoded or where they lie in the file.
#[derive(Debug)]
pub(crate) struct Memory {
    held: Held,
    address: usize,
    bytes: usize,
}

#[derive(Debug)]
enum Held {
    /// Aligned for every dtype.
    Decoded(Vec<u64>),
    Mapped {
        _map: Mapped,
    },
}

impl Memory {
    /// So many bytes, all zero.
    pub(crate) fn zeros(bytes: usize) -> Self {
        let mut words = vec![0; bytes.div_ceil(8)];
        Self { address: words.as_mut_ptr() as usize, held: Held::Decoded(words), bytes }
    }

    /// Some of the mapped bytes.
    pub(crate) fn mapped(mut map: Mapped, offset: usize, bytes: usize) -> Option<Self> {
        offset.checked_add(bytes).filter(|end| *end <= map.len())?;
        Some(Self { address: map.as_mut_ptr() as usize + offset, bytes, held: Held::Mapped { _map: map } })
    }

    /// The bytes to fill, where they are not a file's.
    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        match &mut self.held {
            Held::Decoded(words) => &mut bytemuck::cast_slice_mut(words)[..self.bytes],
            Held::Mapped { .. } => &mut [],
        }
    }

    /// Where they begin.
    pub(crate) fn address(&self) -> *mut u8 {
        self.address as *mut u8
    }

    fn bytes(&self) -> usize {
        self.bytes
    }

    fn is_mapped(&self) -> bool {
        matches!(self.held, Held::Mapped { .. })
    }
}

/// A tensor's memory.
#[pyclass(frozen, module = "llmpress")]
pub(crate) struct Buffer {
    memory: Arc<Memory>,
    dtype: Dtype,
    shape: Vec<u64>,
}

impl Buffer {
    pub(crate) fn new(memory: Memory, dtype: Dtype, shape: Vec<u64>) -> Self {
        Self { memory: Arc::new(memory), dtype, shape }
    }

    /// The shape as arrays have it: elements that are no whole bytes are bytes.
    fn array_shape(&self) -> Vec<u64> {
        if self.dtype.bits() < 8 { vec![self.memory.bytes() as u64] } else { self.shape.clone() }
    }
}

/// The type of an element as NumPy writes it. What it has no name for is unsigned words.
fn typestr(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::BOOL => "|b1",
        Dtype::I8 => "|i1",
        Dtype::I16 => "<i2",
        Dtype::I32 => "<i4",
        Dtype::I64 => "<i8",
        Dtype::U16 | Dtype::BF16 => "<u2",
        Dtype::U32 => "<u4",
        Dtype::U64 => "<u8",
        Dtype::F16 => "<f2",
        Dtype::F32 => "<f4",
        Dtype::F64 => "<f8",
        Dtype::C64 => "<c8",
        _ => "|u1",
    }
}

/// The name in the package `ml_dtypes`, and in torch, of what NumPy has none for.
fn small_float(dtype: Dtype) -> Option<&'static str> {
    match dtype {
        Dtype::BF16 => Some("bfloat16"),
        Dtype::F8_E4M3 => Some("float8_e4m3fn"),
        Dtype::F8_E5M2 => Some("float8_e5m2"),
        Dtype::F8_E4M3FNUZ => Some("float8_e4m3fnuz"),
        Dtype::F8_E5M2FNUZ => Some("float8_e5m2fnuz"),
        Dtype::F8_E8M0 => Some("float8_e8m0fnu"),
        _ => None,
    }
}

#[pymethods]
impl Buffer {
    /// Sizes, outermost first.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.shape)
    }

    /// Its dtype by its name in safetensors.
    #[getter]
    fn dtype(&self) -> &'static str {
        self.dtype.name()
    }

    /// Its size in bytes.
    #[getter]
    fn nbytes(&self) -> usize {
        self.memory.bytes()
    }

    /// Whether it is the file's own bytes, mapped, and no copy.
    #[getter]
    fn is_mapped(&self) -> bool {
        self.memory.is_mapped()
    }

    #[getter]
    fn __array_interface__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let interface = PyDict::new(py);
        interface.set_item("version", 3)?;
        interface.set_item("shape", PyTuple::new(py, self.array_shape())?)?;
        interface.set_item("typestr", typestr(self.dtype))?;
        interface.set_item("data", (self.memory.address() as usize, self.is_mapped()))?;
        Ok(interface)
    }

    #[pyo3(signature = (*, stream=None, max_version=None, dl_device=None, copy=None))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        stream: Option<&Bound<'py, PyAny>>,
        max_version: Option<&Bound<'py, PyAny>>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyCapsule>> {
        // The processor's memory has no streams, and the oldest version will do for every other.
        let _ = (stream, max_version);
        if dl_device.is_some_and(|device| device != (dlpack::CPU, 0)) || copy == Some(true) {
            return Err(pyo3::exceptions::PyBufferError::new_err("only the memory itself is lent"));
        }
        dlpack::lend(py, &self.memory, self.dtype, &self.array_shape())
    }

    fn __dlpack_device__(&self) -> (i32, i32) {
        (dlpack::CPU, 0)
    }

    /// The same memory as a NumPy array.
    fn numpy<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        let array = py.import("numpy")?.call_method1("asarray", (slf,))?;
        let Some(name) = small_float(slf.get().dtype) else { return Ok(array) };
        // Without that package NumPy has no such dtype: words.
        match py.import("ml_dtypes").and_then(|module| module.getattr(name)) {
            Ok(dtype) => array.call_method1("view", (dtype,)),
            Err(_) => Ok(array),
        }
    }

    /// The same memory as a torch tensor.
    fn torch<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        let torch = py.import("torch")?;
        let this = slf.get();
        if this.memory.bytes() == 0 {
            // Some versions take no address of nothing.
            let kwargs = PyDict::new(py);
            kwargs.set_item("dtype", torch.getattr(torch_name(this.dtype))?)?;
            return torch.call_method("empty", (PyTuple::new(py, &this.shape)?,), Some(&kwargs));
        }
        let tensor = torch.call_method1("from_dlpack", (slf,))?;
        match (this.dtype, small_float(this.dtype)) {
            (Dtype::BF16, _) | (_, None) => Ok(tensor),
            (_, Some(name)) => tensor.call_method1("view", (torch.getattr(name)?,)),
        }
    }

    fn __len__(&self) -> PyResult<usize> {
        match self.shape.first() {
            Some(&rows) => Ok(rows as usize),
            None => Err(Python::attach(|py| invalid(py, "a number has no length"))),
        }
    }

    fn __repr__(&self) -> String {
        let place = if self.is_mapped() { "mapped" } else { "decoded" };
        format!("<Buffer {} {:?}, {} bytes, {place}>", self.dtype.name(), self.shape, self.memory.bytes())
    }
}

/// The name of a dtype in torch; bytes where it has none.
fn torch_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::BOOL => "bool",
        Dtype::I8 => "int8",
        Dtype::I16 => "int16",
        Dtype::I32 => "int32",
        Dtype::I64 => "int64",
        Dtype::U16 => "uint16",
        Dtype::U32 => "uint32",
        Dtype::U64 => "uint64",
        Dtype::F16 => "float16",
        Dtype::F32 => "float32",
        Dtype::F64 => "float64",
        Dtype::C64 => "complex64",
        other => small_float(other).unwrap_or("uint8"),
    }
}
