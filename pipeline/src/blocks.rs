//! The stage of a pass that finishes units, block by block, and the streams that the next block needs.
//!
//! ```text
//! OUT/.llmpress/passes/N/pass.json                what the pass is of: another one's blocks are none of its
//!                       /transforms.json          what the model gets before, once it is known
//!                       /widths.json              widths of matrices, where they are assigned
//!                       /forms.json               forms of matrices, where they are chosen
//!                       /training.state           where a pass that trains goes on: it says itself of what run it is
//!                       /block-00003.safetensors  the units of a block, synced before
//!                       /block-00003.json         their receipt
//!                       /block-00003.streams      only of the last one: what goes on from there
//! ```

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use llmpress_formats::encoding::{PackedUnit, stored_name};
use llmpress_formats::{
    Checkpoint, ComponentEntry, Digest, Error as FormatError, ShardEntry, ShardFile, ShardWriter, SlotPlan,
    Transform, UnitEntry, read_small_file, write_atomic,
};
use llmpress_model::folded;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

const PASS_FILE: &str = "pass.json";
const TRANSFORMS_FILE: &str = "transforms.json";
/// Widths of matrices.
pub(crate) const WIDTHS_FILE: &str = "widths.json";
/// Forms of matrices.
pub(crate) const FORMS_FILE: &str = "forms.json";
const STATE_FILE: &str = "training.state";
/// The extension of streams.
const STREAMS: &str = "streams";
const MAX_PASS_BYTES: u64 = 1 << 20;
const MAX_RECEIPT_BYTES: u64 = 1 << 28;
/// Bytes that are hashed at a time.
const PIECE: usize = 1 << 20;

/// The finished blocks of a pass.
pub(crate) struct Blocks {
    dir: PathBuf,
    fingerprint: String,
    transforms: Vec<Transform>,
    finished: Vec<Finished>,
}

/// Writes streams to a file of this name.
pub(crate) type Save<'a> = &'a mut dyn FnMut(&mut dyn Write, &Path) -> llmpress_formats::Result<()>;

/// A finished tensor, and why it is not as it was asked for.
pub(crate) struct Made {
    pub(crate) name: String,
    pub(crate) unit: PackedUnit,
    pub(crate) instead: Option<String>,
}

/// A finished block.
struct Finished {
    shard: PathBuf,
    receipt: Receipt,
}

/// What a finished block holds. The file begins with the digest of the rest.
#[derive(Serialize, Deserialize)]
struct Receipt {
    fingerprint: String,
    /// Its shard; a block without units has none.
    shard: Option<ShardEntry>,
    units: BTreeMap<String, UnitEntry>,
    /// What learning came to, and what else is to be told of the block: as its pass writes it.
    lessons: Vec<serde_json::Value>,
    /// Of the streams after it, where the next block needs them.
    streams: Option<Digest>,
    /// What was learned to be folded in with its units.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    transforms: Vec<serde_json::Value>,
}

impl Receipt {
    /// The receipt of a block of this pass, if there is a whole one.
    fn read(path: &Path, fingerprint: &str) -> Option<Self> {
        let receipt: Self = read_hashed(path)?;
        (receipt.fingerprint == fingerprint).then_some(receipt)
    }

