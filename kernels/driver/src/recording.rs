//! The rules of capture: what may be called while a stream records.

use std::thread;

use crate::capture::{Capture, Mode, minds};
use crate::code::{Code, Outcome};
use crate::state::State;
use crate::things::Handle;
use crate::work::Work;

impl State {
    pub(crate) fn begin_capture(&mut self, stream: Handle, mode: Mode) -> Outcome {
        let stream = self.stream(stream)?;
        let Some(found) = self.streams.get_mut(&stream) else { return Err(Code::INVALID_HANDLE) };
        if stream == found.context {
            return Err(Code::CAPTURE_UNSUPPORTED);
        }
        if found.capture.is_some() {
            return Err(Code::ILLEGAL_STATE);
        }
        found.capture =
            Some(Capture { mode, thread: thread::current().id(), work: Vec::new(), invalid: false });
        Ok(())
    }

    /// What was recorded.
    pub(crate) fn end_capture(&mut self, stream: Handle) -> Outcome<Vec<Work>> {
        let stream = self.stream(stream)?;
        let Some(found) = self.streams.get_mut(&stream) else { return Err(Code::INVALID_HANDLE) };
        let here = thread::current().id();
        match found.capture.take() {
            None => Err(Code::ILLEGAL_STATE),
            Some(capture) if capture.mode != Mode::Relaxed && capture.thread != here => {
                found.capture = Some(capture);
                Err(Code::CAPTURE_WRONG_THREAD)
            }
            Some(capture) if capture.invalid => Err(Code::CAPTURE_INVALIDATED),
            Some(capture) => Ok(capture.work),
        }
    }

    /// 0 not capturing, 1 capturing, 2 invalidated: `CUstreamCaptureStatus`.
    pub(crate) fn capture_status(&mut self, stream: Handle) -> Outcome<u32> {
        let stream = self.stream(stream)?;
        let capture = self.streams.get(&stream).and_then(|found| found.capture.as_ref());
        Ok(capture.map_or(0, |capture| if capture.invalid { 2 } else { 1 }))
    }

    /// Refuses what the driver cannot do for sure while streams record: allocating, loading, waiting.
    pub(crate) fn potentially_unsafe(&mut self, what: &str) -> Outcome {
        let (here, minds) = (thread::current().id(), minds());
        let forbids = |capture: &Capture| match (minds, capture.mode) {
            (Mode::Relaxed, _) | (_, Mode::Relaxed) => false,
            (Mode::ThreadLocal, _) | (_, Mode::ThreadLocal) => capture.thread == here,
            (Mode::Global, Mode::Global) => true,
        };
        self.invalidate(what, |_, capture| forbids(capture))
    }

    /// Refuses to wait for a stream that records, or for all streams while one does, in whatever mode.
    pub(crate) fn waits(&mut self, what: &str, stream: Option<Handle>) -> Outcome {
        self.invalidate(what, |of, _| stream.is_none_or(|stream| stream == of))
    }

    fn invalidate(&mut self, what: &str, forbids: impl Fn(Handle, &Capture) -> bool) -> Outcome {
        let mut any = false;
        for (handle, stream) in &mut self.streams {
            if let Some(capture) = &mut stream.capture
                && forbids(*handle, capture)
            {
                capture.invalid = true;
                any = true;
            }
        }
        if any {
            self.log.refused(&format!("{what} during a capture"));
            return Err(Code::CAPTURE_UNSUPPORTED);
        }
        Ok(())
    }

    /// Whether a stream records.
    pub(crate) fn capturing(&self, stream: Handle) -> bool {
        self.streams.get(&stream).is_some_and(|found| found.capture.is_some())
    }

    /// Records work where the stream records, and puts it into the queue where it does not.
    pub(crate) fn put(&mut self, stream: Handle, work: Work) -> Outcome {
        let legacy = self.streams.get(&stream).is_some_and(|found| found.context == stream);
        if legacy && self.streams.values().any(|other| other.blocking && other.capture.is_some()) {
            self.log.refused("work on the legacy stream during a capture");
            return Err(Code::CAPTURE_IMPLICIT);
        }
        let Some(found) = self.streams.get_mut(&stream) else { return Err(Code::INVALID_HANDLE) };
        match &mut found.capture {
            Some(capture) if capture.invalid => Err(Code::CAPTURE_INVALIDATED),
            Some(capture) => {
                capture.work.push(work);
                Ok(())
            }
            None => {
                found.queue.push_back(work);
                Ok(())
            }
        }
    }
}
