//! The checkpoint that others are stored as differences from.
//!
//! ```text
//! tensor of OUT (delta) --digest, name--> tensor of the base --compared once, before it is used--> read in ranges
//! ```

use std::path::Path;
use std::sync::{Arc, OnceLock};

use crate::{Checkpoint, Digest, Dtype, Error, Result};

/// Bytes that are hashed at a time.
const PIECE: usize = 1 << 20;

/// A base: its name, and where it is, if that is known. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Base {
    name: Arc<str>,
    checkpoint: Option<Arc<Checkpoint>>,
}

impl Base {
    /// Opens a checkpoint to store others as differences from, or to read what is stored so: any that is itself whole.
    ///
    /// # Errors
    /// Those of [`Checkpoint::open`]; a directory that is itself stored as its difference from another.
    pub fn open(root: &Path) -> Result<Self> {
        Self::of(Arc::new(Checkpoint::open(root)?))
    }

    /// An open checkpoint as a base.
    ///
    /// # Errors
    /// A checkpoint that is itself stored as its difference from another.
    pub fn of(checkpoint: Arc<Checkpoint>) -> Result<Self> {
        if let Some(base) = checkpoint.manifest().and_then(|manifest| manifest.base.as_ref()) {
            let what = format!(
                "is itself stored as its difference from {}, so it cannot be a base: `llmpress restore` it with its own --base \
                 first, and give what comes of it",
                base.name
            );
            return Err(Error::unsupported(checkpoint.root(), None, what));
        }
        Ok(Self { name: checkpoint.own_name().into(), checkpoint: Some(checkpoint) })
    }

    /// One that only its name is known of.
    pub(crate) fn named(name: &str) -> Self {
        Self { name: name.into(), checkpoint: None }
    }

    /// Its name: see [`Checkpoint::own_name`].
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The checkpoint, where it is known.
    pub fn checkpoint(&self) -> Option<&Checkpoint> {
        self.checkpoint.as_deref()
    }

    /// The tensor of this name, whose bytes have this digest, to read another of the same dtype and shape by.
    pub(crate) fn tensor(
        &self,
        name: &str,
        dtype: Dtype,
        shape: &[u64],
        blake3: Digest,
    ) -> Result<BaseTensor> {
        let Some(checkpoint) = &self.checkpoint else {
            return Err(Error::Invalid(format!(
                "tensor {name}: is stored as its difference from that of {} (BLAKE3 {blake3}): restore and verify take --base DIR, where \
                 that checkpoint is; whatever else is to be done with it takes what `llmpress restore OUT DIR --base BASE` makes",
                self.name
            )));
        };
        let found = checkpoint.tensor(name).ok().filter(|t| t.dtype == dtype && t.shape == shape);
        if found.is_none() {
            return Err(Error::Invalid(format!(
                "{}: is not the base that it was stored with, {}: it has no tensor {name} that is {} {shape:?}",
                checkpoint.root().display(),
                self.name,
                dtype.name()
            )));
        }
        Ok(BaseTensor {
            of: self.name.clone(),
            checkpoint: checkpoint.clone(),
            name: name.to_owned(),
            blake3,
            checked: OnceLock::new(),
        })
    }
}

impl Checkpoint {
    /// The name of its directory, or in the cache of a hub the last word of the repository's.
    pub fn own_name(&self) -> String {
        let root = self.root().canonicalize().ok();
        root.as_deref().and_then(name).unwrap_or("checkpoint").to_owned()
    }
}

fn name(root: &Path) -> Option<&str> {
    let snapshots = root.parent()?;
    let repository = snapshots.parent().and_then(|repository| repository.file_name()?.to_str());
    match repository.and_then(|repository| repository.strip_prefix("models--")) {
        Some(words) if snapshots.ends_with("snapshots") => words.rsplit("--").next(),
        _ => root.file_name()?.to_str(),
    }
}

/// A tensor of a base.
#[derive(Debug)]
pub(crate) struct BaseTensor {
    of: Arc<str>,
    checkpoint: Arc<Checkpoint>,
    name: String,
    blake3: Digest,
    /// The digest that it was found to have, or why it cannot be read.
    checked: OnceLock<std::result::Result<Digest, String>>,
}

impl BaseTensor {
    /// Fills `out` from byte `offset`. The first time all of it is hashed, by whoever is first: others wait.
    ///
    /// # Errors
    /// A tensor with another digest; those of [`Checkpoint::read`].
    pub(crate) fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let root = self.checkpoint.root().display();
        match self.checked.get_or_init(|| self.digest().map_err(|e| e.to_string())) {
            Ok(digest) if *digest == self.blake3 => self.checkpoint.read(&self.name, offset, out),
            Ok(digest) => Err(Error::Invalid(format!(
                "{root}: is not the base that it was stored with, {}: tensor {} has BLAKE3 {digest} instead of {}: give --base \
                 the checkpoint that it was made from",
                self.of, self.name, self.blake3
            ))),
            Err(why) => Err(Error::Invalid(format!("base {}: tensor {}: {why}", self.of, self.name))),
        }
    }

    fn digest(&self) -> Result<Digest> {
        let bytes = self.checkpoint.tensor(&self.name)?.bytes;
        let mut hasher = blake3::Hasher::new();
        // Words of 64 bits, so that it is aligned for every decoder.
        let mut piece = vec![0u64; (bytes.min(PIECE as u64) as usize).div_ceil(8)];
        let piece = bytemuck::cast_slice_mut::<u64, u8>(&mut piece);
        let mut at = 0;
        while at < bytes {
            let take = (bytes - at).min(PIECE as u64) as usize;
            let piece = piece.get_mut(..take).unwrap_or_default();
            self.checkpoint.read(&self.name, at, piece)?;
            hasher.update(piece);
            at += take as u64;
        }
        Ok(hasher.finalize().into())
    }
}
