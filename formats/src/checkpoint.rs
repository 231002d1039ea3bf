//! Opening any checkpoint: Hugging Face, llmpress, official DFloat11.
//!
//! ```text
//! directory --> logical tensors (name, dtype, shape) --> unit (encoding) --> components (views)
//!                          '--- read a byte or row range into the caller's buffer ---'
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use crate::config::DFLOAT11_KEY;
use crate::discovery::STATE_DIR;
use crate::encoding::scaled;
use crate::encoding::{self, Encoding, Part, foreign};
use crate::manifest::{MANIFEST_FILE, Manifest, UnitEntry};
use crate::unit::Unit;
use crate::{
    Base, BaseEntry, Component, Config, Digest, Directory, Dtype, Error, Remake, Result, ShardFile,
    Transform, official,
};

/// What a matrix that another tool quantised appears as.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Numbers {
    /// The tensors that it is stored as.
    Stored,
    /// The matrix where it has codes of integers; else the tensors.
    Codes,
    /// The matrix.
    Dequantised,
}

/// What a directory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Plain safetensors.
    HuggingFace,
    /// A directory with a manifest.
    Llmpress,
    /// An official DFloat11 directory without a manifest.
    Dfloat11,
    /// A GGUF file.
    Gguf,
}

impl Kind {
    /// The name in manifests.
    pub fn name(self) -> &'static str {
        match self {
            Self::HuggingFace => "huggingface",
            Self::Llmpress => "llmpress",
            Self::Dfloat11 => "dfloat11",
            Self::Gguf => "gguf",
        }
    }
}

/// A logical tensor of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Its dtype.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<u64>,
    /// Its size when decoded.
    pub bytes: u64,
    /// The unit that stores it.
    pub unit: String,
    /// Where it starts in the decoded unit.
    pub(crate) unit_offset: u64,
    /// Whether an edit made its bytes zero.
    pub(crate) zero: bool,
    /// Whether its bytes are made when they are read.
    pub(crate) made: bool,
}

impl Tensor {
    /// Whether an edit made its bytes zero: what its unit stores is not it.
    pub fn is_zero(&self) -> bool {
        self.zero
    }

    /// Whether a view makes its bytes of what its unit stores.
    pub fn is_made(&self) -> bool {
        self.made
    }

    /// Whether its bytes are what its unit stores: no edit made them zero, no view makes them of it.
    pub fn is_stored(&self) -> bool {
        !self.zero && !self.made
    }
}

/// How many units there are of an encoding, and what they come to.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct StoredSize {
    /// Units.
    pub units: u64,
    /// Their tensors.
    pub tensors: u64,
    /// Bytes of these when decoded.
    pub bytes: u64,
    /// Bytes of their components.
    pub stored_bytes: u64,
}

/// An open checkpoint directory. `Send + Sync`; nothing is decoded before it is asked for.
#[derive(Debug)]
pub struct Checkpoint {
    kind: Kind,
    directory: Directory,
    pub(crate) config: Option<Config>,
    pub(crate) manifest: Option<Manifest>,
    pub(crate) tensors: BTreeMap<String, Tensor>,
    /// Those of a plain checkpoint are made when they are asked for: they say what its headers say.
    units: OnceLock<BTreeMap<String, Unit>>,
    /// Shards outside of the directory that hold finished units.
    pub(crate) added: Vec<ShardFile>,
    /// What is known of finished units.
    pub(crate) finished: BTreeMap<String, UnitEntry>,
    pub(crate) tied: BTreeMap<String, String>,
    pub(crate) dropped: BTreeMap<String, String>,
    pub(crate) edited: bool,
    /// Whether matrices that another tool quantised appear as numbers.
    dequantised: bool,
    pub(crate) transforms: Vec<Transform>,
    /// Makes the tensors that are not what is stored.
    pub(crate) remake: Option<Arc<dyn Remake>>,
    /// Names in the source of tensors that an edit renamed.
    pub(crate) origins: BTreeMap<String, String>,
    /// What it is to be stored by.
    stored_by: Option<Base>,
}

