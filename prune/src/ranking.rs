//! A ranking: what is removed first, and the scores behind it; saved as `pruning.json`.

use std::path::Path;

use llmpress_calibrate::Calibration;
use llmpress_formats::{Checkpoint, Digest, Error, Removal, Result, read_small_file, write_atomic};
use llmpress_model::{Model, SubLayer};
use serde::{Deserialize, Serialize};

use crate::{Pass, layer_of};

/// The name of the saved ranking in a pruned checkpoint.
pub const PRUNING_FILE: &str = "pruning.json";
/// The largest ranking that is read.
const MAX_BYTES: u64 = 64 << 20;

/// What is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// An attention with its norm.
    Attention,
    /// An MLP with its norm.
    Mlp,
    /// Both.
    Block,
}

/// A sub-layer or layer with its score.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scored {
    /// The layer.
    pub layer: usize,
    /// What of it.
    pub kind: Kind,
    /// LLM-Drop: the mean cosine of the residual before and after. FinerCut: the distance of the outputs when it is
    /// removed as well. 0 for baselines.
    pub score: f64,
}

impl Scored {
    pub(crate) fn new(site: SubLayer, score: f64) -> Self {
        let kind = match site {
            SubLayer::Attention(_) => Kind::Attention,
            SubLayer::Mlp(_) => Kind::Mlp,
        };
        Self { layer: layer_of(site), kind, score }
    }

    /// The sub-layers that go.
    pub fn sub_layers(&self) -> Vec<SubLayer> {
        let (attention, mlp) = (SubLayer::Attention(self.layer), SubLayer::Mlp(self.layer));
        match self.kind {
            Kind::Attention => vec![attention],
            Kind::Mlp => vec![mlp],
            Kind::Block => vec![attention, mlp],
        }
    }

    pub(crate) fn same_place(&self, other: &Self) -> bool {
        (self.layer, self.kind) == (other.layer, other.kind)
    }
}

/// A ranking.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ranking {
    /// How it was made, without an amount.
    pub method: String,
    /// Digest of the model's configuration and tensors, and of the calibration.
    pub fingerprint: String,
    /// What tells the model from others, in whatever encoding: its tensors' names, dtypes and shapes, and some of the bytes
    /// of each. `None` in rankings of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Layers of the model.
    pub layers: usize,
    /// Sub-layers of the model.
    pub sub_layers: usize,
    /// Calibration windows read.
    #[serde(default)]
    pub windows: usize,
    /// Tokens of a window.
    #[serde(default)]
    pub window: usize,
    /// Whether a search ended that was to go on: a later run can.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unfinished: bool,
    /// Every candidate before anything is removed.
    pub scores: Vec<Scored>,
    /// What is removed, first to last.
    pub removed: Vec<Scored>,
}

impl Ranking {
    /// An empty ranking by calibration.
    pub(crate) fn calibrated(model: &Model, method: String, calibration: &Calibration) -> Result<Self> {
        Ok(Self {
            windows: calibration.windows().len(),
            window: calibration.length(),
            model: Some(mark(model)?),
            ..Self::of(model, method, fingerprint(model, &contents(model)?, &calibration.digest()))
        })
    }

    /// An empty ranking that looks at no weights.
    pub(crate) fn baseline(model: &Model, method: String) -> Self {
        Self::of(model, method, fingerprint(model, &[], ""))
    }

    fn of(model: &Model, method: String, fingerprint: String) -> Self {
        Self {
            fingerprint,
            method,
            model: None,
            layers: model.config().layers.len(),
            sub_layers: model.sub_layers().len(),
            windows: 0,
            window: 0,
            unfinished: false,
            scores: Vec::new(),
            removed: Vec::new(),
        }
    }

    /// Whether it is the finished ranking that `pass` would make of this model on this calibration.
    ///
    /// # Errors
    /// Weights that cannot be read: they are compared where a calibration is.
    pub fn answers(&self, pass: &Pass, model: &Model, calibration: Option<&Calibration>) -> Result<bool> {
        let enough = || pass.count(self).is_ok_and(|count| count <= self.removed.len());
        if self.method != pass.ranking_name() || self.unfinished || !enough() {
            return Ok(false);
        }
        let fingerprint = match calibration {
            Some(calibration) => fingerprint(model, &contents(model)?, &calibration.digest()),
            None => fingerprint(model, &[], ""),
        };
        Ok(self.fingerprint == fingerprint)
    }

    /// The first `count` removals.
    ///
    /// # Errors
    /// [`Error::Invalid`] where there are not so many.
    pub fn removal(&self, count: usize, portable: bool) -> Result<Removal> {
        let taken = self.removed.get(..count).ok_or_else(|| {
            Error::Invalid(format!(
                "{count} are to be removed; the ranking by {} has {}",
                self.method,
                self.removed.len()
            ))
        })?;
        let mut removal = Removal { portable, ..Removal::default() };
        for site in taken.iter().flat_map(Scored::sub_layers) {
            match site {
                SubLayer::Attention(layer) => removal.attention.insert(layer),
                SubLayer::Mlp(layer) => removal.mlp.insert(layer),
            };
        }
        Ok(removal)
    }

