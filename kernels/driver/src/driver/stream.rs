//! Streams and captures.

use std::collections::VecDeque;

use super::give;
use crate::capture::{Mode, exchange};
use crate::code::{Code, Outcome};
use crate::state::{State, enter};
use crate::things::{Graph, Handle, Recorded, Stream};

/// Makes a stream.
///
/// # Safety
/// `stream` is null or has room for a handle.
unsafe fn create(state: &mut State, stream: *mut Handle, flags: u32) -> Outcome {
    let device = state.current()?;
    // CU_STREAM_NON_BLOCKING is 1.
    if flags > 1 {
        return Err(Code::INVALID_VALUE);
    }
    let (context, made) = (state.devices[device].context, state.handle());
    let blocking = flags == 0;
    state.streams.insert(made, Stream { context, blocking, queue: VecDeque::new(), capture: None });
    // SAFETY: as the caller promises.
    unsafe { give(stream, made) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamCreate(stream: *mut Handle, flags: u32) -> i32 {
    // SAFETY: the caller gives room for a handle.
    enter("cuStreamCreate", |state| unsafe { create(state, stream, flags) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamCreateWithPriority(stream: *mut Handle, flags: u32, _priority: i32) -> i32 {
    // SAFETY: the caller gives room for a handle.
    enter("cuStreamCreateWithPriority", |state| unsafe { create(state, stream, flags) })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamDestroy_v2(stream: Handle) -> i32 {
    enter("cuStreamDestroy_v2", |state| {
        let stream = state.stream(stream)?;
        if state.streams.get(&stream).is_some_and(|found| found.context == stream) {
            return Err(Code::INVALID_HANDLE);
        }
        if state.capturing(stream) {
            state.log.fault("a stream destroyed while it records");
        }
        // What it was given is done all the same.
        let done = state.drain(stream);
        state.streams.remove(&stream);
        done
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamSynchronize(stream: Handle) -> i32 {
    enter("cuStreamSynchronize", |state| {
        let stream = state.stream(stream)?;
        state.waits("cuStreamSynchronize", Some(stream))?;
        state.potentially_unsafe("cuStreamSynchronize")?;
        state.drain(stream)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamQuery(stream: Handle) -> i32 {
    enter("cuStreamQuery", |state| {
        let stream = state.stream(stream)?;
        state.waits("cuStreamQuery", Some(stream))?;
        state.drain(stream)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamWaitEvent(stream: Handle, event: Handle, _flags: u32) -> i32 {
    enter("cuStreamWaitEvent", |state| {
        state.stream(stream)?;
        match state.events.get(&event).map(|event| event.recorded) {
            None => Err(state.wrong("event")),
            // All that the event is behind is done now, which is early enough.
            Some(Recorded::Queued(other)) => state.drain(other),
            Some(_) => Ok(()),
        }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamBeginCapture_v2(stream: Handle, mode: u32) -> i32 {
    enter("cuStreamBeginCapture_v2", |state| {
        let mode = Mode::new(mode)?;
        state.begin_capture(stream, mode)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamEndCapture(stream: Handle, graph: *mut Handle) -> i32 {
    enter("cuStreamEndCapture", |state| {
        // SAFETY: the caller gives room for a handle.
        unsafe { give(graph, 0) }?;
        let work = state.end_capture(stream)?;
        state.log.note(format!("{} nodes", work.len()));
        let device = state.current()?;
        let (context, made) = (state.devices[device].context, state.handle());
        state.graphs.insert(made, Graph { context, work: work.into() });
        // SAFETY: the caller gives room for a handle.
        unsafe { give(graph, made) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamIsCapturing(stream: Handle, status: *mut u32) -> i32 {
    enter("cuStreamIsCapturing", |state| {
        let found = state.capture_status(stream)?;
        // SAFETY: the caller gives room for a number.
        unsafe { give(status, found) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuThreadExchangeStreamCaptureMode(mode: *mut u32) -> i32 {
    enter("cuThreadExchangeStreamCaptureMode", |_| {
        // SAFETY: the caller gives a number, and room for one.
        let wanted = unsafe { mode.as_ref() }.copied().ok_or(Code::INVALID_VALUE)?;
        let before = exchange(Mode::new(wanted)?);
        // SAFETY: as before.
        unsafe { give(mode, before as u32) }
    })
}