impl Checkpoint {
    /// Opens a directory, or a GGUF file: reads headers, configuration and manifest, and checks that they fit
    /// together. Errors name the file and the tensor.
    pub fn open(root: &Path) -> Result<Self> {
        Self::open_as(root, Numbers::Stored)
    }

    /// Opens a directory like [`Self::open`]; matrices that another tool quantised ([`crate::encoding::foreign`],
    /// [`crate::encoding::scaled`]) appear as the numbers that they stand for, under the names that they had before. So do small floats
    /// that an llmpress directory keeps as the tensors that they were.
    ///
    /// # Errors
    /// As for [`Self::open`]; a layout or settings of these tools that are not read.
    pub fn open_dequantised(root: &Path) -> Result<Self> {
        Self::open_as(root, Numbers::Dequantised)
    }

    /// Opens a directory like [`Self::open_dequantised`], but small floats with scales stay the tensors that they are stored as: for whoever
    /// takes over codes of integers and keeps everything else without loss.
    ///
    /// # Errors
    /// As for [`Self::open_dequantised`].
    pub fn open_codes(root: &Path) -> Result<Self> {
        Self::open_as(root, Numbers::Codes)
    }

    /// Opens a directory as the plain checkpoint that it can be turned into: what llmpress stored is what it was before, what another tool
    /// packed appears as numbers.
    ///
    /// # Errors
    /// As for [`Self::open_dequantised`].
    pub fn open_plain(root: &Path) -> Result<Self> {
        let is_ours = root.join(MANIFEST_FILE).exists();
        Self::open_as(root, if is_ours { Numbers::Stored } else { Numbers::Dequantised })
    }

    /// A GGUF file: always its numbers, under the names that transformers has.
    fn open_gguf(path: &Path) -> Result<Self> {
        let crate::gguf::Opened { directory, config, units, quantised } = crate::gguf::open(path)?;
        let tensors = collect_tensors(path, &units)?;
        let tied = tied_head(Some(&config), &tensors);
        Ok(Self {
            kind: Kind::Gguf,
            directory,
            config: Some(config),
            manifest: None,
            tensors,
            units: OnceLock::from(units),
            added: Vec::new(),
            finished: BTreeMap::new(),
            tied,
            dropped: BTreeMap::new(),
            edited: false,
            dequantised: quantised,
            transforms: Vec::new(),
            remake: None,
            origins: BTreeMap::new(),
            stored_by: None,
        })
    }

