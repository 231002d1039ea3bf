//! The kernels as PTX, which the driver compiles for the GPU it finds.
//!
//! `cargo xtask ptx` makes the files in `kernels/ptx` from `kernels/cuda`; continuous integration makes them again and
//! compares.

/// A source without `.cu`, and its PTX.
const MODULES: &[(&str, &str)] = &[
    ("attention", include_str!("../../ptx/attention.ptx")),
    ("ceiling", include_str!("../../ptx/ceiling.ptx")),
    ("dense", include_str!("../../ptx/dense.ptx")),
    ("dfloat11", include_str!("../../ptx/dfloat11.ptx")),
    ("embedding", include_str!("../../ptx/embedding.ptx")),
    ("fixed12", include_str!("../../ptx/fixed12.ptx")),
    ("gate", include_str!("../../ptx/gate.ptx")),
    ("rms_norm", include_str!("../../ptx/rms_norm.ptx")),
    ("rope", include_str!("../../ptx/rope.ptx")),
    ("sampling", include_str!("../../ptx/sampling.ptx")),
];

/// The PTX of a source.
pub(super) fn module(file: &str) -> Option<&'static str> {
    MODULES.iter().find(|(name, _)| *name == file).map(|(_, text)| *text)
}

/// The sources that are built in.
#[must_use]
pub fn modules() -> Vec<&'static str> {
    MODULES.iter().map(|(name, _)| *name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_source_is_built_in() {
        let cuda = concat!(env!("CARGO_MANIFEST_DIR"), "/cuda");
        let mut sources: Vec<String> = std::fs::read_dir(cuda)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".cu").map(str::to_owned))
            .collect();
        sources.sort();
        assert_eq!(modules(), sources);
        for (name, text) in MODULES {
            assert!(text.contains(".target sm_80"), "{name}");
            assert_eq!(module(name), Some(*text));
        }
    }
}
