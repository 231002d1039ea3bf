//! The manifest, `llmpress.json`: what every tensor was and how it is stored.
//!
//! ```text
//! tensors: name -> dtype, shape, unit, digest of its bytes
//! units:   name -> encoding, tensors in order, components -> stored tensor, digest
//! files:   every other file of the directory -> size, digest
//! ```
//!
//! Sorted, without a time stamp: two runs write the same bytes. The last field is the BLAKE3 of the
//! file itself with the 64 digits of that field as zeros.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::files::{read_small_file, write_atomic_with};
use crate::hashed::write_json;
use crate::transform::{TRANSFORMS, Transform};
use crate::{Dtype, Encoding, Error, Named, Result};

/// The manifest's file name. A directory is complete when it is there.
pub const MANIFEST_FILE: &str = "llmpress.json";
/// The version this crate writes.
pub const FORMAT_VERSION: (u32, u32) = (1, 5);
/// What a manifest may require of a reader, as far as this version knows.
pub const KNOWN_REQUIREMENTS: [&str; 1] = [TRANSFORMS];
/// The largest manifest that is read.
const MAX_MANIFEST_BYTES: u64 = 1 << 30;

/// Members of an encoding that are encodings themselves.
const NESTED_MEMBERS: [&str; 3] = ["values", "base", "sums"];

const DIGEST_FIELD: &str = "\"manifest_blake3\": \"";
/// What follows its digits.
const DIGEST_TAIL: &[u8] = b"\"\n}\n";

/// A BLAKE3 digest, 64 lower-case hexadecimal digits in JSON.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }
}

impl From<blake3::Hash> for Digest {
    fn from(hash: blake3::Hash) -> Self {
        Self(*hash.as_bytes())
    }
}

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl std::fmt::Debug for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

impl Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        let upper = text.bytes().any(|b| b.is_ascii_uppercase());
        let hash = blake3::Hash::from_hex(&text).ok().filter(|_| !upper);
        let hash = hash.ok_or_else(|| {
            serde::de::Error::custom(format!("{text:?} is not 64 lower-case hexadecimal digits"))
        })?;
        Ok(hash.into())
    }
}

/// The whole manifest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// `major.minor`; readers refuse a newer major.
    pub format_version: String,
    /// What a reader must know beyond the encodings to understand the tensors: a subset of
    /// [`KNOWN_REQUIREMENTS`]; readers refuse any other.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub requires: Vec<String>,
    /// The program that wrote the directory.
    pub producer: Producer,
    /// The checkpoint it was made from.
    pub source: Source,
    /// The checkpoint that tensors are stored by ([`crate::encoding::delta`]), where any are.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub base: Option<BaseEntry>,
    /// The recipe that ran, in canonical form.
    pub recipe: serde_json::Value,
    /// Logical tensors by name.
    pub tensors: BTreeMap<String, TensorEntry>,
    /// Units by name.
    pub units: BTreeMap<String, UnitEntry>,
    /// Logical tensors that are another one: name -> name of the stored tensor.
    pub tied: BTreeMap<String, String>,
    /// Tensors of the source that were left out: name -> why.
    pub dropped: BTreeMap<String, String>,
    /// Shards by file name.
    pub shards: BTreeMap<String, ShardEntry>,
    /// Every other file of the directory (but this one) by name.
    pub files: BTreeMap<String, FileEntry>,
    /// What was done to the weights beside storing them, in order: see [`Transform`].
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub transforms: Vec<serde_json::Value>,
    /// BLAKE3 of this file with these 64 digits as zeros.
    pub manifest_blake3: Digest,
}

/// The program that wrote a directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Producer {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// The revision it was built from, where known.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub revision: Option<String>,
}

/// The checkpoint that was converted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// The directory's name (not its path); that of the repository in a hub's cache.
    pub name: String,
    /// `huggingface`, `llmpress`, `dfloat11` or `gguf`.
    pub kind: String,
    /// Its shards by file name. Their headers' digests and those of the tensors cover every byte of a plain
    /// checkpoint.
    pub shards: BTreeMap<String, ShardEntry>,
    /// The other files that were read: index, configuration, copied files.
    pub files: BTreeMap<String, FileEntry>,
}