    fn open_as(root: &Path, numbers: Numbers) -> Result<Self> {
        if crate::gguf::is_gguf(root) {
            return Self::open_gguf(root);
        }
        crate::directory::check_directory(root)?;
        let manifest_path = root.join(MANIFEST_FILE);
        let mut manifest = Manifest::read(root)?;
        if manifest.is_none() && root.join(STATE_DIR).is_dir() {
            return Err(Error::corrupt(
                root,
                None,
                "holds an unfinished conversion: finish it with --resume, or make it again elsewhere",
            ));
        }
        let config = Config::read(root)?;
        let official = config.as_ref().filter(|c| manifest.is_none() && c.get(DFLOAT11_KEY).is_some());
        let directory = match (&manifest, official) {
            (Some(manifest), _) => Directory::open_files(root, manifest.shards.keys())?,
            (None, Some(_)) => Directory::open_unindexed(root)?,
            (None, None) => match config.as_ref().map_or(Ok(None), Config::weights_file)? {
                Some(name) => Directory::open_named(root, name)?,
                None => Directory::open(root)?,
            },
        };
        let components =
            || directory.tensors().map(|(shard, info)| (info.name.clone(), shard.component(info)));
        let mut kind = Kind::HuggingFace;
        let mut plain = false;
        let mut units = BTreeMap::new();
        if let Some(manifest) = &manifest {
            kind = Kind::Llmpress;
            let mut stored = components().collect();
            units = manifest_units(&manifest_path, manifest, &mut stored, &directory)?;
            if let Some(name) = stored.keys().next() {
                return Err(Error::corrupt(
                    &manifest_path,
                    Some(name),
                    "is stored in a shard but is not in the manifest: convert the source again",
                ));
            }
        } else if let Some(config) = official {
            kind = Kind::Dfloat11;
            let mut stored = components().collect();
            for unit in official::take_units(config, &mut stored)? {
                units.insert(unit.name, Unit::new(Encoding::Dfloat11, unit.parts, unit.components));
            }
            for (name, component) in stored {
                if units.insert(name.clone(), Unit::plain(component)).is_some() {
                    return Err(Error::corrupt(root, Some(&name), "is both a unit and a tensor"));
                }
            }
        } else if let (Numbers::Codes | Numbers::Dequantised, Some(config)) = (numbers, &config)
            && foreign::any(config, directory.tensors().map(|(_, info)| &*info.name))
        {
            let mut stored = components().collect();
            for unit in foreign::take_units(config, &mut stored)? {
                let encoding = Encoding::Foreign(unit.foreign);
                units.insert(unit.name, Unit::new(encoding, vec![unit.part], unit.components));
            }
            for (name, component) in stored {
                if units.insert(name.clone(), Unit::plain(component)).is_some() {
                    return Err(Error::corrupt(
                        root,
                        Some(&name),
                        "is stored both quantised and as a tensor",
                    ));
                }
            }
        } else {
            plain = true;
        }
        let mut dequantised = units.values().any(|unit| matches!(unit.encoding(), Encoding::Foreign(_)));
        if numbers == Numbers::Dequantised && official.is_none() {
            let mut stored = if plain && scaled::method(root, config.as_ref()).is_some() {
                directory.tensors().map(|(s, i)| (i.name.clone(), Unit::plain(s.component(i)))).collect()
            } else {
                std::mem::take(&mut units)
            };
            let taken = take_scaled(root, config.as_ref(), &mut stored)?;
            if let Some(manifest) = &mut manifest {
                // What they were no longer holds.
                taken.iter().for_each(|name| drop(manifest.tensors.remove(name)));
            }
            (dequantised, plain) = (dequantised || !taken.is_empty(), plain && taken.is_empty());
            units = stored;
        }
        let (mut tensors, units) = match plain {
            true => (plain_tensors(&directory), OnceLock::new()),
            false => (collect_tensors(root, &units)?, OnceLock::from(units)),
        };
        if let Some(units) = units.get() {
            follow_same(root, units, &mut tensors)?;
        }
        let tied = match &manifest {
            Some(manifest) => manifest.tied.clone(),
            None => tied_head(config.as_ref(), &tensors),
        };
        let dropped = manifest.as_ref().map(|m| m.dropped.clone()).unwrap_or_default();
        let transforms = match &manifest {
            Some(manifest) => manifest.transforms(&manifest_path)?,
            None => Vec::new(),
        };
        Ok(Self {
            kind,
            directory,
            config,
            manifest,
            tensors,
            units,
            added: Vec::new(),
            finished: BTreeMap::new(),
            tied,
            dropped,
            edited: false,
            dequantised,
            transforms,
            remake: None,
            origins: BTreeMap::new(),
            stored_by: None,
        })
    }

    /// The checkpoint with the base that its tensors are stored by.
    ///
    /// # Errors
    /// A checkpoint that is not stored so; a base that lacks a tensor of the same name, dtype and shape. (The bytes of one are compared with
    /// their digest when it is first read.)
    pub fn with_base(mut self, base: &Base) -> Result<Self> {
        if self.manifest.as_ref().is_none_or(|manifest| manifest.base.is_none()) {
            return Err(Error::Invalid(format!(
                "{}: is not stored as its difference from another checkpoint: leave --base out",
                self.root().display()
            )));
        }
        let units = self.units.take().unwrap_or_default();
        let on_base = units.into_iter().map(|(name, unit)| Ok((name, unit.with_base(base)?)));
        let units = on_base.collect::<Result<BTreeMap<_, _>>>()?;
        self.units = OnceLock::from(units);
        Ok(self)
    }

