//! `raw`: a tensor's own bytes.
//!
//! ```text
//! <tensor>   dtype and shape of the tensor
//! ```

use super::{ComponentSet, ComponentSpec, Part, single};
use crate::{Component, Dtype, Result};

/// The only component.
pub const DATA: &str = "data";

/// The components of a raw tensor.
pub fn components(dtype: Dtype, shape: &[u64]) -> Vec<ComponentSpec> {
    vec![ComponentSpec { name: DATA, dtype, shape: shape.to_vec() }]
}

#[derive(Debug)]
pub(super) struct Reader {
    data: Component,
}

impl Reader {
    pub(super) fn open(set: ComponentSet<'_>, parts: &[Part]) -> Result<Self> {
        let part = single(&set, parts)?;
        let data = set.get(DATA)?;
        data.require(part.dtype, part.bytes)?;
        Ok(Self { data })
    }

    pub(super) fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.data.read_at(offset, out)
    }
}