/// A checkpoint that tensors are stored by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseEntry {
    /// The directory's name (not its path); that of the repository in a hub's cache.
    pub name: String,
    /// BLAKE3 of a line for each tensor that is stored so, sorted by name: the digest of the base's tensor, two spaces, the name.
    pub blake3: Digest,
}

impl BaseEntry {
    /// Of the digests of a base's tensors by name.
    pub fn new<'a>(name: String, tensors: impl Iterator<Item = (&'a str, Digest)>) -> Self {
        let mut hasher = blake3::Hasher::new();
        tensors.for_each(|(tensor, digest)| {
            hasher.update(format!("{digest}  {tensor}\n").as_bytes());
        });
        Self { name, blake3: hasher.finalize().into() }
    }
}

/// Size and digest of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Size in bytes.
    pub bytes: u64,
    /// BLAKE3 of its bytes.
    pub blake3: Digest,
}

/// A shard: its components carry their own digests, this covers the rest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardEntry {
    /// Size in bytes.
    pub bytes: u64,
    /// BLAKE3 of everything before the data section: the length field and the header.
    pub header_blake3: Digest,
}

/// A logical tensor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorEntry {
    /// Its dtype.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<u64>,
    /// The unit that stores it.
    pub unit: String,
    /// BLAKE3 of its original bytes; of what it decodes to where its encoding is lossy.
    pub blake3: Digest,
}

/// A unit: one or more tensors stored together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UnitEntry {
    /// How it is stored.
    pub encoding: EncodingEntry,
    /// The names of its tensors, in the order they are joined.
    pub tensors: Vec<String>,
    /// Its components by their last name.
    pub components: Named<ComponentEntry>,
    /// Why this encoding stands in for the one that was asked for.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub fallback: Option<String>,
}

/// An encoding in a manifest: an object whose `name` is one of [`Encoding::NAMES`]. It may be one that this version does
/// not know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodingEntry(Box<str>);

impl EncodingEntry {
    /// The entry of an encoding.
    ///
    /// # Errors
    /// It cannot be written as JSON.
    pub fn of(encoding: &Encoding) -> Result<Self> {
        let value = serde_json::to_value(encoding).map_err(|e| Error::Invalid(format!("encoding: {e}")))?;
        Ok(value.into())
    }

    /// The object.
    pub fn value(&self) -> serde_json::Value {
        serde_json::from_str(&self.0).unwrap_or_default()
    }
}

/// As text an object takes a tenth of the memory.
impl From<serde_json::Value> for EncodingEntry {
    fn from(value: serde_json::Value) -> Self {
        Self(value.to_string().into())
    }
}

impl Serialize for EncodingEntry {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        self.value().serialize(s)
    }
}

impl<'de> Deserialize<'de> for EncodingEntry {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        serde_json::Value::deserialize(d).map(Self::from)
    }
}

/// A stored component.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ComponentEntry {
    /// The stored tensor's name.
    pub tensor: String,
    /// BLAKE3 of its bytes.
    pub blake3: Digest,
}

impl UnitEntry {
    /// The encoding, or an error that names one this version does not know.
    pub fn encoding(&self, path: &Path, unit: &str) -> Result<Encoding> {
        let value = self.encoding.value();
        if let Some(name) = unknown_encoding(&value) {
            return Err(Error::unsupported(
                path,
                Some(unit),
                format!(
                    "encoding {name:?} is not known to this version (it reads {}): a newer llmpress is needed",
                    Encoding::NAMES.join(", ")
                ),
            ));
        }
        Encoding::deserialize(&value)
            .map_err(|e| Error::corrupt(path, Some(unit), format!("encoding parameters: {e}")))
    }
}

/// The name of an encoding, or of one inside of it, that this version does not know.
fn unknown_encoding(encoding: &serde_json::Value) -> Option<&str> {
    let name = encoding.get("name").and_then(|n| n.as_str()).unwrap_or_default();
    if !Encoding::NAMES.contains(&name) {
        return Some(name);
    }
    // No encoding has more than two others inside, one inside of the other.
    let inside = |encoding| {
        NESTED_MEMBERS
            .iter()
            .filter_map(move |member| Some(encoding).and_then(|e: &serde_json::Value| e.get(member)))
    };
    inside(encoding)
        .chain(inside(encoding).flat_map(inside))
        .filter_map(|inner| inner.get("name")?.as_str())
        .find(|name| !Encoding::NAMES.contains(name))
}

