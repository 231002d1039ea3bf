//! A few things by name, in no more memory than they need: a large checkpoint has a million sets of them.
//!
//! ```text
//! codes: x | escape_offsets: x | sign_mantissa: x      one slice, sorted by name
//! ```

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::encoding::{abq, dfloat11, fixed12, lowrank, planes, raw, sparse24};

/// Things by name, sorted. Adding one takes time in proportion to their number, which is small.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named<T>(Box<[(Cow<'static, str>, T)]>);

/// The name, without a copy where it is one of those that components usually have.
fn kept(name: &str) -> Cow<'static, str> {
    let mut usual = [planes::PLANES, planes::LENGTHS, raw::DATA]
        .into_iter()
        .chain(fixed12::COMPONENTS)
        .chain(dfloat11::COMPONENTS)
        .chain(abq::COMPONENTS)
        .chain(sparse24::COMPONENTS)
        .chain(lowrank::COMPONENTS);
    usual.find(|usual| *usual == name).map_or_else(|| name.to_owned().into(), Cow::Borrowed)
}

impl<T> Named<T> {
    /// Nothing.
    pub fn new() -> Self {
        Self(Box::default())
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn place(&self, name: &str) -> Result<usize, usize> {
        self.0.binary_search_by(|(other, _)| other.as_ref().cmp(name))
    }

    /// The thing of this name.
    pub fn get(&self, name: &str) -> Option<&T> {
        self.place(name).ok().and_then(|at| self.0.get(at)).map(|(_, thing)| thing)
    }

    /// Whether there is a thing of this name.
    pub fn contains_key(&self, name: &str) -> bool {
        self.place(name).is_ok()
    }

    /// All, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &T)> {
        self.0.iter().map(|(name, thing)| (name.as_ref(), thing))
    }

    /// The names, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.iter().map(|(name, _)| name)
    }

    /// The things, sorted by their names.
    pub fn values(&self) -> impl Iterator<Item = &T> {
        self.0.iter().map(|(_, thing)| thing)
    }

    /// The things, sorted by their names, to be changed.
    pub fn values_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.0.iter_mut().map(|(_, thing)| thing)
    }

    /// Adds a thing; gives the one that had its name.
    pub fn insert(&mut self, name: &str, thing: T) -> Option<T> {
        match self.place(name) {
            Ok(at) => self.0.get_mut(at).map(|(_, old)| std::mem::replace(old, thing)),
            Err(at) => {
                let mut all = std::mem::take(&mut self.0).into_vec();
                all.insert(at, (kept(name), thing));
                self.0 = all.into_boxed_slice();
                None
            }
        }
    }

    /// Takes a thing out.
    pub fn remove(&mut self, name: &str) -> Option<T> {
        let at = self.place(name).ok()?;
        let mut all = std::mem::take(&mut self.0).into_vec();
        let (_, thing) = all.remove(at);
        self.0 = all.into_boxed_slice();
        Some(thing)
    }
}

impl<T> Default for Named<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> FromIterator<(String, T)> for Named<T> {
    fn from_iter<I: IntoIterator<Item = (String, T)>>(things: I) -> Self {
        things.into_iter().collect::<BTreeMap<String, T>>().into()
    }
}

impl<T> From<BTreeMap<String, T>> for Named<T> {
    fn from(things: BTreeMap<String, T>) -> Self {
        Self(things.into_iter().map(|(name, thing)| (kept(&name), thing)).collect())
    }
}

impl<T: Serialize> Serialize for Named<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter())
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Named<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(BTreeMap::deserialize(deserializer)?.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_things_by_name_are_a_map() {
        let json = r#"{"b":2,"codes":3,"a":1}"#;
        let mut named: Named<u32> = serde_json::from_str(json).unwrap();
        let map: BTreeMap<String, u32> = serde_json::from_str(json).unwrap();
        assert_eq!(serde_json::to_string(&named).unwrap(), serde_json::to_string(&map).unwrap());
        assert_eq!(named.iter().collect::<Vec<_>>(), [("a", &1), ("b", &2), ("codes", &3)]);
        assert_eq!((named.get("b"), named.get("c"), named.len()), (Some(&2), None, 3));
        assert_eq!((named.insert("b", 7), named.insert("0", 0), named.remove("a")), (Some(2), None, Some(1)));
        assert_eq!(named.remove("a"), None);
        assert_eq!(named.iter().collect::<Vec<_>>(), [("0", &0), ("b", &7), ("codes", &3)]);
        assert!(matches!(kept("codes"), Cow::Borrowed(_)) && matches!(kept("other"), Cow::Owned(_)));
    }
}
