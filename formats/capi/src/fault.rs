//! What C is told of an error: a status, and a message of the thread.

use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use llmpress_formats::Error;

/// What a call came to.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LlmpressStatus {
    /// It did what it is for.
    Ok = 0,
    /// A file could not be opened or read.
    Io = 1,
    /// A file breaks its format.
    Corrupt = 2,
    /// A file is right, and not handled.
    Unsupported = 3,
    /// The caller's argument.
    Invalid = 4,
    /// More memory would be needed than there may be.
    Limit = 5,
    /// A fault of the library: please report it. What was called with may be used further.
    Panic = 6,
}

thread_local! {
    static MESSAGE: RefCell<CString> = RefCell::default();
}

/// This thread's message.
pub(crate) fn message() -> *const c_char {
    MESSAGE.with(|message| message.try_borrow().map_or(c"".as_ptr(), |message| message.as_ptr()))
}

fn say(text: &str) {
    // One line, without what ends it in C.
    let line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    MESSAGE.with(|message| {
        if let Ok(mut message) = message.try_borrow_mut() {
            *message = CString::new(line).unwrap_or_default();
        }
    });
}

/// Keeps an error for whoever asks, and gives its status.
pub(crate) fn keep(error: Error) -> LlmpressStatus {
    say(&error.to_string());
    match error.kind() {
        "io" => LlmpressStatus::Io,
        "corrupt" => LlmpressStatus::Corrupt,
        "unsupported" => LlmpressStatus::Unsupported,
        "limit" => LlmpressStatus::Limit,
        _ => LlmpressStatus::Invalid,
    }
}

/// The caller's fault.
pub(crate) fn invalid(what: &str) -> Error {
    Error::Invalid(what.to_owned())
}

/// Does something for C: an error is kept, and so is a panic, which goes no further.
pub(crate) fn caught(job: impl FnOnce() -> Result<(), Error>) -> LlmpressStatus {
    // A checkpoint has nothing in it that is half changed when a call ends early.
    match catch_unwind(AssertUnwindSafe(job)) {
        Ok(Ok(())) => LlmpressStatus::Ok,
        Ok(Err(error)) => keep(error),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("unknown");
            say(&format!("a fault of llmpress, please report it: {text}"));
            // Its own drop may panic as well.
            std::mem::forget(panic);
            LlmpressStatus::Panic
        }
    }
}

#[cfg(test)]
#[allow(clippy::panic)]
mod tests {
    use std::ffi::CStr;

    use super::*;

    #[allow(unsafe_code)]
    fn said() -> String {
        // SAFETY: a string of this thread, which calls nothing meanwhile.
        unsafe { CStr::from_ptr(message()) }.to_string_lossy().into_owned()
    }

    #[test]
    fn a_panic_is_a_status_and_a_message_is_the_threads_own() {
        assert_eq!(caught(|| panic!("of {}", "this")), LlmpressStatus::Panic);
        assert!(said().ends_with("of this"), "{}", said());
        let other = std::thread::spawn(said).join();
        assert_eq!(other.ok().as_deref(), Some(""));
        assert_eq!(caught(|| Err(Error::Limit("a\nb\0c".to_owned()))), LlmpressStatus::Limit);
        assert_eq!(said(), "a b c");
    }
}