impl Manifest {
    /// Reads and checks the manifest of a directory; `None` if it has none.
    pub fn read(root: &Path) -> Result<Option<Self>> {
        let path = root.join(MANIFEST_FILE);
        Self::read_named(&path)
    }

    /// Reads and checks a manifest under any name; `None` if there is no such file.
    pub fn read_named(path: &Path) -> Result<Option<Self>> {
        match path.symlink_metadata() {
            // Below a GGUF file there is none.
            Err(e)
                if [std::io::ErrorKind::NotFound, std::io::ErrorKind::NotADirectory].contains(&e.kind()) =>
            {
                Ok(None)
            }
            _ => Self::parse(path, &read_small_file(path, MAX_MANIFEST_BYTES)?).map(Some),
        }
    }

    /// Parses and checks a manifest's own bytes: version, digest, names that fit together.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let corrupt = |what: String| Error::corrupt(path, None, what);
        #[derive(Deserialize)]
        struct Version {
            format_version: String,
            #[serde(default)]
            requires: Vec<String>,
        }
        let version: Version = serde_json::from_slice(bytes)
            .map_err(|e| corrupt(format!("is not a manifest: {e}; convert the source again")))?;
        check_version(path, &version.format_version)?;
        check_requirements(path, &version.requires)?;
        let manifest: Self =
            serde_json::from_slice(bytes).map_err(|e| corrupt(format!("is not a valid manifest: {e}")))?;
        let at =
            digest_position(bytes).ok_or_else(|| corrupt("does not end in manifest_blake3".to_owned()))?;
        let actual = self_digest(bytes, at);
        if actual != manifest.manifest_blake3 {
            return Err(corrupt(format!(
                "was changed after it was written: its digest is {actual}, it says {}",
                manifest.manifest_blake3
            )));
        }
        manifest.check_links(path)?;
        let online = manifest.transforms(path)?.iter().any(Transform::online);
        if online && !manifest.requires.iter().any(|name| name == TRANSFORMS) {
            return Err(corrupt(format!(
                "has online transforms, which requires must name as {TRANSFORMS:?}"
            )));
        }
        Ok(manifest)
    }

    /// What was done to the weights beside storing them, in order. `path` is that of the manifest.
    ///
    /// # Errors
    /// A kind that this version does not know, by name; values that fit nothing.
    pub fn transforms(&self, path: &Path) -> Result<Vec<Transform>> {
        Transform::parse_all(path, &self.transforms)
    }

    /// The file's bytes, with `manifest_blake3` filled in.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        // The digest is of these bytes with its own digits as zeros, whatever they are now.
        let mut bytes =
            serde_json::to_vec_pretty(self).map_err(|e| Error::Invalid(format!("manifest: {e}")))?;
        bytes.push(b'\n');
        let at = digest_position(&bytes)
            .ok_or_else(|| Error::Invalid("manifest: manifest_blake3 is not last".to_owned()))?;
        let digest = self_digest(&bytes, at).to_string();
        bytes[at..at + 64].copy_from_slice(digest.as_bytes());
        Ok(bytes)
    }

    /// Writes the file without holding its text, with `manifest_blake3` filled in, here too.
    pub fn write(&mut self, path: &Path) -> Result<()> {
        // The digest is of these bytes with its own digits as zeros.
        self.manifest_blake3 = Digest([0; 32]);
        let this = &*self;
        let mut digest = self.manifest_blake3;
        write_atomic_with(path, |file| {
            let written = write_json(file, path, 0, |mut out| {
                serde_json::to_writer_pretty(&mut out, this)?;
                out.write_all(b"\n").map_err(serde_json::Error::io)
            })?;
            digest = written.digest;
            let tail = (64 + DIGEST_TAIL.len()) as u64;
            let at = written
                .bytes
                .checked_sub(tail)
                .ok_or_else(|| Error::Invalid("manifest: is empty".to_owned()))?;
            file.write_all_at(digest.to_string().as_bytes(), at).map_err(|e| Error::io(path, "write", e))
        })?;
        self.manifest_blake3 = digest;
        Ok(())
    }

    /// The files of the directory, the manifest itself apart.
    pub fn file_names(&self) -> impl Iterator<Item = &String> {
        self.shards.keys().chain(self.files.keys())
    }

    fn check_links(&self, path: &Path) -> Result<()> {
        // Nothing outside the directory is ever opened, or removed, because a manifest says so.
        if let Some(name) = self.file_names().find(|name| !crate::files::is_plain_name(name)) {
            return Err(Error::corrupt(
                path,
                None,
                format!("lists {name:?}, which is not a file of its directory"),
            ));
        }
        let corrupt = |tensor: &str, what: String| Err(Error::corrupt(path, Some(tensor), what));
        let mut listed = 0;
        for (unit, entry) in &self.units {
            let names: std::collections::BTreeSet<&String> = entry.tensors.iter().collect();
            if names.len() != entry.tensors.len() {
                return corrupt(unit, "lists a tensor twice".to_owned());
            }
            for name in &entry.tensors {
                if self.tensors.get(name).is_none_or(|t| t.unit != *unit) {
                    return corrupt(name, format!("is listed by unit {unit} but does not belong to it"));
                }
            }
            listed += names.len();
        }
        if listed != self.tensors.len() {
            return Err(Error::corrupt(path, None, "a tensor is not listed by its unit"));
        }
        let shards = self.shards.iter().map(|(name, s)| (name, Some(s.bytes)));
        let tensors = self.tensors.iter().map(|(name, t)| (name, t.dtype.byte_len(&t.shape)));
        check_sum(path, shards)?;
        check_sum(path, tensors)?;
        for (name, target) in &self.tied {
            if !self.tensors.contains_key(target) || self.tensors.contains_key(name) {
                return corrupt(name, format!("is tied to {target}, which does not fit the tensors"));
            }
        }
        Ok(())
    }
}

