//! What this program is: version, revision, target and kernels.

use std::sync::OnceLock;

use llmpress_kernels::cpu::instruction_set;
use llmpress_kernels::gpu::modules;

/// The version.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The revision that it was built from; none outside of a checkout.
pub(crate) fn revision() -> Option<&'static str> {
    option_env!("LLMPRESS_REVISION")
}

/// All of it, for `--version`.
pub(crate) fn long() -> &'static str {
    static TEXT: OnceLock<String> = OnceLock::new();
    TEXT.get_or_init(|| {
        let mut lines = vec![VERSION.to_owned()];
        lines.extend(revision().map(|revision| format!("revision: {revision}")));
        lines.push(format!("target: {}", env!("LLMPRESS_TARGET")));
        lines.push(format!("kernels: {}; GPU: {}", instruction_set(), modules().join(", ")));
        lines.join("\n")
    })
}
