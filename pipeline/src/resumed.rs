//! The shards that an interrupted run had finished: what is published is hashed again, not believed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use llmpress_formats::ShardFile;
use rayon::prelude::*;

use crate::complete::digest;
use crate::plan::PlannedShard;
use crate::progress::Silent;
use crate::receipt::Receipt;
use crate::{Plan, Result};

/// Receipts of a plan's shards that are there and whole, by file.
pub(crate) fn finished<'a>(root: &Path, plan: &'a Plan) -> BTreeMap<&'a str, Receipt> {
    let mut done = BTreeMap::new();
    for shard in &plan.shards {
        if let Some(receipt) = receipt_of(root, plan, shard) {
            done.insert(shard.file.as_str(), receipt);
        }
    }
    done
}

/// The receipt of a shard that is there and whole.
pub(crate) fn receipt_of(root: &Path, plan: &Plan, shard: &PlannedShard) -> Option<Receipt> {
    let receipt = Receipt::read(root, &shard.file, &plan.fingerprint)?;
    let whole = describes(&receipt, shard) && holds(&root.join(&shard.file), &receipt).unwrap_or(false);
    whole.then_some(receipt)
}

/// Whether a receipt is of what the plan puts into the shard.
fn describes(receipt: &Receipt, shard: &PlannedShard) -> bool {
    let planned: BTreeSet<&String> = shard.units.iter().flat_map(|u| &u.tensors).collect();
    let named: Vec<&String> = receipt.units.values().flat_map(|u| &u.tensors).collect();
    named.len() == planned.len()
        && named.into_iter().collect::<BTreeSet<_>>() == planned
        && receipt.tensors.keys().collect::<BTreeSet<_>>() == planned
}

/// Whether a shard has the bytes that its receipt says.
fn holds(path: &Path, receipt: &Receipt) -> Result<bool> {
    let shard = ShardFile::open(path)?;
    let components: Vec<_> = receipt.units.values().flat_map(|u| u.components.values()).collect();
    let names: BTreeSet<&String> = components.iter().map(|c| &c.tensor).collect();
    let stored = shard.header().tensors();
    let bytes: u64 = stored.iter().map(|tensor| tensor.bytes).sum();
    if shard.entry()? != receipt.shard || names.len() != stored.len() || bytes != receipt.stored_bytes {
        return Ok(false);
    }
    let whole = components.par_iter().all(|entry| {
        shard.header().get(&entry.tensor).is_some_and(|info| {
            let component = shard.component(info);
            let digest = digest(info.bytes, |at, piece| component.read_at(at, piece), &Silent);
            digest.is_ok_and(|digest| digest == entry.blake3)
        })
    });
    Ok(whole)
}