    /// The checkpoint, to be stored as its difference from a base: what it is does not change.
    #[must_use]
    pub fn to_store_by(mut self, base: Base) -> Self {
        self.stored_by = Some(base);
        self
    }

    /// What it is to be stored by ([`Self::to_store_by`]).
    pub fn stored_by(&self) -> Option<&Base> {
        self.stored_by.as_ref()
    }

    /// What the directory is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        self.directory.root()
    }

    /// The shards behind it.
    pub fn directory(&self) -> &Directory {
        &self.directory
    }

    /// `config.json`, if there is one.
    pub fn config(&self) -> Option<&Config> {
        self.config.as_ref()
    }

    /// The manifest of an llmpress directory.
    pub fn manifest(&self) -> Option<&Manifest> {
        self.manifest.as_ref()
    }

    /// The logical tensors by name. Tied tensors are not repeated here: see [`Self::tied`].
    pub fn tensors(&self) -> &BTreeMap<String, Tensor> {
        &self.tensors
    }

    /// The units by name.
    pub fn units(&self) -> &BTreeMap<String, Unit> {
        self.units.get_or_init(|| self.plain_units())
    }

    /// A unit for each tensor of the directory.
    fn plain_units(&self) -> BTreeMap<String, Unit> {
        // Sorted already: the tree is built in one go.
        let tensors = self.directory.tensors();
        tensors.map(|(shard, info)| (info.name.clone(), Unit::plain(shard.component(info)))).collect()
    }

    /// Puts a unit in the place of one of its name.
    pub(crate) fn put_unit(&mut self, name: &str, unit: Unit) {
        let mut units = self.units.take().unwrap_or_else(|| self.plain_units());
        units.insert(name.to_owned(), unit);
        self.units = OnceLock::from(units);
    }

    /// What the units come to, by encoding: cheaper than the units themselves where these are a million tensors as they
    /// are.
    pub fn stored_sizes(&self) -> BTreeMap<&'static str, StoredSize> {
        let mut sizes: BTreeMap<&'static str, StoredSize> = BTreeMap::new();
        let mut add = |encoding: &Encoding, (tensors, bytes): (usize, u64), stored: u64| {
            let size = sizes.entry(encoding.name()).or_default();
            size.units += 1;
            size.tensors += tensors as u64;
            size.bytes = size.bytes.saturating_add(bytes);
            size.stored_bytes = size.stored_bytes.saturating_add(stored);
        };
        match self.units.get() {
            Some(units) => {
                units.values().for_each(|u| add(u.encoding(), u.decoded_size(), u.stored_bytes()));
            }
            None => {
                let tensors = self.directory.tensors();
                tensors.for_each(|(_, info)| add(&Encoding::Raw, (1, info.bytes), info.bytes));
            }
        }
        sizes
    }

    /// Tensors that share another one's weights: name -> stored tensor.
    pub fn tied(&self) -> &BTreeMap<String, String> {
        &self.tied
    }

    /// What was done to its weights beside storing them, in order: what the decoded tensors are not without.
    pub fn transforms(&self) -> &[Transform] {
        &self.transforms
    }

    /// The ties that configuration and tensors tell by themselves; those of a good manifest are the same.
    pub fn derived_ties(&self) -> BTreeMap<String, String> {
        tied_head(self.config.as_ref(), &self.tensors)
    }

    /// A tensor by name, following a tie. The error names the nearest existing tensor.
    pub fn tensor(&self, name: &str) -> Result<&Tensor> {
        let stored = self.tied.get(name).map_or(name, String::as_str);
        self.tensors.get(stored).ok_or_else(|| {
            let near = crate::directory::nearest(self.tensors.keys().map(String::as_str), name);
            let hint = near.map(|n| format!("; the nearest is {n}")).unwrap_or_default();
            Error::Invalid(format!("{}: there is no tensor {name}{hint}", self.root().display()))
        })
    }

    /// The unit that stores a tensor.
    pub fn unit_of(&self, tensor: &Tensor) -> Result<&Unit> {
        self.units()
            .get(&tensor.unit)
            .ok_or_else(|| Error::Invalid(format!("there is no unit {}", tensor.unit)))
    }

    /// The bytes of a component of a unit as they are stored, without a copy (mapped memory: do not
    /// shorten the file while the view is used). The unit's components have the sizes and dtypes that its encoding
    /// and the shapes of its tensors ask for.
    pub fn view(&self, unit: &str, component: &str) -> Result<&[u8]> {
        let found = self.units().get(unit);
        if let Some(found) = found.filter(|unit| unit.as_plain().is_none()) {
            found.reader(unit)?;
        }
        let stored = found.and_then(|u| u.components().get(component));
        match stored.and_then(|c| Some((self.shard_of(c)?, c))) {
            Some((shard, stored)) => shard.view(&stored.info),
            None => Err(Error::Invalid(format!("there is no component {component} of a unit {unit}"))),
        }
    }

    /// The shard that holds a component.
    fn shard_of(&self, component: &Component) -> Option<&ShardFile> {
        let named = self.directory.find(component.name()).map(|(shard, _)| shard);
        named.into_iter().chain(&self.added).find(|shard| shard.holds(component))
    }

    /// Refuses a checkpoint of which a shard changed since it was opened.
    pub fn check_unchanged(&self) -> Result<()> {
        self.directory.check_unchanged()?;
        self.added.iter().try_for_each(ShardFile::check_unchanged)
    }

    /// Checks that the components of every unit have the sizes and dtypes that its encoding and the shapes of its
    /// tensors ask for: before anything is planned by them. Reads no data but small tables.
    ///
    /// # Errors
    /// The first component that does not fit, by name.
    pub fn check_units(&self) -> Result<()> {
        self.units().iter().try_for_each(|(name, unit)| unit.check(name))
    }

    /// Whether matrices that another tool quantised appear as numbers.
    pub fn is_dequantised(&self) -> bool {
        self.dequantised
    }

    /// Some rows of a matrix that is stored as `abq`, as they are stored.
    ///
    /// # Errors
    /// A tensor that is not, or is not there; rows past the end; components that break their format.
    pub fn packed_rows(&self, name: &str, rows: Range<u64>) -> Result<encoding::abq::Packed<'static>> {
        let tensor = self.tensor(name)?;
        let packed = self.unit_of(tensor)?.reader(&tensor.unit)?.packed_rows(rows);
        packed.unwrap_or_else(|| Err(Error::Invalid(format!("tensor {name}: is not stored as abq"))))
    }

    /// Some rows of a matrix that is stored as `sparse24`, as they are stored (values in `fixed12` are decoded).
    ///
    /// # Errors
    /// As for [`Self::packed_rows`].
    pub fn sparse_rows(&self, name: &str, rows: Range<u64>) -> Result<encoding::sparse24::Packed<'static>> {
        let tensor = self.tensor(name)?;
        let packed = self.unit_of(tensor)?.reader(&tensor.unit)?.sparse_rows(rows);
        packed.unwrap_or_else(|| Err(Error::Invalid(format!("tensor {name}: is not stored as sparse24"))))
    }

    /// Some rows of a matrix that is stored as `lowrank`, as they are stored.
    ///
    /// # Errors
    /// As for [`Self::packed_rows`].
    pub fn lowrank_rows(&self, name: &str, rows: Range<u64>) -> Result<encoding::lowrank::Packed<'static>> {
        let tensor = self.tensor(name)?;
        let packed = self.unit_of(tensor)?.reader(&tensor.unit)?.lowrank_rows(rows);
        packed.unwrap_or_else(|| Err(Error::Invalid(format!("tensor {name}: is not stored as lowrank"))))
    }

    /// The codes of a matrix that another tool quantised; `None` for other tensors.
    ///
    /// # Errors
    /// No such tensor; components that do not fit.
    pub fn codes(&self, name: &str) -> Result<Option<&foreign::Codes>> {
        let tensor = self.tensor(name)?;
        Ok(self.unit_of(tensor)?.reader(&tensor.unit)?.codes())
    }

    /// Decodes bytes `offset .. offset + out.len()` of a tensor into the caller's buffer. The range
    /// must lie on whole elements.
    pub fn read(&self, name: &str, offset: u64, out: &mut [u8]) -> Result<()> {
        let tensor = self.tensor(name)?;
        if offset.checked_add(out.len() as u64).is_none_or(|end| end > tensor.bytes) {
            return Err(Error::Invalid(format!(
                "tensor {name}: bytes {offset} to {} of {} were asked for",
                offset.saturating_add(out.len() as u64),
                tensor.bytes
            )));
        }
        if tensor.zero {
            out.fill(0);
            return Ok(());
        }
        match &self.remake {
            Some(by) if tensor.made => {
                let stored = self.tied.get(name).map_or(name, String::as_str);
                by.remake(self, stored, offset, out)
            }
            _ => self.read_stored(name, offset, out),
        }
    }

    /// Decodes bytes of a tensor as its unit stores it, whatever an edit or a view makes of it.
    ///
    /// # Errors
    /// Those of [`Self::read`].
    pub fn read_stored(&self, name: &str, offset: u64, out: &mut [u8]) -> Result<()> {
        let tensor = self.tensor(name)?;
        if offset.checked_add(out.len() as u64).is_none_or(|end| end > tensor.bytes) {
            return Err(Error::Invalid(format!(
                "tensor {name}: more than its {} bytes were asked for",
                tensor.bytes
            )));
        }
        let unit = self.unit_of(tensor)?;
        match unit.as_plain() {
            // Its header says all there is to know: a reader for each of a million of them would take more than they do.
            Some(component) => component.read_at(offset, out),
            None => unit.reader(&tensor.unit)?.read(tensor.unit_offset + offset, out),
        }
    }

    /// Decodes rows (of the first dimension) of a tensor into the caller's buffer, which must have
    /// exactly their size.
    pub fn read_rows(&self, name: &str, rows: Range<u64>, out: &mut [u8]) -> Result<()> {
        let tensor = self.tensor(name)?;
        let count = tensor.shape.first().copied().unwrap_or(0);
        let row = tensor.bytes.checked_div(count).unwrap_or(0);
        let len = rows.end.checked_sub(rows.start).and_then(|n| n.checked_mul(row));
        if rows.end > count || len != Some(out.len() as u64) || row * count != tensor.bytes {
            return Err(Error::Invalid(format!(
                "tensor {name}: rows {rows:?} of {:?} ({row} bytes each) do not fit a buffer of {} bytes",
                tensor.shape,
                out.len()
            )));
        }
        self.read(name, rows.start * row, out)
    }

    /// Decodes columns of matrix `matrix` of a stack `[.., rows, columns]` of small floats that is stored the other way round, as rows of `out`:
    /// what is stored is read as it lies.
    ///
    /// # Errors
    /// No such tensor or columns; a tensor that is not stored so.
    pub fn read_columns(&self, name: &str, matrix: u64, columns: Range<u64>, out: &mut [u8]) -> Result<()> {
        let tensor = self.tensor(name)?;
        let other = || Error::Invalid(format!("tensor {name}: is not stored by its columns"));
        let (unit, of_matrix) = match (self.unit_of(tensor)?, tensor.shape.last()) {
            (unit, Some(across)) if tensor.is_stored() && columns.end <= *across => (unit, *across),
            _ => return Err(other()),
        };
        match unit.encoding() {
            Encoding::Scaled(scaled) if scaled.transposed => {}
            _ => return Err(other()),
        }
        let first = matrix.saturating_mul(of_matrix);
        let rows = first.saturating_add(columns.start)..first.saturating_add(columns.end);
        unit.reader(&tensor.unit)?.stored_rows(rows, out).unwrap_or_else(|| Err(other()))
    }

    /// What the small floats of a matrix are multiplied with ([`crate::encoding::scaled`]): block by block in rows of blocks, in single precision,
    /// a global scale among it.
    ///
    /// # Errors
    /// No such tensor; one that is not stored so; a global scale that is no number.
    pub fn scales(&self, name: &str) -> Result<Vec<f32>> {
        let tensor = self.tensor(name)?;
        let other = || Error::Invalid(format!("tensor {name}: is not stored as small floats with scales"));
        match self.unit_of(tensor)?.reader(&tensor.unit)?.scales() {
            Some(scales) if tensor.is_stored() => scales,
            _ => Err(other()),
        }
    }

    /// A whole tensor in memory.
    pub fn read_tensor(&self, name: &str) -> Result<Vec<u8>> {
        let mut out = vec![0; self.tensor(name)?.bytes as usize];
        self.read(name, 0, &mut out)?;
        Ok(out)
    }
}

