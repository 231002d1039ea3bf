//! Where encoded bytes go: components of a shard, each with its digest, and the digests of the tensors
//! they came from.

use std::collections::BTreeMap;

use llmpress_formats::encoding::{ComponentSpec, Encoding, stored_name};
use llmpress_formats::{ComponentEntry, Digest, ShardWriter, Slot};

use crate::source::UnitSource;
use crate::work::{Threads, Work};
use crate::{Error, Result};

/// What encoding a unit gave.
#[derive(Debug)]
pub(crate) struct Encoded {
    /// Digest of each tensor's bytes, in the unit's order.
    pub(crate) tensors: Vec<(String, Digest)>,
    /// Its components by their last name.
    pub(crate) components: BTreeMap<String, ComponentEntry>,
}

/// Slots of a unit's components by their last name: few, in a shard that may have tens of thousands of units.
#[derive(Clone, Default)]
pub(crate) struct Slots(Vec<(&'static str, Slot)>);

impl Slots {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn insert(&mut self, name: &'static str, slot: Slot) {
        self.0.reserve_exact(1);
        self.0.push((name, slot));
    }

    pub(crate) fn remove(&mut self, name: &str) -> Option<Slot> {
        let at = self.0.iter().position(|(n, _)| *n == name)?;
        Some(self.0.swap_remove(at).1)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &(&'static str, Slot)> {
        self.0.iter()
    }
}

/// A component that is appended to.
pub(crate) struct Sink {
    name: &'static str,
    slot: Slot,
    at: u64,
    hasher: blake3::Hasher,
    threads: Threads,
}

impl Sink {
    pub(crate) fn new(name: &'static str, slot: Slot, threads: Threads) -> Self {
        Self { name, slot, at: 0, hasher: blake3::Hasher::new(), threads }
    }

    /// The component that has been given this room.
    pub(crate) fn take(slots: &mut Slots, name: &'static str, work: Work<'_>) -> Result<Self> {
        let slot =
            slots.remove(name).ok_or_else(|| Error::Invalid(format!("component {name} has no room")))?;
        Ok(Self::new(name, slot, work.threads))
    }

    pub(crate) fn append(&mut self, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.slot.write_at(self.at, bytes)?;
        self.threads.hash(&mut self.hasher, bytes);
        self.at += bytes.len() as u64;
        Ok(())
    }

    /// Bytes so far.
    pub(crate) fn written(&self) -> u64 {
        self.at
    }

    /// Ends a unit of which this component was written at the end of the shard: gives each of its components a place, this one as large as it
    /// came to be, and writes the rest.
    pub(crate) fn end_unit(
        mut self,
        unit: &str,
        encoding: &Encoding,
        specs: Vec<ComponentSpec>,
        rest: &[(&'static str, &[u8])],
        writer: &mut ShardWriter,
        work: Work<'_>,
    ) -> Result<(BTreeMap<String, ComponentEntry>, Slots)> {
        let mut slots = Slots::new();
        for spec in specs {
            let stored = stored_name(unit, encoding, spec.name);
            slots.insert(spec.name, writer.place(&stored, spec.dtype, &spec.shape)?);
        }
        let (mut components, placed) = (BTreeMap::new(), slots.clone());
        if let Some(slot) = slots.remove(self.name) {
            self.slot = slot;
        }
        self.finish(&mut components)?;
        for (name, bytes) in rest {
            let mut sink = Self::take(&mut slots, name, work)?;
            sink.append(bytes)?;
            sink.finish(&mut components)?;
        }
        Ok((components, placed))
    }

    /// Checks that the component is full.
    pub(crate) fn finish(self, components: &mut BTreeMap<String, ComponentEntry>) -> Result<()> {
        let component = self.slot.component();
        if self.at != component.bytes() {
            return Err(Error::Invalid(format!(
                "component {}: {} of {} bytes were encoded",
                component.name(),
                self.at,
                component.bytes()
            )));
        }
        let entry =
            ComponentEntry { tensor: component.name().to_owned(), blake3: self.hasher.finalize().into() };
        components.insert(self.name.to_owned(), entry);
        Ok(())
    }
}

/// Digests of a unit's tensors, fed with its bytes in order.
pub(crate) struct SourceDigests<'a> {
    source: &'a UnitSource<'a>,
    threads: Threads,
    tensor: usize,
    at: u64,
    hasher: blake3::Hasher,
    done: Vec<(String, Digest)>,
}

impl<'a> SourceDigests<'a> {
    pub(crate) fn new(source: &'a UnitSource<'a>, threads: Threads) -> Self {
        Self { source, threads, tensor: 0, at: 0, hasher: blake3::Hasher::new(), done: Vec::new() }
    }

    pub(crate) fn update(&mut self, mut bytes: &[u8]) {
        while let Some(tensor) = self.source.tensors().get(self.tensor) {
            let left = (tensor.start + tensor.bytes - self.at) as usize;
            let take = left.min(bytes.len());
            self.threads.hash(&mut self.hasher, &bytes[..take]);
            self.at += take as u64;
            bytes = &bytes[take..];
            if take < left {
                break;
            }
            self.done.push((tensor.name.clone(), self.hasher.finalize().into()));
            self.hasher.reset();
            self.tensor += 1;
            if bytes.is_empty() && self.source.tensors().get(self.tensor).is_none_or(|t| t.bytes > 0) {
                break;
            }
        }
    }

    pub(crate) fn finish(mut self) -> Vec<(String, Digest)> {
        // Tensors without elements at the end never saw a byte.
        self.update(&[]);
        self.done
    }
}
