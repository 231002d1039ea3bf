//! GGUF files: what llama.cpp runs, read as a checkpoint.
//!
//! ```text
//! GGUF | version | counts | metadata | names, shapes, types, places of tensors | pad | tensors
//!          metadata --> config.json, tokenizer.json, tokenizer_config.json     as if they lay beside it
//!          tensors  --> the names and rows that transformers has for the architecture
//! ```
//!
//! The format is that of the `gguf` package (version 2 and 3, little-endian). A file is seen as a directory: `FILE.gguf/config.json`
//! is made from its metadata when it is read.

mod family;
mod metadata;
mod names;
mod tokenizer;
mod write;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::checkpoint::{Checkpoint, Kind};
use crate::encoding::ggml::Ggml;
use crate::encoding::{self, Encoding, Part};
use crate::header::{Header, TensorInfo};
use crate::unit::Unit;
use crate::{CONFIG_FILE, Component, Config, Directory, Dtype, Error, Result, ShardFile};
use family::Family;
use metadata::{Metadata, Stored};
use names::Logical;

pub use metadata::DTYPES_KEY;
pub use write::{GgufLayout, GgufTensor, GgufValue};

/// What the names of such files end in.
const EXTENSION: &str = "gguf";
/// The tokenizer of `transformers`, as far as the metadata make one.
pub(crate) const TOKENIZER_FILE: &str = "tokenizer.json";
const TOKENIZER_CONFIG_FILE: &str = "tokenizer_config.json";
/// What metadata make.
const MADE: [&str; 3] = [CONFIG_FILE, TOKENIZER_FILE, TOKENIZER_CONFIG_FILE];
/// Most files that a model is split into.
const MAX_SPLITS: u64 = 1000;

impl Checkpoint {
    /// The files beside the tensors that a GGUF file makes of its metadata: names, and what [`crate::read_small_file`] reads below
    /// [`Checkpoint::root`]. None of other checkpoints.
    ///
    /// # Errors
    /// Metadata that do not make what they should.
    pub fn made_files(&self) -> Result<BTreeMap<&'static str, Vec<u8>>> {
        if self.kind() != Kind::Gguf {
            return Ok(BTreeMap::new());
        }
        let made = MADE.into_iter().map(|name| Ok((name, made(self.root(), name)?)));
        Ok(made
            .collect::<Result<Vec<_>>>()?
            .into_iter()
            .filter_map(|(name, made)| Some((name, made?)))
            .collect())
    }
}

/// A file, opened.
pub(crate) struct Opened {
    pub(crate) directory: Directory,
    pub(crate) config: Config,
    pub(crate) units: BTreeMap<String, Unit>,
    /// Whether any of its tensors is stored as codes.
    pub(crate) quantised: bool,
}

/// Whether a path is such a file, by its name and its first bytes.
pub(crate) fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == EXTENSION) && path.is_file()
}

/// A file as it would lie beside the tensors, if the metadata make it; no answer for a path that is not in a GGUF file.
pub(crate) fn within(path: &Path) -> Option<Result<Option<Vec<u8>>>> {
    let (file, name) = (path.parent()?, path.file_name()?.to_str()?);
    is_gguf(file).then(|| made(file, name))
}

fn made(file: &Path, name: &str) -> Result<Option<Vec<u8>>> {
    if !MADE.contains(&name) {
        return Ok(None);
    }
    let shards = shards(file)?;
    let Some((_, metadata)) = shards.first() else { return Ok(None) };
    Ok(match name {
        CONFIG_FILE => Some(config(file, &shards)?.0.into_bytes()),
        TOKENIZER_FILE => tokenizer::tokenizer(file, metadata)?,
        _ => tokenizer::settings(metadata),
    })
}

/// Opens a file, and the others that a model is split into.
pub(crate) fn open(path: &Path) -> Result<Opened> {
    let shards = shards(path)?;
    let (text, family) = config(path, &shards)?;
    let config = Config::parse(&path.join(CONFIG_FILE), text)?;
    let mut units = BTreeMap::new();
    let mut quantised = false;
    for (shard, metadata) in &shards {
        for stored in &metadata.tensors {
            for logical in family.logical(shard.path(), stored)? {
                let (name, unit) = unit(shard, stored, logical)?;
                quantised |= matches!(unit.encoding(), Encoding::Ggml(ggml) if ggml.blocks.is_quantised());
                if units.insert(name.clone(), unit).is_some() {
                    return Err(Error::corrupt(
                        shard.path(),
                        Some(&stored.name),
                        format!("is {name}, which is there twice"),
                    ));
                }
            }
        }
    }
    let shards = shards.into_iter().map(|(shard, _)| shard).collect();
    let directory = Directory::of_shards(path, shards)?;
    Ok(Opened { directory, config, units, quantised })
}

/// The configuration, and the family that it is of.
fn config(path: &Path, shards: &[(ShardFile, Metadata)]) -> Result<(String, Family)> {
    let Some((_, metadata)) = shards.first() else {
        return Err(Error::corrupt(path, None, "holds nothing"));
    };
    let family = Family::of(path, metadata)?;
    let mut floats = BTreeMap::new();
    for (shard, metadata) in shards {
        for stored in metadata.tensors.iter().filter(|stored| names::is_factors(&stored.name)) {
            floats.insert(stored.name.clone(), factors(shard, stored)?);
        }
    }
    let has = |name: &str| shards.iter().any(|(_, m)| m.tensors.iter().any(|stored| stored.name == name));
    let text = family.config(path, metadata, &floats, &has)?;
    Ok((text, family))
}

