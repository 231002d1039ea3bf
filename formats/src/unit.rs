//! A unit: tensors that are stored together, and what reads them.
//!
//! ```text
//! plain     one tensor as its header says        encoded   an encoding, tensors, components; of small floats units within
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::encoding::scaled::ScaledPart;
use crate::encoding::{self, Encoding, Part, UnitReader};
use crate::{Base, Component, Error, Named, Result};

/// Tensors stored together under one encoding.
#[derive(Debug)]
pub struct Unit {
    stored: Stored,
    made: OnceLock<Box<Made>>,
}

/// What is made of a unit when it is asked for.
#[derive(Debug, Default)]
struct Made {
    /// What a plain tensor looks like as an encoded one.
    plain: OnceLock<Box<Encoded>>,
    reader: OnceLock<UnitReader>,
}

/// A plain checkpoint may have a million tensors: what their headers say already is not repeated.
#[derive(Debug)]
enum Stored {
    Plain(Component),
    Encoded(Box<Encoded>),
}

#[derive(Debug)]
struct Encoded {
    encoding: Encoding,
    parts: Vec<Part>,
    components: Named<Component>,
    /// What stores the components of small floats: units themselves, of whatever encoding.
    within: Vec<(&'static str, Unit)>,
    /// Where that was whose place it took.
    instead_of: Option<(PathBuf, u64)>,
    /// What a difference is from.
    base: Option<Base>,
}

impl Encoded {
    fn plain(component: &Component) -> Self {
        let part = Part {
            name: component.name().to_owned(),
            dtype: component.dtype(),
            shape: component.shape().to_vec(),
            bytes: component.bytes(),
        };
        let mut components = Named::new();
        components.insert(encoding::raw::DATA, component.clone());
        Self {
            encoding: Encoding::Raw,
            parts: vec![part],
            components,
            within: Vec::new(),
            instead_of: None,
            base: None,
        }
    }

    fn reader(&self, name: &str) -> Result<UnitReader> {
        let Encoding::Scaled(scaled) = self.encoding else {
            let base = self.base.as_ref();
            return UnitReader::open_on(name, &self.encoding, &self.parts, &self.components, base);
        };
        let [part] = &self.parts[..] else {
            return Err(Error::Invalid(format!("unit {name}: holds no single matrix")));
        };
        UnitReader::scaled(part, scaled, |component| {
            let unit = self.within.iter().find(|(name, _)| *name == component).map(|(_, unit)| unit);
            let missing = || Error::Invalid(format!("unit {name}: component {component} is missing"));
            unit.ok_or_else(missing)?.open_reader(name)
        })
    }
}

impl Unit {
    pub(crate) fn new(encoding: Encoding, parts: Vec<Part>, components: impl Into<Named<Component>>) -> Self {
        let components = components.into();
        let encoded =
            Encoded { encoding, parts, components, within: Vec::new(), instead_of: None, base: None };
        Self::of(Stored::Encoded(Box::new(encoded)))
    }

    /// The same by this base.
    pub(crate) fn on(mut self, base: Base) -> Self {
        if let Stored::Encoded(encoded) = &mut self.stored {
            encoded.base = Some(base);
        }
        self.made = OnceLock::new();
        self
    }

    /// The same, and what is within it, by this base, where they are stored by one.
    ///
    /// # Errors
    /// A base that lacks a tensor.
    pub(crate) fn with_base(mut self, base: &Base) -> Result<Self> {
        if let Stored::Encoded(encoded) = &mut self.stored {
            let within = std::mem::take(&mut encoded.within).into_iter();
            encoded.within =
                within.map(|(name, unit)| Ok((name, unit.with_base(base)?))).collect::<Result<_>>()?;
        }
        let Encoding::Delta(delta) = *self.encoding() else { return Ok(self) };
        for part in self.parts() {
            base.tensor(&part.name, part.dtype, &part.shape, delta.base_blake3)?;
        }
        Ok(self.on(base.clone()))
    }

    /// The same in the place of another unit.
    pub(crate) fn instead_of(mut self, other: Option<&Self>) -> Self {
        if let Stored::Encoded(encoded) = &mut self.stored {
            encoded.instead_of = other.and_then(Self::position).map(|(path, at)| (path.to_owned(), at));
        }
        self
    }

