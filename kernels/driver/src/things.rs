//! What is made on GPUs, each known to its caller by a handle.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use llmpress_emulator::{Emulator, Parameter};

use crate::capture::Capture;
use crate::code::Code;
use crate::work::Work;

/// What stands for a pointer to something of the driver's. Never followed.
pub(crate) type Handle = usize;

/// Shared memory that a block has without being asked for.
const PLAIN_SHARED: u32 = 48 << 10;

/// A GPU and its primary context.
#[derive(Debug, Default)]
pub(crate) struct Device {
    pub(crate) retained: usize,
    pub(crate) context: Handle,
    /// What every call returns since a kernel failed.
    pub(crate) broken: Option<Code>,
    /// Its memory and its processors, while the context lives.
    pub(crate) emulator: Option<Emulator>,
    pub(crate) allocations: BTreeMap<u64, usize>,
    pub(crate) used: usize,
}

#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) context: Handle,
    /// Whether it waits for the legacy stream and the legacy stream for it.
    pub(crate) blocking: bool,
    /// What was not waited for.
    pub(crate) queue: VecDeque<Work>,
    pub(crate) capture: Option<Capture>,
}

#[derive(Debug)]
pub(crate) struct Event {
    pub(crate) context: Handle,
    pub(crate) timing: bool,
    pub(crate) recorded: Recorded,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Recorded {
    Never,
    /// On a stream that has not come to it.
    Queued(Handle),
    /// In a capture.
    Captured,
    /// By its GPU's clock.
    At(Duration),
}

#[derive(Debug)]
pub(crate) struct Module {
    pub(crate) context: Handle,
    pub(crate) entries: Vec<crate::ptx::Entry>,
}

#[derive(Clone, Debug)]
pub(crate) struct Function {
    pub(crate) module: Handle,
    pub(crate) file: &'static str,
    pub(crate) name: &'static str,
    pub(crate) parameters: Vec<Parameter>,
    pub(crate) threads: u32,
    /// Dynamic shared memory that it may be launched with.
    pub(crate) shared: u32,
}

/// A graph, or an executable one.
#[derive(Debug)]
pub(crate) struct Graph {
    pub(crate) context: Handle,
    pub(crate) work: Arc<[Work]>,
}

/// What a handle of cuBLAS stands for.
#[derive(Debug)]
pub(crate) struct Cublas {
    pub(crate) device: usize,
    pub(crate) stream: Handle,
    pub(crate) workspace: Option<(u64, usize)>,
}

impl Function {
    pub(crate) fn new(
        module: Handle,
        file: &'static str,
        name: &'static str,
        parameters: Vec<Parameter>,
        threads: Option<u32>,
    ) -> Self {
        Self { module, file, name, parameters, threads: threads.unwrap_or(1024), shared: PLAIN_SHARED }
    }
}
