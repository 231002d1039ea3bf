//! What a job makes, of what.

use std::collections::{BTreeMap, BTreeSet};

use llmpress_formats::{CONFIG_FILE, Checkpoint, INDEX_FILE, MANIFEST_FILE};

use crate::Plan;
use crate::carried::Carried;
use crate::journal::RESTORED_FILE;

/// What is to be made, of what.
#[derive(Clone, Copy)]
pub(crate) struct Job<'a> {
    pub(crate) checkpoint: &'a Checkpoint,
    pub(crate) plan: &'a Plan,
    pub(crate) carried: &'a Carried,
    pub(crate) extra_files: &'a BTreeMap<String, Vec<u8>>,
}

impl Job<'_> {
    /// The file that makes the output complete.
    pub(crate) fn last_file(&self) -> &'static str {
        if self.plan.plain { RESTORED_FILE } else { MANIFEST_FILE }
    }

    /// Every file that it writes.
    pub(crate) fn names(&self) -> BTreeSet<String> {
        if let Some(file) = self.plan.single_file() {
            let own = [self.last_file(), file].map(str::to_owned);
            return own.into_iter().chain(self.extra_files.keys().cloned()).collect();
        }
        let own = [self.last_file(), INDEX_FILE, CONFIG_FILE].map(str::to_owned);
        let shards = self.plan.shards.iter().map(|shard| shard.file.clone());
        let copied = self.carried.files.keys().chain(self.extra_files.keys()).cloned();
        let made = self.carried.made.keys().map(|name| (*name).to_owned());
        own.into_iter().chain(shards).chain(copied).chain(made).collect()
    }
}
