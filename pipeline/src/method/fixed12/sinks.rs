//! Where the components of strips go.

use std::collections::BTreeMap;

use llmpress_entropy::fixed12::Strips;
use llmpress_formats::ComponentEntry;
use llmpress_formats::encoding::fixed12 as names;

use crate::Result;
use crate::sink::{Sink, Slots};
use crate::work::{Threads, Work};

/// The components of a matrix that come strip after strip.
pub(in crate::method) struct StripSinks {
    sign_mantissa: Sink,
    codes: Sink,
    offsets: Sink,
    positions: Sink,
    exponents: Sink,
    escapes: u32,
    table: Vec<u32>,
    threads: Threads,
}

impl StripSinks {
    /// Takes the room of the components; `full` makes their names what they are in the unit.
    pub(in crate::method) fn take(
        slots: &mut Slots,
        full: impl Fn(&'static str) -> &'static str,
        work: Work<'_>,
    ) -> Result<Self> {
        let mut take = |name| Sink::take(slots, full(name), work);
        Ok(Self {
            sign_mantissa: take(names::SIGN_MANTISSA)?,
            codes: take(names::CODES)?,
            offsets: take(names::ESCAPE_OFFSETS)?,
            positions: take(names::ESCAPE_POSITIONS)?,
            exponents: take(names::ESCAPE_EXPONENTS)?,
            escapes: 0,
            table: vec![0],
            threads: work.threads,
        })
    }

    /// Adds the next strips.
    pub(in crate::method) fn append<'a>(
        &mut self,
        batch: impl Iterator<Item = &'a Strips> + Clone + Send,
    ) -> Result<()> {
        for count in batch.clone().flat_map(|strips| &strips.escape_counts) {
            self.escapes = self.escapes.wrapping_add(*count);
            self.table.push(self.escapes);
        }
        let Self { sign_mantissa, codes, offsets, positions, exponents, table, .. } = self;
        let mut others = batch.clone();
        let mut batch = batch;
        let (a, b) = self.threads.join(
            || batch.try_for_each(|strips| sign_mantissa.append(&strips.sign_mantissa)),
            || {
                offsets.append(bytemuck::cast_slice(table))?;
                table.clear();
                others.try_for_each(|strips| {
                    codes.append(&strips.codes)?;
                    positions.append(bytemuck::cast_slice(&strips.escape_positions))?;
                    exponents.append(&strips.escape_exponents)
                })
            },
        );
        a.and(b)
    }

    /// Checks that all of them are full.
    pub(in crate::method) fn finish(self, components: &mut BTreeMap<String, ComponentEntry>) -> Result<()> {
        let all = [self.sign_mantissa, self.codes, self.offsets, self.positions, self.exponents];
        all.into_iter().try_for_each(|sink| sink.finish(components))
    }
}
