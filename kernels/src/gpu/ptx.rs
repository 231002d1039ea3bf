//! The kernels as PTX, which the driver compiles for the GPU it finds.
//!
//! `cargo xtask ptx` makes the files in `kernels/ptx` from `kernels/cuda`; continuous integration makes them again and
//! compares.

/// A source without `.cu`, its PTX for every GPU, and that of the kernels of a step for compute capability 9.0 and newer, whose
/// launches overlap.
type Source = (&'static str, &'static str, Option<&'static str>);

macro_rules! sources {
    ($($name:literal $step:expr;)*) => {
        [$(($name, include_str!(concat!("../../ptx/", $name, ".ptx")), $step)),*]
    };
}

macro_rules! step {
    ($name:literal) => {
        Some(include_str!(concat!("../../ptx/", $name, ".sm_90.ptx")))
    };
}

const SOURCES: &[Source] = &sources! {
    "abq1" step!("abq1");
    "abq2" step!("abq2");
    "abq3" step!("abq3");
    "abq4" step!("abq4");
    "abq5" step!("abq5");
    "abq6" step!("abq6");
    "abq7" step!("abq7");
    "abq8" step!("abq8");
    "abq_decoded" None;
    "abq_quantise" step!("abq_quantise");
    "attention" step!("attention");
    "attention_codes" step!("attention_codes");
    "block_sums" step!("block_sums");
    "cache_codes" step!("cache_codes");
    "ceiling" None;
    "dense" step!("dense");
    "dense_f16" step!("dense_f16");
    "dense_f32" step!("dense_f32");
    "dfloat11" step!("dfloat11");
    "embedding" step!("embedding");
    "experts" step!("experts");
    "experts_bf16" step!("experts_bf16");
    "experts_f16" step!("experts_f16");
    "experts_f32" step!("experts_f32");
    "experts_fixed12" step!("experts_fixed12");
    "fixed12" step!("fixed12");
    "gate" step!("gate");
    "layer_norm" step!("layer_norm");
    "rms_norm" step!("rms_norm");
    "rope" step!("rope");
    "sampling" step!("sampling");
    "sparse24" step!("sparse24");
    "sparse24_fixed12" step!("sparse24_fixed12");
};

/// The first compute capability whose launches may overlap.
const OVERLAPPING: (i32, i32) = (9, 0);

/// A PTX text, and whether its kernels wait for what was started before by themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Module {
    pub(super) text: &'static str,
    pub(super) overlaps: bool,
}

/// The texts of a source for a GPU of this compute capability: a kernel is taken from the first that has it.
pub(super) fn modules_of(file: &str, capability: (i32, i32)) -> Vec<Module> {
    let Some((_, all, step)) = SOURCES.iter().find(|(name, ..)| *name == file) else { return Vec::new() };
    let step = step.filter(|_| capability >= OVERLAPPING).map(|text| Module { text, overlaps: true });
    step.into_iter().chain([Module { text: all, overlaps: false }]).collect()
}

impl Module {
    /// Whether it has a kernel.
    pub(super) fn has(&self, kernel: &str) -> bool {
        self.text.match_indices(".entry ").any(|(at, entry)| {
            let name = self.text[at + entry.len()..].trim_start();
            name.strip_prefix(kernel).is_some_and(|rest| rest.starts_with(['(', '\n', ' ']))
        })
    }
}

/// The sources that are built in.
#[must_use]
pub fn modules() -> Vec<&'static str> {
    SOURCES.iter().map(|(name, ..)| *name).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::panic)]
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
        for (name, text, step) in SOURCES {
            assert!(text.contains(".target sm_80"), "{name}");
            assert_eq!(modules_of(name, (8, 9)), [Module { text, overlaps: false }]);
            if let Some(step) = step {
                assert!(step.contains(".target sm_90"), "{name}");
                assert_eq!(modules_of(name, (10, 0))[0], Module { text: step, overlaps: true });
            }
        }
        assert_eq!(modules_of("no such", (9, 0)), []);
    }

    #[test]
    fn what_may_overlap_waits_by_itself() {
        for (name, all, step) in SOURCES {
            assert!(!all.contains("griddepcontrol"), "{name}");
            let Some(step) = step else { continue };
            let kernels: Vec<&str> = step.split(".entry ").skip(1).collect();
            assert!(!kernels.is_empty(), "{name}");
            for kernel in kernels {
                assert!(kernel.contains("griddepcontrol.wait"), "{name}: {}", &kernel[..40]);
            }
        }
    }

    #[test]
    fn kernels_are_found_by_their_whole_name() {
        let [step, all] = modules_of("dense", (9, 0))[..] else { panic!("two texts") };
        assert!(step.has("dense_stream_1_1_4") && all.has("dense_stream_1_1_4"));
        assert!(all.has("dense_panel_16_2_2") && !step.has("dense_panel_16_2_2"));
        assert!(!all.has("dense_stream_1_1") && !all.has("stream_1_1_4"));
    }
}
