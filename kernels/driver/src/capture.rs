//! What a stream records, and how threads mind it.

use std::cell::Cell;
use std::thread::ThreadId;

use crate::code::{Code, Outcome};
use crate::work::Work;

/// `CUstreamCaptureMode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Global,
    ThreadLocal,
    Relaxed,
}

impl Mode {
    pub(crate) fn new(mode: u32) -> Outcome<Self> {
        match mode {
            0 => Ok(Self::Global),
            1 => Ok(Self::ThreadLocal),
            2 => Ok(Self::Relaxed),
            _ => Err(Code::INVALID_VALUE),
        }
    }
}

/// What a stream records.
#[derive(Debug)]
pub(crate) struct Capture {
    pub(crate) mode: Mode,
    pub(crate) thread: ThreadId,
    pub(crate) work: Vec<Work>,
    /// Something was called that is not allowed: nothing comes of it.
    pub(crate) invalid: bool,
}

thread_local! {
    /// How the calling thread minds captures, its own and others'.
    static MINDS: Cell<Mode> = const { Cell::new(Mode::Global) };
}

/// Sets how the calling thread minds captures.
pub(crate) fn exchange(mode: Mode) -> Mode {
    MINDS.replace(mode)
}

/// How the calling thread minds captures.
pub(crate) fn minds() -> Mode {
    MINDS.get()
}
