//! Ctrl-C while something trains: it stops after its step and keeps a state. Once more ends the program at once.
//!
//! ```text
//! SIGINT, SIGTERM --> a flag --> training asks for it after each step --> state, error, exit 1
//! ```

use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether somebody wants it to stop.
static ASKED: AtomicBool = AtomicBool::new(false);
/// Signals that ask for it.
const SIGNALS: [c_int; 2] = [libc::SIGINT, libc::SIGTERM];

/// From here on the first signal only sets the flag.
pub(crate) fn install() {
    let handler: extern "C" fn(c_int) = handle;
    set(handler as libc::sighandler_t, libc::SA_RESETHAND | libc::SA_RESTART);
}

/// From here on a signal ends the program, as before.
pub(crate) fn remove() {
    set(libc::SIG_DFL, 0);
}

/// Whether it was asked to stop.
pub(crate) fn is_asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}

fn set(handler: libc::sighandler_t, flags: c_int) {
    for signal in SIGNALS {
        #[allow(unsafe_code)]
        // SAFETY: `sigaction` is plain data for which zeros are valid; the handler only makes async-signal-safe calls.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler;
            action.sa_flags = flags;
            libc::sigemptyset(&mut action.sa_mask);
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    }
}

extern "C" fn handle(_: c_int) {
    ASKED.store(true, Ordering::Relaxed);
    const WHAT: &[u8] = b"\nstopping after this step, with a state to go on from; once more stops at once\n";
    #[allow(unsafe_code)]
    // SAFETY: async-signal-safe by POSIX; the bytes are static.
    unsafe {
        libc::write(2, WHAT.as_ptr().cast(), WHAT.len());
    }
}
