//! A checkpoint seen with finished units in place of tensors: what a pass made, already encoded, in shards of its own.
//!
//! ```text
//! tensor of the source --its unit--> components of the source
//!        '--finished-----its unit--> components of another shard
//! ```

use std::collections::BTreeMap;
use std::path::Path;

use crate::encoding::Part;
use crate::unit::Unit;
use crate::{Checkpoint, Component, Error, Result, ShardFile, UnitEntry};

impl Checkpoint {
    /// The checkpoint with units of a shard in place of the tensors that they hold: these keep their names, dtypes and
    /// shapes, and have the values that the units decode to.
    ///
    /// # Errors
    /// A tensor that is not there, or is stored twice; a component that is missing or does not fit.
    pub fn with_finished(mut self, shard: ShardFile, units: &BTreeMap<String, UnitEntry>) -> Result<Self> {
        for (name, entry) in units {
            let unit = self.finished_unit(name, entry, &shard)?;
            unit.reader(name)?;
            self.take_place(shard.path(), name, entry)?;
            self.put_unit(name, unit);
            self.finished.insert(name.clone(), entry.clone());
        }
        self.added.push(shard);
        self.edited = true;
        Ok(self)
    }

    /// The units that [`Self::with_finished`] put there, by name, as they were described.
    pub fn finished(&self) -> &BTreeMap<String, UnitEntry> {
        &self.finished
    }

    /// The shards that hold them.
    pub fn finished_shards(&self) -> impl Iterator<Item = &Path> {
        self.added.iter().map(ShardFile::path)
    }

    fn finished_unit(&self, name: &str, entry: &UnitEntry, shard: &ShardFile) -> Result<Unit> {
        let encoding = entry.encoding(shard.path(), name)?;
        let mut components: BTreeMap<String, Component> = BTreeMap::new();
        for (last, link) in entry.components.iter() {
            let info = shard.header().get(&link.tensor).ok_or_else(|| {
                Error::corrupt(shard.path(), Some(&link.tensor), "is missing: make it again")
            })?;
            components.insert(last.to_owned(), shard.component(info));
        }
        let parts = entry.tensors.iter().map(|tensor| {
            let found = self.tensor(tensor)?;
            Ok(Part {
                name: tensor.clone(),
                dtype: found.dtype,
                shape: found.shape.clone(),
                bytes: found.bytes,
            })
        });
        let unit = Unit::new(encoding, parts.collect::<Result<_>>()?, components);
        let first = entry.tensors.first().and_then(|tensor| self.tensors().get(tensor));
        Ok(unit.instead_of(first.and_then(|tensor| self.unit_of(tensor).ok())))
    }

    /// Makes the tensors of a unit those of the finished one.
    fn take_place(&mut self, shard: &Path, name: &str, entry: &UnitEntry) -> Result<()> {
        if let Some(old) = self.units().get(name)
            && old.parts().iter().any(|part| !entry.tensors.contains(&part.name))
        {
            return Err(Error::corrupt(shard, Some(name), "has the name of a unit that holds other tensors"));
        }
        let mut offset = 0u64;
        for tensor in &entry.tensors {
            let found = self.tensors.get_mut(tensor).ok_or_else(|| {
                Error::corrupt(shard, Some(tensor), "is no tensor of the checkpoint that it was made from")
            })?;
            found.unit = name.to_owned();
            found.unit_offset = offset;
            (found.zero, found.made) = (false, false);
            offset = offset.saturating_add(found.bytes);
            if let Some(manifest) = &mut self.manifest {
                // What it was no longer holds.
                manifest.tensors.remove(tensor);
            }
        }
        Ok(())
    }
}
