//! DLPack: tensors that Python packages pass to each other without a copy.
//!
//! ```text
//! Memory --lend--> capsule "dltensor" --> torch.from_dlpack            whoever takes it keeps the memory alive
//! array, tensor --__dlpack__--> capsule --borrow--> bytes to fill      where they are contiguous, in this memory, of the right dtype
//! ```
//!
//! The structures are those of `dlpack.h`, version 0.8, which every consumer takes.

use std::ffi::{CStr, c_void};
use std::ptr::NonNull;
use std::sync::Arc;

use llmpress_formats::Dtype;
use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyCapsuleMethods};

use crate::buffer::Memory;
use crate::errors::invalid;

/// What a capsule is called that nobody has taken yet.
const NAME: &CStr = c"dltensor";
/// The processor's memory, as `DLDeviceType` counts it.
pub(crate) const CPU: i32 = 1;

#[repr(C)]
struct Device {
    kind: i32,
    number: i32,
}

/// `DLDataType`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq)]
pub(crate) struct Type {
    code: u8,
    bits: u8,
    lanes: u16,
}

const INT: u8 = 0;
const UINT: u8 = 1;
const FLOAT: u8 = 2;
const BFLOAT: u8 = 4;
const COMPLEX: u8 = 5;
const BOOL: u8 = 6;

impl Type {
    /// The type of a dtype's elements. Small floats are lent as bytes: what takes them may not know theirs.
    fn of(dtype: Dtype) -> Self {
        let code = match dtype {
            Dtype::BOOL => BOOL,
            Dtype::I8 | Dtype::I16 | Dtype::I32 | Dtype::I64 => INT,
            Dtype::F16 | Dtype::F32 | Dtype::F64 => FLOAT,
            Dtype::BF16 => BFLOAT,
            Dtype::C64 => COMPLEX,
            _ => UINT,
        };
        Self { code, bits: dtype.bits().max(8) as u8, lanes: 1 }
    }

    /// Whether elements of a dtype may be written where elements of this type lie: its own, or unsigned words of the same size.
    fn takes(self, dtype: Dtype) -> bool {
        let own = Self::of(dtype);
        self == own || self == Self { code: UINT, ..own }
    }
}

#[repr(C)]
struct Tensor {
    data: *mut c_void,
    device: Device,
    dimensions: i32,
    dtype: Type,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

#[repr(C)]
struct Managed {
    tensor: Tensor,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Managed)>,
}

/// What lives as long as a lent tensor does.
struct Lent {
    managed: Managed,
    shape: Vec<i64>,
    _memory: Arc<Memory>,
}

#[allow(unsafe_code)]
unsafe extern "C" fn delete(managed: *mut Managed) {
    if managed.is_null() {
        return;
    }
    // SAFETY: `context` is the box that `lend` let go of, and a consumer deletes once.
    drop(unsafe { Box::from_raw((*managed).context.cast::<Lent>()) });
}

#[allow(unsafe_code)]
unsafe extern "C" fn drop_capsule(capsule: *mut ffi::PyObject) {
    // SAFETY: called by the interpreter with the capsule; one that was taken has another name and belongs to whoever took it.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, NAME.as_ptr()) == 1 {
            delete(ffi::PyCapsule_GetPointer(capsule, NAME.as_ptr()).cast());
        }
    }
}

/// Lends memory as a tensor.
pub(crate) fn lend<'py>(
    py: Python<'py>,
    memory: &Arc<Memory>,
    dtype: Dtype,
    shape: &[u64],
) -> PyResult<Bound<'py, PyCapsule>> {
    let shape: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
    let tensor = Tensor {
        data: memory.address().cast(),
        device: Device { kind: CPU, number: 0 },
        dimensions: shape.len() as i32,
        dtype: Type::of(dtype),
        shape: std::ptr::null_mut(),
        strides: std::ptr::null_mut(),
        byte_offset: 0,
    };
    let managed = Managed { tensor, context: std::ptr::null_mut(), deleter: Some(delete) };
    let lent = Box::into_raw(Box::new(Lent { managed, shape, _memory: memory.clone() }));
    #[allow(unsafe_code)]
    // SAFETY: the box was just made and nobody else has it; the vector's own memory stays where it is.
    let managed = unsafe {
        (*lent).managed.tensor.shape = (*lent).shape.as_mut_ptr();
        (*lent).managed.context = lent.cast();
        NonNull::new_unchecked(&raw mut (*lent).managed)
    };
    #[allow(unsafe_code)]
    // SAFETY: the pointer is that of a managed tensor, as the name says, and the destructor frees it.
    unsafe {
        PyCapsule::new_with_pointer_and_destructor(py, managed.cast(), NAME, Some(drop_capsule))
    }
}