    /// Whether a shard has the bytes that the receipt says.
    fn is_of(&self, path: &Path) -> Result<bool> {
        let Some(said) = &self.shard else { return Ok(true) };
        let shard = ShardFile::open(path)?;
        if shard.entry()? != *said {
            return Ok(false);
        }
        let mut buffer = vec![0; PIECE];
        for link in self.units.values().flat_map(|unit| unit.components.values()) {
            let Some(info) = shard.header().get(&link.tensor) else { return Ok(false) };
            let component = shard.component(info);
            let mut hasher = blake3::Hasher::new();
            for at in (0..component.bytes()).step_by(PIECE) {
                let piece = &mut buffer[..(component.bytes() - at).min(PIECE as u64) as usize];
                component.read_at(at, piece)?;
                hasher.update_rayon(piece);
            }
            if Digest::from(hasher.finalize()) != link.blake3 {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Transformations of a pass.
#[derive(Serialize, Deserialize)]
struct TransformsFile {
    fingerprint: String,
    transforms: Vec<serde_json::Value>,
}

/// What a pass settles before its first block.
#[derive(Serialize, Deserialize)]
struct SettledFile<T> {
    fingerprint: String,
    settled: T,
}

/// Writes JSON after the digest of it.
fn write_hashed(path: &Path, value: &impl Serialize) -> llmpress_formats::Result<()> {
    let json =
        serde_json::to_vec(value).map_err(|e| FormatError::Invalid(format!("{}: {e}", path.display())))?;
    let mut bytes = format!("{}\n", Digest::of(&json)).into_bytes();
    bytes.extend(json);
    write_atomic(path, &bytes)
}

/// What [`write_hashed`] wrote, if it is whole.
fn read_hashed<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let bytes = read_small_file(path, MAX_RECEIPT_BYTES).ok()?;
    let end = bytes.iter().position(|b| *b == b'\n')?;
    let (digest, json) = (&bytes[..end], &bytes[end + 1..]);
    if digest != Digest::of(json).to_string().as_bytes() {
        return None;
    }
    serde_json::from_slice(json).ok()
}

#[derive(Serialize, Deserialize)]
struct PassFile {
    fingerprint: String,
}

impl Blocks {
    /// Goes on in `dir`, which is there, after the blocks that a pass of the same fingerprint finished: they are hashed, not
    /// believed, and what is damaged is made again. What else is there is removed.
    pub(crate) fn open(dir: &Path, fingerprint: &str) -> Result<Self> {
        let (dir, fingerprint) = (dir.to_owned(), fingerprint.to_owned());
        let mut blocks = Self { dir, fingerprint, transforms: Vec::new(), finished: Vec::new() };
        let path = blocks.dir.join(PASS_FILE);
        let pass = read_small_file(&path, MAX_PASS_BYTES).ok();
        let pass: Option<PassFile> = pass.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        if pass.is_some_and(|pass| pass.fingerprint == blocks.fingerprint) {
            while let Some(block) = blocks.read(blocks.finished.len()) {
                blocks.finished.push(block);
            }
            // Streams of earlier blocks are gone: without those of the last one all is made again.
            if !blocks.has_streams().unwrap_or(false) {
                blocks.finished.clear();
            }
        }
        blocks.clear()?;
        let pass = PassFile { fingerprint: blocks.fingerprint.clone() };
        let bytes = serde_json::to_vec(&pass).map_err(|e| Error::Invalid(format!("{PASS_FILE}: {e}")))?;
        write_atomic(&path, &bytes)?;
        Ok(blocks)
    }

    /// A file for what does not fit the memory while the pass runs.
    pub(crate) fn scratch(&self) -> PathBuf {
        self.dir.join("scratch")
    }

    /// A file for what a pass goes on from before it has finished anything.
    pub(crate) fn state(&self) -> PathBuf {
        self.dir.join(STATE_FILE)
    }

    /// What this pass has settled under a name, or finds now, and keeps.
    pub(crate) fn settled<T: Serialize + DeserializeOwned>(
        &self,
        file: &str,
        find: impl FnOnce() -> llmpress_formats::Result<T>,
    ) -> Result<T> {
        if let Some(kept) = self.recall(file) {
            return Ok(kept);
        }
        let kept = SettledFile { fingerprint: self.fingerprint.clone(), settled: find()? };
        write_hashed(&self.dir.join(file), &kept)?;
        Ok(kept.settled)
    }

    /// What this pass has settled under a name, if it has.
    pub(crate) fn recall<T: DeserializeOwned>(&self, file: &str) -> Option<T> {
        let kept: SettledFile<T> = read_hashed(&self.dir.join(file))?;
        (kept.fingerprint == self.fingerprint).then_some(kept.settled)
    }

    /// Takes the transformations that this pass kept, or finds them, and keeps them.
    pub(crate) fn transform(
        &mut self,
        find: impl FnOnce() -> llmpress_formats::Result<Vec<Transform>>,
    ) -> Result<()> {
        let path = self.dir.join(TRANSFORMS_FILE);
        let kept = read_hashed(&path).filter(|kept: &TransformsFile| kept.fingerprint == self.fingerprint);
        self.transforms = match kept.map(|kept| Transform::parse_all(&path, &kept.transforms)) {
            Some(Ok(transforms)) => transforms,
            Some(Err(_)) | None => {
                let transforms = find()?;
                let file = TransformsFile {
                    fingerprint: self.fingerprint.clone(),
                    transforms: values(&transforms)?,
                };
                write_hashed(&path, &file)?;
                transforms
            }
        };
        Ok(())
    }

    /// What the model got before.
    pub(crate) fn transforms(&self) -> &[Transform] {
        &self.transforms
    }

    /// What it has got by now: what was learned with each block as well.
    pub(crate) fn all_transforms(&self) -> Result<Vec<Transform>> {
        let mut all = Vec::new();
        for (block, finished) in self.finished.iter().enumerate() {
            all.extend(Transform::parse_all(&self.path(block, "json"), &finished.receipt.transforms)?);
        }
        all.extend_from_slice(&self.transforms);
        Ok(all)
    }

    /// How many blocks are finished.
    pub(crate) fn count(&self) -> usize {
        self.finished.len()
    }

    fn path(&self, block: usize, extension: &str) -> PathBuf {
        self.dir.join(format!("block-{block:05}.{extension}"))
    }

    fn read(&self, block: usize) -> Option<Finished> {
        let shard = self.path(block, "safetensors");
        let receipt = Receipt::read(&self.path(block, "json"), &self.fingerprint)?;
        receipt.is_of(&shard).unwrap_or(false).then_some(Finished { shard, receipt })
    }

    /// Removes what is of no finished block.
    fn clear(&self) -> Result<()> {
        let mut kept: Vec<PathBuf> =
            [TRANSFORMS_FILE, WIDTHS_FILE, FORMS_FILE, STATE_FILE].map(|name| self.dir.join(name)).into();
        for block in 0..self.count() {
            kept.extend(["safetensors", "json"].map(|extension| self.path(block, extension)));
        }
        if let Some(last) = self.count().checked_sub(1) {
            kept.push(self.path(last, STREAMS));
        }
        let io = |e| FormatError::io(&self.dir, "read", e);
        for entry in std::fs::read_dir(&self.dir).map_err(io)? {
            let path = entry.map_err(io)?.path();
            if !kept.contains(&path) {
                std::fs::remove_file(&path).map_err(|e| FormatError::io(&path, "remove", e))?;
            }
        }
        Ok(())
    }

    /// What learning came to in the finished blocks, as their pass wrote it.
    pub(crate) fn lessons<T: DeserializeOwned>(&self) -> Result<Vec<T>> {
        let lessons = self.finished.iter().flat_map(|block| &block.receipt.lessons);
        let read = |lesson: &serde_json::Value| serde_json::from_value(lesson.clone());
        lessons.map(read).collect::<Result<_, _>>().map_err(|e| Error::Invalid(format!("a lesson: {e}")))
    }

    /// Keeps the units of the next block, what was learned to be folded in with them, what learning came to, and its streams:
    /// written and synced before their receipt.
    pub(crate) fn write(
        &mut self,
        (units, transforms): (&[Made], &[Transform]),
        lessons: &[impl Serialize],
        streams: Option<Save<'_>>,
    ) -> llmpress_formats::Result<()> {
        let block = self.count();
        let shard = self.path(block, "safetensors");
        let mut receipt = Receipt {
            fingerprint: self.fingerprint.clone(),
            shard: None,
            units: BTreeMap::new(),
            lessons: values(lessons)?,
            streams: None,
            transforms: values(transforms)?,
        };
        if !units.is_empty() {
            self.write_shard(&shard, units, &mut receipt)?;
        }
        if let Some(save) = streams {
            let path = self.path(block, STREAMS);
            let io = |e| FormatError::io(&path, "write", e);
            let mut file = Hashing {
                file: BufWriter::new(File::create(&path).map_err(io)?),
                hasher: blake3::Hasher::new(),
            };
            save(&mut file, &path)?;
            file.flush().map_err(io)?;
            file.file.get_ref().sync_all().map_err(io)?;
            receipt.streams = Some(file.hasher.finalize().into());
        }
        write_hashed(&self.path(block, "json"), &receipt)?;
        self.finished.push(Finished { shard, receipt });
        if let Some(before) = block.checked_sub(1) {
            // Of no more use; what is left of it does no harm.
            let _ = std::fs::remove_file(self.path(before, STREAMS));
        }
        Ok(())
    }

    fn write_shard(
        &self,
        path: &Path,
        units: &[Made],
        receipt: &mut Receipt,
    ) -> llmpress_formats::Result<()> {
        let mut slots = Vec::new();
        for Made { name, unit, instead } in units {
            let encoding = unit.encoding();
            for (spec, bytes) in unit.components() {
                let stored = stored_name(name, &encoding, spec.name);
                slots.push((
                    SlotPlan { name: stored, dtype: spec.dtype, shape: spec.shape, exact: true },
                    bytes,
                    name,
                    spec.name,
                ));
            }
            let entry = UnitEntry {
                encoding: serde_json::to_value(&encoding)
                    .map_err(|e| FormatError::Invalid(format!("unit {name}: {e}")))?
                    .into(),
                tensors: vec![name.clone()],
                components: BTreeMap::new().into(),
                fallback: instead.clone(),
            };
            receipt.units.insert(name.clone(), entry);
        }
        // As all shards are laid out: larger dtypes first.
        slots.sort_by(|(a, ..), (b, ..)| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
        let plan: Vec<SlotPlan> = slots.iter().map(|(slot, ..)| slot.clone()).collect();
        let mut writer = ShardWriter::create(path, plan.into_iter(), BTreeMap::new())?;
        for (slot, bytes, unit, component) in slots {
            writer.place(&slot.name, slot.dtype, &slot.shape)?.write_at(0, bytes)?;
            if let Some(entry) = receipt.units.get_mut(unit) {
                let link = ComponentEntry { tensor: slot.name, blake3: Digest::of(bytes) };
                entry.components.insert(component, link);
            }
        }
        let written = writer.finish()?;
        receipt.shard = Some(ShardEntry { bytes: written.bytes, header_blake3: written.header_blake3 });
        Ok(())
    }

    /// Whether the streams after the last finished block are there and whole, if there are to be any.
    fn has_streams(&self) -> Result<bool> {
        let Some(said) = self.finished.last().and_then(|last| last.receipt.streams) else { return Ok(true) };
        let path = self.path(self.count() - 1, STREAMS);
        let io = |e| FormatError::io(&path, "read", e);
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(File::open(&path).map_err(io)?).map_err(io)?;
        Ok(Digest::from(hasher.finalize()) == said)
    }

    /// Reads the streams after the last finished block, if there are any.
    pub(crate) fn streams<T>(
        &self,
        load: impl FnOnce(&mut dyn Read, &Path) -> llmpress_formats::Result<T>,
    ) -> Result<Option<T>> {
        if self.finished.last().is_none_or(|last| last.receipt.streams.is_none()) {
            return Ok(None);
        }
        let path = self.path(self.count() - 1, STREAMS);
        let file = File::open(&path).map_err(|e| FormatError::io(&path, "read", e))?;
        Ok(Some(load(&mut BufReader::new(file), &path)?))
    }

    /// The checkpoint, transformed, with all finished units in place of what they were made from.
    pub(crate) fn view(&self, checkpoint: Checkpoint) -> Result<Checkpoint> {
        let checkpoint = folded(checkpoint, self.all_transforms()?)?;
        let mut made = self.finished.iter().filter(|block| !block.receipt.units.is_empty());
        let view = |view: Checkpoint, block: &Finished| {
            view.with_finished(ShardFile::open(&block.shard)?, &block.receipt.units)
        };
        Ok(made.try_fold(checkpoint, view)?)
    }
}

fn values(things: &[impl Serialize]) -> llmpress_formats::Result<Vec<serde_json::Value>> {
    let value = |thing| serde_json::to_value(thing).map_err(|e| FormatError::Invalid(e.to_string()));
    things.iter().map(value).collect()
}

/// Hashes what it writes.
struct Hashing {
    file: BufWriter<File>,
    hasher: blake3::Hasher,
}

impl Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let count = self.file.write(bytes)?;
        self.hasher.update(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}