/// A small tensor of floats that belongs to the configuration.
fn factors(shard: &ShardFile, stored: &Stored) -> Result<Vec<f32>> {
    let wrong = || {
        let what = "is no list of at most 4096 F32, which factors of a rotary embedding are";
        Error::corrupt(shard.path(), Some(&stored.name), what)
    };
    let info = shard.header().get(&stored.name).ok_or_else(wrong)?;
    if info.dtype != Dtype::F32 || info.bytes > 4 * 4096 {
        return Err(wrong());
    }
    let bytes = shard.component(info).read_all(4 * 4096)?;
    Ok(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
}

/// All files of a model with their metadata, the one that says what it is first.
fn shards(path: &Path) -> Result<Vec<(ShardFile, Metadata)>> {
    let first = read(path)?;
    let count = first.1.number("split.count").unwrap_or(1);
    if count <= 1 {
        return Ok(vec![first]);
    }
    let number = first.1.number("split.no").unwrap_or(0);
    let corrupt = |what: String| Error::corrupt(path, None, what);
    if count > MAX_SPLITS || number >= count {
        return Err(corrupt(format!("says that it is part {number} of {count} of a model")));
    }
    let suffix = format!("-{:05}-of-{count:05}.gguf", number + 1);
    let stem = path.file_name().and_then(|name| name.to_str()?.strip_suffix(&suffix)).ok_or_else(|| {
        corrupt(format!(
            "is a part of a model, and its name does not end in {suffix}: give it its own name again"
        ))
    })?;
    let name = |number: u64| -> PathBuf {
        path.with_file_name(format!("{stem}-{:05}-of-{count:05}.gguf", number + 1))
    };
    let mut all = Vec::new();
    for other in 0..count {
        let (shard, metadata) = read(&name(other))?;
        if metadata.number("split.no").unwrap_or(0) != other || metadata.number("split.count") != Some(count)
        {
            return Err(Error::corrupt(
                shard.path(),
                None,
                format!("is not part {} of {count}, as its name says", other + 1),
            ));
        }
        all.push((shard, metadata));
    }
    Ok(all)
}

/// Reads what a file says before its tensors.
fn read(path: &Path) -> Result<(ShardFile, Metadata)> {
    let mut metadata = None;
    let shard = ShardFile::open_as(path, |path, file| {
        let read = Metadata::read(path, file)?;
        let tensors = read.tensors.iter().map(|stored| {
            Arc::new(TensorInfo {
                name: stored.name.clone(),
                dtype: stored.dtype(),
                shape: stored.stored_shape(),
                offset: stored.offset,
                bytes: stored.bytes,
            })
        });
        let header = Header::of_tensors(path, tensors.collect(), read.data_start)?;
        let overlap = header.tensors().windows(2).find(|w| w[0].offset + w[0].bytes > w[1].offset);
        if let Some([first, second]) = overlap {
            return Err(Error::corrupt(path, Some(&second.name), format!("overlaps {}", first.name)));
        }
        metadata = Some(read);
        Ok(header)
    })?;
    match metadata {
        Some(metadata) => Ok((shard, metadata)),
        None => Err(Error::corrupt(path, None, "has no metadata")),
    }
}

/// A tensor of the checkpoint, stored as all or some rows of one of the file.
fn unit(shard: &ShardFile, stored: &Stored, logical: Logical) -> Result<(String, Unit)> {
    let Logical { name, shape, heads, offset_by_one, part } = logical;
    let corrupt = |what: String| Error::corrupt(shard.path(), Some(&stored.name), what);
    let info = shard.header().get(&stored.name).ok_or_else(|| corrupt("is nowhere".to_owned()))?;
    let blocks = stored.blocks;
    let dtype = stored.decoded;
    let bytes = dtype.byte_len(&shape).filter(|bytes| *bytes <= crate::MAX_TOTAL_BYTES);
    let bytes = bytes.ok_or_else(|| corrupt(format!("would be {shape:?}, which is no size that is read")))?;
    let (number, count) = part.unwrap_or((0, 1));
    let of_part = info.bytes / count.max(1);
    let plain = dtype == blocks.decoded() && !blocks.is_quantised() && heads.is_none() && !offset_by_one;
    let slice = TensorInfo {
        name: stored.name.clone(),
        dtype: if plain { dtype } else { Dtype::U8 },
        shape: if plain { shape.clone() } else { vec![of_part] },
        offset: info.offset + number * of_part,
        bytes: of_part,
    };
    let data: Component = shard.component(&Arc::new(slice));
    let components = BTreeMap::from([(encoding::raw::DATA.to_owned(), data)]);
    let encoding = match plain {
        true => Encoding::Raw,
        false => Encoding::Ggml(Ggml { blocks, heads, offset_by_one }),
    };
    let part = Part { name: name.clone(), dtype, shape, bytes };
    Ok((name, Unit::new(encoding, vec![part], components)))
}
