//! Graphs.

use super::give;
use crate::code::{Code, Outcome};
use crate::state::{State, enter};
use crate::things::{Graph, Handle};
use crate::work::Work;

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGraphInstantiateWithFlags(executable: *mut Handle, graph: Handle, flags: u64) -> i32 {
    enter("cuGraphInstantiateWithFlags", |state| {
        state.current()?;
        state.potentially_unsafe("cuGraphInstantiate")?;
        if flags != 0 {
            return Err(Code::NOT_SUPPORTED);
        }
        let found = state.graphs.get(&graph).map(|found| (found.context, found.work.clone()));
        let Some((context, work)) = found else { return Err(state.wrong("graph")) };
        let made = state.handle();
        state.executables.insert(made, Graph { context, work });
        // SAFETY: the caller gives room for a handle.
        unsafe { give(executable, made) }
    })
}

/// The work of an executable graph of the calling thread's context.
fn find(state: &mut State, executable: Handle) -> Outcome<Work> {
    let device = state.current()?;
    let context = state.devices[device].context;
    match state.executables.get(&executable) {
        Some(found) if found.context == context => Ok(Work::Graph(found.work.clone())),
        Some(_) => Err(Code::INVALID_CONTEXT),
        None => Err(state.wrong("executable graph")),
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphUpload(executable: Handle, stream: Handle) -> i32 {
    enter("cuGraphUpload", |state| {
        state.stream(stream)?;
        find(state, executable).map(|_| ())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphLaunch(executable: Handle, stream: Handle) -> i32 {
    enter("cuGraphLaunch", |state| {
        let stream = state.stream(stream)?;
        let work = find(state, executable)?;
        state.put(stream, work)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphExecDestroy(executable: Handle) -> i32 {
    enter("cuGraphExecDestroy", |state| {
        find(state, executable)?;
        state.executables.remove(&executable);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphDestroy(graph: Handle) -> i32 {
    enter("cuGraphDestroy", |state| {
        state.current()?;
        if state.graphs.remove(&graph).is_none() {
            return Err(state.wrong("graph"));
        }
        Ok(())
    })
}