/// Refuses sizes that no disk holds together: whoever adds them up later need not fear 2^64.
fn check_sum<'a>(path: &Path, sizes: impl Iterator<Item = (&'a String, Option<u64>)>) -> Result<()> {
    let mut total = 0u64;
    for (name, bytes) in sizes {
        total = bytes
            .and_then(|n| total.checked_add(n))
            .filter(|n| *n <= crate::MAX_TOTAL_BYTES)
            .ok_or_else(|| {
                Error::corrupt(
                    path,
                    Some(name),
                    "is said to have a size that makes more than 2^58 bytes in all",
                )
            })?;
    }
    Ok(())
}

fn check_version(path: &Path, version: &str) -> Result<()> {
    let parsed = version
        .split_once('.')
        .and_then(|(major, minor)| Some((major.parse::<u32>().ok()?, minor.parse::<u32>().ok()?)));
    match parsed {
        Some((major, _)) if major > FORMAT_VERSION.0 => Err(Error::unsupported(
            path,
            None,
            format!(
                "is of format version {version}; this version reads up to {}.x: a newer llmpress is needed",
                FORMAT_VERSION.0
            ),
        )),
        Some((major, _)) if major >= 1 => Ok(()),
        _ => Err(Error::corrupt(path, None, format!("format_version {version:?} is not major.minor"))),
    }
}

/// A minor version may not hide what changes the meaning of tensors: it is required by name.
fn check_requirements(path: &Path, requires: &[String]) -> Result<()> {
    match requires.iter().find(|required| !KNOWN_REQUIREMENTS.contains(&required.as_str())) {
        None => Ok(()),
        Some(unknown) => Err(Error::unsupported(
            path,
            None,
            format!("requires {unknown:?}, which this version does not know: a newer llmpress is needed"),
        )),
    }
}

/// Where the 64 digits of the last field stand, if the file ends as it must.
fn digest_position(bytes: &[u8]) -> Option<usize> {
    let at = bytes.len().checked_sub(64 + DIGEST_TAIL.len())?;
    let field = at.checked_sub(DIGEST_FIELD.len())?;
    (&bytes[field..at] == DIGEST_FIELD.as_bytes() && bytes.ends_with(DIGEST_TAIL)).then_some(at)
}

fn self_digest(bytes: &[u8], at: usize) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&bytes[..at]);
    hasher.update(&[b'0'; 64]);
    hasher.update(&bytes[at + 64..]);
    hasher.finalize().into()
}
