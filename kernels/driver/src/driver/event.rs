//! Events.

use std::time::Duration;

use super::give;
use crate::code::{Code, Outcome};
use crate::state::{State, enter};
use crate::things::{Event, Handle, Recorded};
use crate::work::Work;

/// CU_EVENT_DISABLE_TIMING.
const NO_TIMING: u32 = 2;

fn find(state: &mut State, event: Handle) -> Outcome<(bool, Recorded)> {
    let device = state.current()?;
    let context = state.devices[device].context;
    match state.events.get(&event) {
        Some(found) if found.context == context => Ok((found.timing, found.recorded)),
        Some(_) => {
            state.log.fault("an event of another context");
            Err(Code::INVALID_CONTEXT)
        }
        None => Err(state.wrong("event")),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventCreate(event: *mut Handle, flags: u32) -> i32 {
    enter("cuEventCreate", |state| {
        let device = state.current()?;
        let (context, made) = (state.devices[device].context, state.handle());
        let timing = flags & NO_TIMING == 0;
        state.events.insert(made, Event { context, timing, recorded: Recorded::Never });
        // SAFETY: the caller gives room for a handle.
        unsafe { give(event, made) }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventDestroy_v2(event: Handle) -> i32 {
    enter("cuEventDestroy_v2", |state| {
        find(state, event)?;
        state.events.remove(&event);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventRecord(event: Handle, stream: Handle) -> i32 {
    enter("cuEventRecord", |state| {
        find(state, event)?;
        let stream = state.stream(stream)?;
        state.put(stream, Work::Record(event))?;
        let recorded = if state.capturing(stream) { Recorded::Captured } else { Recorded::Queued(stream) };
        if let Some(found) = state.events.get_mut(&event) {
            found.recorded = recorded;
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventSynchronize(event: Handle) -> i32 {
    enter("cuEventSynchronize", |state| match find(state, event)?.1 {
        Recorded::Captured => Err(Code::CAPTURED_EVENT),
        Recorded::Queued(stream) => {
            state.potentially_unsafe("cuEventSynchronize")?;
            state.drain(stream)
        }
        Recorded::Never | Recorded::At(_) => Ok(()),
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventQuery(event: Handle) -> i32 {
    enter("cuEventQuery", |state| match find(state, event)?.1 {
        Recorded::Captured => Err(Code::CAPTURED_EVENT),
        // It comes to it some time.
        Recorded::Queued(stream) => state.drain(stream).and(Err(Code::NOT_READY)),
        Recorded::Never | Recorded::At(_) => Ok(()),
    })
}

fn time(state: &mut State, event: Handle) -> Outcome<Duration> {
    match find(state, event)? {
        (true, Recorded::At(time)) => Ok(time),
        (true, Recorded::Queued(_)) => Err(Code::NOT_READY),
        _ => {
            state.log.fault("the time of an event that has none");
            Err(Code::INVALID_HANDLE)
        }
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventElapsedTime(milliseconds: *mut f32, start: Handle, end: Handle) -> i32 {
    enter("cuEventElapsedTime", |state| {
        let (start, end) = (time(state, start)?, time(state, end)?);
        // SAFETY: the caller gives room for a number.
        unsafe { give(milliseconds, end.saturating_sub(start).as_secs_f32() * 1e3) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventElapsedTime_v2(milliseconds: *mut f32, start: Handle, end: Handle) -> i32 {
    // SAFETY: the caller gives room for a number.
    unsafe { cuEventElapsedTime(milliseconds, start, end) }
}
