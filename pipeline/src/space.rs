//! Whether a disk has room for what a job will write: before it starts.

use std::path::Path;

use llmpress_formats::{Error as FormatError, STATE_DIR};
use rustix::fs::statvfs;

use crate::{Error, PassForecast, Plan, Request, Result};

/// Refuses to start what the disk of `path`, or of the folder that it will be made in, cannot hold.
pub(crate) fn check(path: &Path, needed: u64) -> Result<()> {
    let there = path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("."));
    // A relative name of one part is made here.
    let there = if there.as_os_str().is_empty() { Path::new(".") } else { there };
    let stat = statvfs(there).map_err(|e| FormatError::io(there, "examine", e.into()))?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    if free < needed {
        return Err(Error::Limit(format!(
            "{}: about {} MB are needed and {} MB are free: free some space and run again with --resume",
            path.display(),
            needed.div_ceil(1_000_000),
            free / 1_000_000
        )));
    }
    Ok(())
}

/// The same for a job whose passes leave finished units before the shards are written: what both take, less what an earlier
/// run of it has written.
pub(crate) fn check_passes(dir: &Path, out: &Path, request: &Request, max_shard_bytes: u64) -> Result<()> {
    let (plan, _) = Plan::forecast(dir, request, max_shard_bytes)?;
    let staged = plan.passes.iter().map(|pass| match &pass.forecast {
        PassForecast::Finish(forecast) => forecast.bytes.saturating_add(forecast.stream_bytes),
        PassForecast::Prune(_) => 0,
    });
    let needed = staged.fold(plan.expected_bytes, u64::saturating_add);
    let unfinished = out.join(STATE_DIR).exists();
    check(out, needed.saturating_sub(if unfinished { bytes_below(out, 0) } else { 0 }))
}

/// Deepest folder that a job makes.
const MOST_FOLDERS: usize = 4;

/// Bytes of the files in a folder and those below it; what cannot be seen counts as nothing.
fn bytes_below(dir: &Path, depth: usize) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    let bytes = entries.flatten().map(|entry| match entry.file_type() {
        Ok(kind) if kind.is_dir() && depth < MOST_FOLDERS => bytes_below(&entry.path(), depth + 1),
        Ok(kind) if kind.is_file() => entry.metadata().map_or(0, |data| data.len()),
        _ => 0,
    });
    bytes.fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_disk_cannot_hold_is_refused_also_where_nothing_is_yet() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("a/b");
        check(&out, 1).unwrap();
        check(Path::new("a-name-alone"), 1).unwrap();
        let error = check(&out, u64::MAX).unwrap_err();
        assert!(matches!(error, Error::Limit(_)), "{error}");
        assert!(
            error.to_string().contains("a/b") && error.to_string().contains("free some space"),
            "{error}"
        );
    }

    #[test]
    fn what_an_earlier_run_wrote_is_counted_once() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("x/y")).unwrap();
        std::fs::write(dir.path().join("x/y/z"), [0; 100]).unwrap();
        std::fs::write(dir.path().join("w"), [0; 11]).unwrap();
        assert_eq!((bytes_below(dir.path(), 0), bytes_below(&dir.path().join("none"), 0)), (111, 0));
    }
}
