//! The kernels as PTX, which the driver compiles for the GPU it finds.
//!
//! `cargo xtask ptx` makes the files in `kernels/ptx` from `kernels/cuda`; continuous integration makes them again and
//! compares.

/// A source without `.cu`, and its PTX.
const MODULES: &[(&str, &str)] = &[("ceiling", include_str!("../../ptx/ceiling.ptx"))];

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
