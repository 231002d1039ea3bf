//! Work of a stream.

use std::sync::Arc;

use llmpress_kernels::gpu::Argument;

use crate::product::Product;

#[derive(Clone, Debug)]
pub(crate) enum Work {
    Write {
        to: u64,
        data: Arc<[u8]>,
    },
    Copy {
        from: u64,
        to: u64,
        bytes: usize,
    },
    Fill {
        at: u64,
        value: u8,
        bytes: usize,
    },
    Launch(Arc<Launched>),
    /// An event, by its handle.
    Record(usize),
    Graph(Arc<[Work]>),
    Product(Product),
}

/// A launch.
#[derive(Debug)]
pub(crate) struct Launched {
    pub(crate) module: usize,
    pub(crate) file: &'static str,
    pub(crate) kernel: &'static str,
    pub(crate) grid: [u32; 3],
    pub(crate) block: u32,
    pub(crate) shared: u32,
    pub(crate) arguments: Vec<Argument>,
    /// Whether it may begin before the launch before it has ended.
    pub(crate) overlaps: bool,
}