/// Memory of another package, lent to us until the capsule goes.
pub(crate) struct Borrowed<'py> {
    _capsule: Bound<'py, PyCapsule>,
    address: usize,
    bytes: usize,
    shape: Vec<usize>,
}

impl<'py> Borrowed<'py> {
    /// Asks an array or a tensor for its memory: contiguous, in the processor's memory, of this dtype (or of unsigned words as large).
    pub(crate) fn of(object: &Bound<'py, PyAny>, dtype: Dtype) -> PyResult<Self> {
        let py = object.py();
        let capsule = object.call_method0("__dlpack__")?.cast_into::<PyCapsule>()?;
        let pointer = capsule.pointer_checked(Some(NAME))?.cast::<Managed>();
        #[allow(unsafe_code)]
        // SAFETY: a capsule of this name holds a managed tensor, which lives as long as the capsule.
        let tensor = unsafe { &pointer.as_ref().tensor };
        let dimensions = usize::try_from(tensor.dimensions).unwrap_or(0);
        let numbers = |pointer: *const i64| -> Vec<i64> {
            if pointer.is_null() || dimensions == 0 {
                return Vec::new();
            }
            #[allow(unsafe_code)]
            // SAFETY: so many numbers, by the structure's definition.
            unsafe { std::slice::from_raw_parts(pointer, dimensions) }.to_vec()
        };
        let shape: Vec<usize> =
            numbers(tensor.shape).iter().map(|&n| usize::try_from(n).unwrap_or(0)).collect();
        let elements = shape.iter().try_fold(1usize, |all, &n| all.checked_mul(n));
        let bytes = elements.and_then(|n| n.checked_mul(usize::from(tensor.dtype.bits) / 8));
        if tensor.device.kind != CPU {
            return Err(invalid(
                py,
                "memory of another device: give an array or a tensor of the processor's",
            ));
        }
        if !tensor.dtype.takes(dtype) {
            return Err(invalid(
                py,
                format!(
                    "elements of another dtype: give {0}, or unsigned words of {1} bits",
                    dtype.name(),
                    dtype.bits()
                ),
            ));
        }
        let strides = numbers(tensor.strides);
        let mut expected = 1i64;
        for (&stride, &size) in strides.iter().zip(&shape).rev() {
            if size > 1 && stride != expected && elements != Some(0) {
                return Err(invalid(
                    py,
                    "memory that is not contiguous: give a C-contiguous array or tensor",
                ));
            }
            expected = expected.saturating_mul(size as i64);
        }
        let address = (tensor.data as usize).checked_add(tensor.byte_offset as usize);
        match address.zip(bytes) {
            Some((address, bytes)) => Ok(Self { _capsule: capsule, address, bytes, shape }),
            None => Err(PyBufferError::new_err("a size that is none")),
        }
    }

    /// Sizes, outermost first.
    pub(crate) fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// All its bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether some byte is of both.
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        let ends = |one: &Self| one.address.saturating_add(one.bytes);
        self.bytes > 0 && other.bytes > 0 && self.address < ends(other) && other.address < ends(self)
    }

    /// Its bytes to write to.
    #[allow(unsafe_code)]
    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        if self.bytes == 0 {
            return &mut [];
        }
        // SAFETY: so many bytes are there, while the capsule is; that nobody else writes to them meanwhile is what the caller promises whoever
        // has an array filled, in any package.
        unsafe { std::slice::from_raw_parts_mut(self.address as *mut u8, self.bytes) }
    }
}
