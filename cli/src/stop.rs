//! Ctrl-C and SIGTERM while a worker is at work: what it has in work is removed, what it has made stays.
//!
//! ```text
//! SIGINT, SIGTERM: blocked in every thread, awaited by one --> folders in work removed --> exit 130 or 143
//! ```
//!
//! A unit gets its name when it is whole, so the program may end at any moment; this only leaves no litter. It is not a handler: files are
//! removed, which no handler may do.

use std::ffi::c_int;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use llmpress_pipeline::Scratch;

use crate::report::Output;

const SIGNALS: [c_int; 2] = [libc::SIGINT, libc::SIGTERM];
/// What a shell makes of a signal's number.
const BY_SIGNAL: c_int = 128;

/// Whether the program is to end, and what it has to remove before.
pub(crate) struct Stop {
    scratch: Scratch,
    asked: Arc<AtomicBool>,
}

impl Stop {
    /// From here on the signals are this thread's and those that it starts, which leave them to one that waits for them.
    pub(crate) fn install(output: Output) -> Self {
        let stop = Self { scratch: Scratch::default(), asked: Arc::default() };
        #[allow(unsafe_code)]
        // SAFETY: `sigset_t` is plain data that `sigemptyset` initialises; the calls only read and write it.
        let set = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            for signal in SIGNALS {
                libc::sigaddset(&mut set, signal);
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
            set
        };
        let (scratch, asked) = (stop.scratch.clone(), stop.asked.clone());
        let waiting = std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
            let mut signal = 0;
            #[allow(unsafe_code)]
            // SAFETY: both point to live data of their types.
            if unsafe { libc::sigwait(&set, &mut signal) } != 0 {
                return;
            }
            asked.store(true, Ordering::SeqCst);
            scratch.remove_and_close();
            output.warn("stopped: units that are done stay; run it again to go on");
            #[allow(unsafe_code)]
            // SAFETY: ends the process at once; what has a name is whole.
            unsafe {
                libc::_exit(BY_SIGNAL + signal)
            }
        });
        if waiting.is_err() {
            // Nobody waits: the signals end the program as before.
            #[allow(unsafe_code)]
            // SAFETY: as above.
            unsafe {
                libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut());
            }
        }
        stop
    }

    /// What is removed when it is asked to stop.
    pub(crate) fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    /// Leaves the end of the program to whoever waits for the signals, if one came: what was in work is gone then, and is no error.
    pub(crate) fn wait_if_asked(&self) {
        while self.asked.load(Ordering::SeqCst) {
            std::thread::park();
        }
    }
}
