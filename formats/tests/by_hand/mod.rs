//! Units whose components are written by hand.

use std::collections::BTreeMap;

use llmpress_formats::encoding::{ComponentSpec, Part, UnitReader};
use llmpress_formats::{Base, Component, Dtype, Encoding, Error, Named, ShardWriter, SlotPlan};

/// A component by hand: dtype, shape, bytes.
pub(crate) type Raw = (Dtype, Vec<u64>, Vec<u8>);

/// Stores components of a unit and opens a reader of it.
pub(crate) fn open(
    encoding: &Encoding,
    dtype: Dtype,
    shape: &[u64],
    stored: &BTreeMap<String, Raw>,
) -> Result<UnitReader, Error> {
    open_on(encoding, dtype, shape, stored, None)
}

/// The same of a unit by a base.
pub(crate) fn open_on(
    encoding: &Encoding,
    dtype: Dtype,
    shape: &[u64],
    stored: &BTreeMap<String, Raw>,
    base: Option<&Base>,
) -> Result<UnitReader, Error> {
    let dir = tempfile::tempdir().unwrap();
    let mut order: Vec<_> = stored.iter().collect();
    order.sort_by_key(|(_, (dtype, ..))| std::cmp::Reverse(*dtype));
    let plan: Vec<SlotPlan> = order
        .iter()
        .map(|(name, (dtype, shape, _))| SlotPlan {
            name: format!("u.{name}"),
            dtype: *dtype,
            shape: shape.clone(),
            exact: true,
        })
        .collect();
    let mut writer =
        ShardWriter::create(&dir.path().join("s"), plan.iter().cloned(), BTreeMap::new()).unwrap();
    let mut components: Named<Component> = Named::new();
    for (slot, (name, (dtype, shape, bytes))) in plan.iter().zip(&order) {
        let slot = writer.place(&slot.name, *dtype, shape).unwrap();
        slot.write_at(0, bytes).unwrap();
        components.insert(name, slot.component().clone());
    }
    let bytes = dtype.byte_len(shape).unwrap_or(0);
    let part = Part { name: "u".to_owned(), dtype, shape: shape.to_vec(), bytes };
    UnitReader::open_on("u", encoding, &[part], &components, base)
}

/// Components as something in memory gives them.
pub(crate) fn raw(components: Vec<(ComponentSpec, &[u8])>) -> BTreeMap<String, Raw> {
    components.into_iter().map(|(c, bytes)| (c.name.to_owned(), (c.dtype, c.shape, bytes.to_vec()))).collect()
}
