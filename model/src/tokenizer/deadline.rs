//! Work whose end nobody can promise: a tokenizer's expressions may match a text again and again from every place.
//!
//! ```text
//! caller -- waits, looks at the clocks --.          thread: the tokenizer's code
//!        <-- result, or "too long" ------'--------- goes on alone if it is too long
//! ```

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread::Builder;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// How often the clocks are looked at.
const LOOK: Duration = Duration::from_millis(100);
/// The tokenizer's code recurses where its file is nested.
const STACK_BYTES: usize = 8 << 20;

/// Why there is no result.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NoResult {
    /// It takes longer than so many seconds, now or when it was asked last.
    Late(u64),
    /// There is no thread for it.
    NoThread(String),
}

/// Runs `work` on a thread for at most so many seconds: of time that passes, and as many of the process's own, so that
/// neither a busy machine nor a stopped process counts. A thread that is late cannot be ended; `stuck` then keeps others
/// from following it.
pub(super) fn within<T: Send + 'static>(
    seconds: u64,
    stuck: &AtomicBool,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, NoResult> {
    if stuck.load(Ordering::Relaxed) {
        return Err(NoResult::Late(seconds));
    }
    let (started, worked) = (Instant::now(), processor_time());
    let (sender, receiver) = channel();
    let thread = Builder::new().stack_size(STACK_BYTES).spawn(move || {
        // Nobody may be waiting any more.
        let _ = sender.send(work());
    });
    thread.map_err(|e| NoResult::NoThread(e.to_string()))?;
    let most = Duration::from_secs(seconds);
    loop {
        match receiver.recv_timeout(LOOK) {
            Ok(result) => return Ok(result),
            Err(RecvTimeoutError::Disconnected) => {
                return Err(NoResult::NoThread("it ended without a result".to_owned()));
            }
            Err(RecvTimeoutError::Timeout) => {
                if started.elapsed() >= most && processor_time().saturating_sub(worked) >= most {
                    stuck.store(true, Ordering::Relaxed);
                    return Err(NoResult::Late(seconds));
                }
            }
        }
    }
}

/// What all threads of this process worked so far.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.try_into().unwrap_or(0), time.tv_nsec.try_into().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_end_is_left_behind() {
        let stuck = AtomicBool::new(false);
        assert_eq!(within(1, &stuck, || 7), Ok(7));
        let stop = std::sync::Arc::new(AtomicBool::new(false));
        let seen = stop.clone();
        let endless = move || {
            while !seen.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        };
        assert_eq!(within(1, &stuck, endless), Err(NoResult::Late(1)));
        stop.store(true, Ordering::Relaxed);
        // Once is enough.
        assert_eq!(within(1, &stuck, || 7), Err(NoResult::Late(1)));
        // Time in which this process does nothing is not its fault.
        let idle = AtomicBool::new(false);
        let sleeping = || std::thread::sleep(Duration::from_millis(1300));
        assert_eq!(within(1, &idle, sleeping), Ok(()));
    }
}