fn manifest_units(
    path: &Path,
    manifest: &Manifest,
    stored: &mut BTreeMap<String, Component>,
    directory: &Directory,
) -> Result<BTreeMap<String, Unit>> {
    let mut units = BTreeMap::new();
    let base = manifest.base.as_ref().map(|base| Base::named(&base.name));
    let mut of_base: BTreeMap<&str, Digest> = BTreeMap::new();
    for (name, entry) in &manifest.units {
        let encoding = entry.encoding(path, name)?;
        let mut components = BTreeMap::new();
        for (component, link) in entry.components.iter() {
            let found = stored.remove(&link.tensor).ok_or_else(|| {
                let hint = directory.nearest(&link.tensor).map(|n| format!(" (the nearest is {n})"));
                Error::corrupt(
                    path,
                    Some(&link.tensor),
                    format!("is in no shard, or is used twice{}", hint.unwrap_or_default()),
                )
            })?;
            components.insert(component.to_owned(), found);
        }
        let mut parts = Vec::with_capacity(entry.tensors.len());
        for tensor in &entry.tensors {
            let Some(t) = manifest.tensors.get(tensor) else { continue };
            let bytes = t.dtype.byte_len(&t.shape).ok_or_else(|| {
                Error::corrupt(path, Some(tensor), format!("{:?} is no size of {}", t.shape, t.dtype.name()))
            })?;
            parts.push(Part { name: tensor.clone(), dtype: t.dtype, shape: t.shape.clone(), bytes });
        }
        let delta = if let Encoding::Delta(delta) = &encoding { Some(*delta) } else { None };
        let mut unit = Unit::new(encoding, parts, components);
        if let Some(delta) = delta {
            of_base.extend(entry.tensors.iter().map(|tensor| (tensor.as_str(), delta.base_blake3)));
            if let Some(base) = &base {
                unit = unit.on(base.clone());
            }
        }
        units.insert(name.clone(), unit);
    }
    let expected = match &manifest.base {
        Some(base) => Some(BaseEntry::new(base.name.clone(), of_base.into_iter())),
        None if of_base.is_empty() => None,
        None => {
            return Err(Error::corrupt(path, None, "has tensors that are stored by a base, and names none"));
        }
    };
    if expected != manifest.base {
        return Err(Error::corrupt(path, None, "base: its digest is not that of the tensors stored by it"));
    }
    Ok(units)
}

