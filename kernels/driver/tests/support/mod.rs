//! Running a test once more, as a process of its own that finds the stand-in in place of the driver.
//!
//! The dynamic loader reads its search path when a process starts, and cudarc keeps the library that it found.
#![allow(dead_code, unsafe_code, unreachable_pub, missing_docs)]

use std::ffi::{CString, OsString, c_char};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use libloading::Library;
use llmpress_driver_standin::SETTINGS;
use llmpress_kernels::gpu::cuda::functions;

const CHILD: &str = "LLMPRESS_STANDIN_CHILD";

/// Runs `body` in a child process whose loader looks into a directory that `prepare` fills first. `test` is the path of
/// the calling test.
pub fn child(test: &str, prepare: impl FnOnce(&Path), settings: &str, body: impl FnOnce(&Path)) {
    if let Some(dir) = env::var_os(CHILD) {
        body(Path::new(&dir));
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let mut path = OsString::from(dir.path());
    if let Some(more) = env::var_os("LD_LIBRARY_PATH") {
        path.push(":");
        path.push(more);
    }
    let output = Command::new(env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture", "--test-threads=1"])
        .env("LD_LIBRARY_PATH", path)
        .env(CHILD, dir.path())
        .env(SETTINGS, format!("{settings};log={}", log(dir.path()).display()))
        .output()
        .unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    // A name that is not the test's would run nothing.
    assert!(output.status.success() && out.contains("1 passed"), "{test}: {}\n{out}\n{err}", output.status);
}

fn log(dir: &Path) -> PathBuf {
    dir.join("log")
}

/// What the stand-in wrote down so far.
pub fn lines(dir: &Path) -> Vec<String> {
    fs::read_to_string(log(dir)).unwrap_or_default().lines().map(str::to_owned).collect()
}

/// The names of the calls.
pub fn calls(lines: &[String]) -> Vec<&str> {
    lines.iter().filter_map(|line| line.strip_prefix("call ")?.split('(').next()).collect()
}

/// Wants no call that a correct program does not make, none that is not looked for when a GPU is opened, and nothing left
/// behind.
pub fn clean(dir: &Path) {
    let all = lines(dir);
    let unknown = |name: &&&str| {
        let driver = name.starts_with("cu") && !name.starts_with("cublas");
        // Tests of the stand-in's own rules load modules the short way.
        driver && **name != "cuModuleLoadData" && !functions().any(|function| function == **name)
    };
    assert_eq!(calls(&all).iter().find(unknown), None);
    let wrong = |line: &String| line.starts_with("fault") || line.starts_with("leak");
    let wrong: Vec<String> = lines(dir).into_iter().filter(wrong).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Other settings, and a GPU that nothing has happened to; forgets what was written down.
pub fn configure(dir: &Path, settings: &str) {
    let _ = fs::remove_file(log(dir));
    let settings = CString::new(format!("{settings};log={}", log(dir).display())).unwrap();
    // SAFETY: the library is loaded already, or does nothing when it is; the function has this signature.
    let status = unsafe {
        let library = Library::new(dir.join("libcuda.so.1")).unwrap();
        let configure = library
            .get::<unsafe extern "C" fn(*const c_char) -> i32>(b"llmpress_standin_configure\0")
            .unwrap();
        let status = configure(settings.as_ptr());
        // It stays loaded, with its settings.
        std::mem::forget(library);
        status
    };
    assert_eq!(status, 0);
}
