//! The same for many things, some of them at a time.

use std::sync::Mutex;

use crate::{Error, Result};

/// What is asked for at a time.
const AT_A_TIME: usize = 4;

/// Does something for all items; the first error in their order counts, and after one nothing new is begun.
pub(crate) fn at_once<T: Sync>(items: &[T], each: impl Fn(&T) -> Result<()> + Sync) -> Result<()> {
    let next = Mutex::new((0, None::<(usize, Error)>));
    let take = || {
        let mut next = next.lock().unwrap_or_else(|e| e.into_inner());
        let at = next.0;
        next.0 += 1;
        (next.1.is_none() && at < items.len()).then_some(at)
    };
    let work = || {
        while let Some(at) = take() {
            if let Err(error) = each(&items[at]) {
                let mut next = next.lock().unwrap_or_else(|e| e.into_inner());
                if next.1.as_ref().is_none_or(|(first, _)| at < *first) {
                    next.1 = Some((at, error));
                }
            }
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..AT_A_TIME.min(items.len())).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            // Whoever hears of progress may unwind what is done, and is to see its own payload again.
            worker.join().unwrap_or_else(|payload| std::panic::resume_unwind(payload));
        }
    });
    match next.into_inner().unwrap_or_else(|e| e.into_inner()).1 {
        Some((_, error)) => Err(error),
        None => Ok(()),
    }
}