/// Gives tensors that are stored as another one the place of that one.
fn follow_same(
    root: &Path,
    units: &BTreeMap<String, Unit>,
    tensors: &mut BTreeMap<String, Tensor>,
) -> Result<()> {
    let all: Vec<_> = units
        .iter()
        .filter_map(|(name, unit)| match unit.encoding() {
            Encoding::Same { tensor } => Some((name, unit, tensor)),
            _ => None,
        })
        .collect();
    // By what they were before any was followed: a chain is refused in whatever order its links come.
    let same: BTreeSet<&str> =
        all.iter().flat_map(|(_, unit, _)| unit.parts()).map(|part| part.name.as_str()).collect();
    for (name, unit, target) in all {
        let corrupt = |what: &str| Error::corrupt(root, Some(name), format!("is stored as {target}, {what}"));
        let [part] = unit.parts() else { return Err(corrupt("but is not one tensor")) };
        if !unit.components().is_empty() {
            return Err(corrupt("but has components of its own"));
        }
        let found = tensors.get(target).filter(|_| !same.contains(target.as_str()));
        let found = found.ok_or_else(|| corrupt("which is no tensor that is stored itself"))?;
        if found.dtype != part.dtype || found.shape != part.shape {
            return Err(corrupt("which has another dtype or shape"));
        }
        let found = found.clone();
        tensors.insert(part.name.clone(), found);
    }
    Ok(())
}

