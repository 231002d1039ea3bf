//! Names of components inside of other encodings: `values.planes` is the component `planes` of the encoding of `values`.

use super::{ComponentSpec, lowrank, sparse24};

/// What the values of a base inside of another encoding begin with.
const BASE_VALUES_WITHIN: &str = "base.values.";

/// The same components with `prefix` before their names. Every name that the encodings make so is in their lists.
pub(super) fn under(prefix: &str, specs: Vec<ComponentSpec>) -> Vec<ComponentSpec> {
    let renamed = |spec: ComponentSpec| {
        let name = full_name(prefix, spec.name)?;
        Some(ComponentSpec { name, ..spec })
    };
    specs.into_iter().filter_map(renamed).collect()
}

/// `prefix` and `name` together, as one of the names that encodings list.
pub(super) fn full_name(prefix: &str, name: &str) -> Option<&'static str> {
    let mut known = sparse24::COMPONENTS.into_iter().chain(lowrank::COMPONENTS);
    known.find(|full| full.strip_prefix(prefix) == Some(name))
}

/// The prefix of an encoding inside of one whose components begin with `outer`.
pub(super) fn join(outer: &'static str, inner: &'static str) -> &'static str {
    if outer == lowrank::BASE_WITHIN { BASE_VALUES_WITHIN } else { inner }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoding::{abq, fixed12, raw};

    #[test]
    fn every_name_inside_of_an_encoding_is_listed() {
        let all = [&fixed12::COMPONENTS[..], &abq::COMPONENTS].concat();
        for name in &all {
            for prefix in [sparse24::WITHIN, BASE_VALUES_WITHIN] {
                assert_eq!(full_name(prefix, name), Some(&*format!("{prefix}{name}")));
            }
        }
        for name in abq::COMPONENTS {
            assert_eq!(full_name(lowrank::SUMS_WITHIN, name), Some(&*format!("sums.{name}")));
        }
        for name in sparse24::COMPONENTS.into_iter().chain([raw::DATA]) {
            assert_eq!(full_name(lowrank::BASE_WITHIN, name), Some(&*format!("base.{name}")));
        }
        assert_eq!(full_name("values.", "other"), None);
    }
}
