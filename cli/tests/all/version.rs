//! What the program says of itself.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use crate::support::ok;

#[test]
fn version_says_what_runs() {
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(ok(&["-V"]), format!("llmpress {version}\n"));
    let long = ok(&["--version"]);
    let mut lines = long.lines();
    assert_eq!(lines.next(), Some(format!("llmpress {version}").as_str()));
    let line = |name: &str| long.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    assert!(line("target:").is_some_and(|t| t.contains(std::env::consts::ARCH)), "{long}");
    assert!(line("kernels:").is_some_and(|k| k.contains("GPU:") && k.contains("dense")), "{long}");
    if let Some(revision) = line("revision:") {
        assert!(revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit()), "{long}");
    }
}