    /// Small floats whose components are units.
    pub(crate) fn scaled(encoding: Encoding, part: Part, within: Vec<(&'static str, Self)>) -> Self {
        let mut components = BTreeMap::new();
        for (component, unit) in &within {
            for (name, stored) in unit.components().iter() {
                let plain = *unit.encoding() == Encoding::Raw;
                let name = if plain { (*component).to_owned() } else { format!("{component}.{name}") };
                components.insert(name, stored.clone());
            }
        }
        let components = components.into();
        let encoded =
            Encoded { encoding, parts: vec![part], components, within, instead_of: None, base: None };
        Self::of(Stored::Encoded(Box::new(encoded)))
    }

    /// Its tensor, if it holds one and no more.
    pub(crate) fn only_part(&self) -> Option<ScaledPart> {
        match &self.stored {
            Stored::Plain(component) => {
                Some(ScaledPart { dtype: component.dtype(), shape: component.shape().to_vec() })
            }
            Stored::Encoded(encoded) => match &encoded.parts[..] {
                [part] => Some(ScaledPart { dtype: part.dtype, shape: part.shape.clone() }),
                _ => None,
            },
        }
    }

    /// A tensor as it lies in a file.
    pub(crate) fn plain(component: Component) -> Self {
        Self::of(Stored::Plain(component))
    }

    /// Where its tensor lies as it is, if it does.
    pub(crate) fn as_plain(&self) -> Option<&Component> {
        match &self.stored {
            Stored::Plain(component) => Some(component),
            Stored::Encoded(_) => None,
        }
    }

    fn of(stored: Stored) -> Self {
        Self { stored, made: OnceLock::new() }
    }

    fn made(&self) -> &Made {
        self.made.get_or_init(Box::default)
    }

    fn encoded(&self) -> &Encoded {
        match &self.stored {
            Stored::Encoded(encoded) => encoded,
            Stored::Plain(component) => self.made().plain.get_or_init(|| Box::new(Encoded::plain(component))),
        }
    }

    /// How it is stored.
    pub fn encoding(&self) -> &Encoding {
        match &self.stored {
            Stored::Encoded(encoded) => &encoded.encoding,
            Stored::Plain(_) => &Encoding::Raw,
        }
    }

    /// Its tensors in order.
    pub fn parts(&self) -> &[Part] {
        &self.encoded().parts
    }

    /// How one of its components is stored, where that is a unit itself: elements or scales of small floats.
    pub fn encoding_within(&self, component: &str) -> Option<&Encoding> {
        let Stored::Encoded(encoded) = &self.stored else { return None };
        let found = encoded.within.iter().find(|(name, _)| *name == component);
        found.map(|(_, unit)| unit.encoding())
    }

    /// Its components by their last name.
    pub fn components(&self) -> &Named<Component> {
        &self.encoded().components
    }

    /// How many tensors it stores, and their size when decoded.
    pub fn decoded_size(&self) -> (usize, u64) {
        match &self.stored {
            Stored::Encoded(encoded) => {
                (encoded.parts.len(), encoded.parts.iter().map(|p| p.bytes).fold(0, u64::saturating_add))
            }
            Stored::Plain(component) => (1, component.bytes()),
        }
    }

    /// Size of its components together.
    pub fn stored_bytes(&self) -> u64 {
        match &self.stored {
            Stored::Encoded(encoded) => {
                encoded.components.values().map(Component::bytes).fold(0, u64::saturating_add)
            }
            Stored::Plain(component) => component.bytes(),
        }
    }

    /// Where its first component is: the file and the place in it; of what a pass finished, where that was of which it made it, so that
    /// an order by positions depends neither on passes nor on where they keep what they finish.
    pub fn position(&self) -> Option<(&Path, u64)> {
        match &self.stored {
            Stored::Encoded(encoded) => match &encoded.instead_of {
                Some((path, at)) => Some((path, *at)),
                None => encoded.components.values().map(|c| (c.path(), c.file_offset())).min(),
            },
            Stored::Plain(component) => Some((component.path(), component.file_offset())),
        }
    }

    pub(crate) fn reader(&self, name: &str) -> Result<&UnitReader> {
        if let Some(reader) = self.made().reader.get() {
            return Ok(reader);
        }
        let reader = self.open_reader(name)?;
        Ok(self.made().reader.get_or_init(|| reader))
    }

    fn open_reader(&self, name: &str) -> Result<UnitReader> {
        match &self.stored {
            Stored::Encoded(encoded) => encoded.reader(name),
            Stored::Plain(component) => Encoded::plain(component).reader(name),
        }
    }

    /// What opening its reader checks, without keeping one.
    pub(crate) fn check(&self, name: &str) -> Result<()> {
        match (&self.stored, self.made.get().and_then(|made| made.reader.get())) {
            // A header that was read has sizes that fit.
            (Stored::Plain(_), _) | (_, Some(_)) => Ok(()),
            // It was seen to fit when the checkpoint was opened.
            (Stored::Encoded(encoded), None) if matches!(encoded.encoding, Encoding::Same { .. }) => Ok(()),
            (Stored::Encoded(_), None) => self.open_reader(name).map(|_| ()),
        }
    }
}