    /// Reads a saved ranking.
    ///
    /// # Errors
    /// It cannot be read, or is no ranking.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = read_small_file(path, MAX_BYTES)?;
        serde_json::from_slice(&bytes)
            .map_err(|e| Error::corrupt(path, None, format!("is not a ranking: {e}")))
    }

    /// Its JSON.
    ///
    /// # Errors
    /// A score that is not a number.
    pub fn to_json(&self) -> Result<Vec<u8>> {
        let mut bytes =
            serde_json::to_vec_pretty(self).map_err(|e| Error::Invalid(format!("the ranking: {e}")))?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// Saves it, whole or not at all.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        write_atomic(path, &self.to_json()?)
    }

    /// Refuses a ranking of another model. One that does not say of which it is, is taken where the layers fit.
    ///
    /// # Errors
    /// [`Error::Invalid`]: what differs. Tensors that cannot be read.
    pub fn check(&self, model: &Model) -> Result<()> {
        let (layers, sub_layers) = (model.config().layers.len(), model.sub_layers().len());
        if (self.layers, self.sub_layers) != (layers, sub_layers) {
            return Err(Error::Invalid(format!(
                "the ranking is of a model of {} layers and {} sub-layers; {} has {layers} and {sub_layers}",
                self.layers,
                self.sub_layers,
                model.checkpoint().root().display()
            )));
        }
        match &self.model {
            Some(made_of) if *made_of != mark(model)? => Err(Error::Invalid(format!(
                "the ranking was made of a model with other weights than {}: rank this one with `llmpress rank`, or give the \
                 ranking that was made of it",
                model.checkpoint().root().display()
            ))),
            _ => Ok(()),
        }
    }
}

/// Bytes at the beginning, in the middle and at the end of a tensor that tell it from others.
const SAMPLE: u64 = 1024;

/// What tells a model from others: little is read, so that a plan can be checked by it.
fn mark(model: &Model) -> Result<String> {
    let checkpoint = model.checkpoint();
    let mut hasher = blake3::Hasher::new();
    for (name, tensor) in checkpoint.tensors() {
        let head = format!("{name}\n{} {:?}\n", tensor.dtype.name(), tensor.shape);
        hasher.update(&(head.len() as u64).to_le_bytes());
        hasher.update(head.as_bytes());
        let take = SAMPLE.min(tensor.bytes);
        let mut piece = vec![0; take as usize];
        // On whole elements of any dtype.
        let middle = tensor.bytes / 2 / 16 * 16;
        for at in [0, middle.min(tensor.bytes - take), tensor.bytes - take] {
            checkpoint.read(name, at, &mut piece)?;
            hasher.update(&piece);
        }
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// Bytes that are hashed at a time.
const PIECE: usize = 4 << 20;

/// What a ranking depends on: configuration, tensors, and where they are looked at their values and the calibration.
fn fingerprint(model: &Model, contents: &[Digest], calibration: &str) -> String {
    let mut hasher = blake3::Hasher::new();
    let checkpoint = model.checkpoint();
    let mut field = |text: &str| {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    };
    field(checkpoint.config().map_or("", |c| c.text()));
    for (name, tensor) in checkpoint.tensors() {
        field(name);
        field(&format!("{} {:?}", tensor.dtype.name(), tensor.shape));
    }
    for content in contents {
        field(&content.to_string());
    }
    field(calibration);
    hasher.finalize().to_hex().to_string()
}

/// The digests of all tensors.
fn contents(model: &Model) -> Result<Vec<Digest>> {
    let checkpoint = model.checkpoint();
    checkpoint.tensors().keys().map(|name| content(checkpoint, name)).collect()
}

/// The digest of a tensor's bytes, the same for every encoding of it.
fn content(checkpoint: &Checkpoint, name: &str) -> Result<Digest> {
    let tensor = checkpoint.tensor(name)?;
    let known = checkpoint.manifest().and_then(|m| m.tensors.get(name));
    if let Some(entry) = known.filter(|_| tensor.is_stored()) {
        return Ok(entry.blake3);
    }
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; PIECE.min(tensor.bytes as usize)];
    let mut at = 0;
    while at < tensor.bytes {
        let take = (tensor.bytes - at).min(PIECE as u64) as usize;
        let piece = &mut buffer[..take];
        checkpoint.read(name, at, piece)?;
        hasher.update_rayon(piece);
        at += take as u64;
    }
    Ok(hasher.finalize().into())
}