/// Puts matrices in the place of the small floats and scales that store them. Gives the names of these.
fn take_scaled(
    root: &Path,
    config: Option<&Config>,
    units: &mut BTreeMap<String, Unit>,
) -> Result<Vec<String>> {
    if scaled::method(root, config).is_none() || !scaled::any(units.keys().map(String::as_str)) {
        return Ok(Vec::new());
    }
    let parts = units.iter().filter_map(|(name, unit)| Some((name.clone(), unit.only_part()?))).collect();
    let mut taken = Vec::new();
    for found in scaled::find(root, config, &parts)? {
        let mut within = Vec::new();
        for (component, name) in found.takes {
            within.extend(units.remove(&name).map(|unit| (component, unit)));
            taken.push(name);
        }
        for name in found.drops {
            units.remove(&name);
            taken.push(name);
        }
        let name = found.part.name.clone();
        let unit = Unit::scaled(Encoding::Scaled(found.scaled), found.part, within);
        if units.insert(name.clone(), unit).is_some() {
            return Err(Error::corrupt(root, Some(&name), "is stored both as small floats and as a tensor"));
        }
    }
    Ok(taken)
}

/// The tensors of a plain checkpoint, each a unit by itself.
fn plain_tensors(directory: &Directory) -> BTreeMap<String, Tensor> {
    // Sorted already, and no name occurs twice: the tree is built in one go.
    let tensors = directory.tensors().map(|(_, info)| {
        let tensor = Tensor {
            dtype: info.dtype,
            shape: info.shape.clone(),
            bytes: info.bytes,
            unit: info.name.clone(),
            unit_offset: 0,
            zero: false,
            made: false,
        };
        (info.name.clone(), tensor)
    });
    tensors.collect()
}

fn collect_tensors(root: &Path, units: &BTreeMap<String, Unit>) -> Result<BTreeMap<String, Tensor>> {
    let mut tensors = BTreeMap::new();
    let mut total = 0u64;
    for (unit_name, unit) in units {
        let mut offset = 0u64;
        for part in unit.parts() {
            let tensor = Tensor {
                dtype: part.dtype,
                shape: part.shape.clone(),
                bytes: part.bytes,
                unit: unit_name.clone(),
                unit_offset: offset,
                zero: false,
                made: false,
            };
            total = total.checked_add(part.bytes).filter(|total| *total <= crate::MAX_TOTAL_BYTES).ok_or_else(|| {
                let what = format!(
                    "is said to have {} bytes: all tensors together have more than 2^58, which nothing holds",
                    part.bytes
                );
                Error::corrupt(root, Some(&part.name), what)
            })?;
            offset += part.bytes;
            if tensors.insert(part.name.clone(), tensor).is_some() {
                return Err(Error::corrupt(root, Some(&part.name), "is stored twice"));
            }
        }
    }
    Ok(tensors)
}

/// A head that is not stored is the embedding, unless the configuration denies it.
fn tied_head(config: Option<&Config>, tensors: &BTreeMap<String, Tensor>) -> BTreeMap<String, String> {
    let Some(config) = config else { return BTreeMap::new() };
    let head = tensors.keys().any(|n| n == "lm_head.weight" || n.ends_with(".lm_head.weight"));
    let embedding = tensors.keys().find(|n| n.ends_with("embed_tokens.weight"));
    match embedding {
        Some(embedding) if !head && config.tie_word_embeddings() != Some(false) => {
            BTreeMap::from([("lm_head.weight".to_owned(), embedding.clone())])
        }
        _ => BTreeMap::new(),
    }
}
