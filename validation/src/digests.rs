//! Checks every digest of a converted directory.
//!
//! ```text
//! llmpress.json: itself | shards: header, each component | other files | decoded tensors
//! ```

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;

use llmpress_formats::{
    Base, Checkpoint, Component, Digest, Error, MANIFEST_FILE, Manifest, Result, ShardEntry, open_file,
};
use rayon::prelude::*;
use serde::Serialize;

use crate::PIECE;
use crate::claims::{Tell, check_claims, check_unknown_files};

/// What a check of all digests found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DigestReport {
    /// Files checked, the manifest included.
    pub files: usize,
    /// Stored components checked.
    pub components: usize,
    /// Tensors decoded and checked against their digest.
    pub decoded: usize,
    /// Bytes read from the directory.
    pub bytes: u64,
    /// What is wrong.
    pub faults: Vec<Fault>,
    /// Files that the manifest does not know.
    pub unknown_files: Vec<String>,
}

/// Something wrong, and where.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Fault {
    /// The file.
    pub file: String,
    /// The stored or logical tensor, if it lies within one.
    pub tensor: Option<String>,
    /// What is wrong.
    pub what: String,
}

/// Checks a converted directory against its manifest. With `decode`, every tensor is also decoded and
/// compared with the digest that the manifest has of it. Wrong bytes are reported, not returned as errors; only
/// a directory whose manifest is missing or itself damaged is an error. Decoding what is stored as its difference from another checkpoint
/// takes that one.
pub fn verify_digests(
    root: &Path,
    decode: bool,
    base: Option<&Base>,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<DigestReport> {
    let Some(manifest) = Manifest::read(root)? else {
        return Err(Error::Invalid(format!(
            "{}: has no {MANIFEST_FILE}, so there are no digests to check; compare with --against",
            root.display()
        )));
    };
    let faults = Mutex::new(Vec::new());
    let fault = |file: &str, tensor: Option<&str>, what: String| {
        if let Ok(mut faults) = faults.lock() {
            faults.push(Fault { file: file.to_owned(), tensor: tensor.map(str::to_owned), what });
        }
    };
    let mut report = DigestReport {
        files: manifest.files.len() + manifest.shards.len() + 1,
        components: 0,
        decoded: 0,
        bytes: 0,
        faults: Vec::new(),
        unknown_files: unknown_files(root, &manifest)?,
    };
    check_unknown_files(&mut report.unknown_files, &fault);
    // Files and headers first: opening the checkpoint relies on them, and its error might name another.
    for (name, entry) in &manifest.files {
        report.bytes = report.bytes.saturating_add(entry.bytes);
        if let Err(what) = check_file(&root.join(name), entry.bytes, entry.blake3) {
            fault(name, None, what);
        }
    }
    for (name, entry) in &manifest.shards {
        report.bytes = report.bytes.saturating_add(entry.bytes);
        if let Err(what) = check_header(&root.join(name), entry) {
            fault(name, None, what);
        }
    }
    let opened = Checkpoint::open(root);
    // A base that does not fit is no fault of the directory.
    let opened = match (opened, base) {
        (Ok(checkpoint), Some(base)) => Ok(checkpoint.with_base(base)?),
        (opened, _) => opened,
    };
    match opened {
        Ok(checkpoint) => {
            check_claims(&checkpoint, &manifest, decode, &fault);
            (report.components, report.decoded) =
                check_tensors(&checkpoint, &manifest, decode, progress, &fault);
        }
        // What keeps it from opening is one of the faults above, or this.
        Err(e) => fault(MANIFEST_FILE, None, format!("does not fit the directory: {e}")),
    }
    report.faults = faults.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    report.faults.sort();
    Ok(report)
}

/// Checks every component, and every decoded tensor if wanted; returns how many of each.
fn check_tensors(
    checkpoint: &Checkpoint,
    manifest: &Manifest,
    decode: bool,
    progress: &(dyn Fn(u64) + Sync),
    fault: Tell<'_>,
) -> (usize, usize) {
    let mut components: Vec<(&Component, Digest)> = Vec::new();
    for (name, unit) in checkpoint.units() {
        let Some(entry) = manifest.units.get(name) else { continue };
        for (last, component) in unit.components().iter() {
            if let Some(link) = entry.components.get(last) {
                components.push((component, link.blake3));
            }
        }
    }
    components.sort_by_key(|(c, _)| std::cmp::Reverse(c.bytes()));
    components.par_iter().with_max_len(1).for_each(|(component, expected)| {
        let file = file_name(component.path());
        match component_digest(component, progress) {
            Ok(digest) if digest == *expected => {}
            Ok(_) => fault(file, Some(component.name()), "its bytes were changed".into()),
            Err(e) => fault(file, Some(component.name()), e.to_string()),
        }
    });
    let mut decoded = 0;
    if decode {
        decoded = manifest.tensors.len();
        let mut tensors: Vec<_> = manifest.tensors.iter().collect();
        tensors.sort_by_key(|(name, _)| std::cmp::Reverse(checkpoint.tensors().get(*name).map(|t| t.bytes)));
        tensors.par_iter().with_max_len(1).for_each(|(name, entry)| {
            match decoded_digest(checkpoint, name, progress) {
                Ok(digest) if digest == entry.blake3 => {}
                Ok(_) => {
                    fault(MANIFEST_FILE, Some(name), "does not decode to the bytes that it stands for".into())
                }
                Err(e) => fault(MANIFEST_FILE, Some(name), e.to_string()),
            }
        });
    }
    (components.len(), decoded)
}

fn file_name(path: &Path) -> &str {
    path.file_name().and_then(|n| n.to_str()).unwrap_or_default()
}

fn check_file(path: &Path, bytes: u64, expected: Digest) -> Result<(), String> {
    let file = open(path)?;
    let actual = file.metadata().map_err(|e| e.to_string())?.len();
    if actual != bytes {
        return Err(format!("has {actual} bytes instead of {bytes}"));
    }
    let digest = range_digest(&file, bytes).map_err(|e| format!("cannot be read: {e}"))?;
    if digest == expected { Ok(()) } else { Err("its bytes were changed".into()) }
}

fn open(path: &Path) -> Result<File, String> {
    // A FIFO is no file: opening it would wait for ever.
    open_file(path).map_err(|e| match e {
        Error::Io { source, .. } => format!("cannot be opened: {source}: copy the directory again"),
        other => format!("cannot be opened: {other}"),
    })
}

fn range_digest(file: &File, bytes: u64) -> std::io::Result<Digest> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; PIECE.min(bytes as usize)];
    let mut at = 0;
    while at < bytes {
        let take = (bytes - at).min(buffer.len() as u64) as usize;
        file.read_exact_at(&mut buffer[..take], at)?;
        hasher.update(&buffer[..take]);
        at += take as u64;
    }
    Ok(hasher.finalize().into())
}

fn check_header(path: &Path, entry: &ShardEntry) -> Result<(), String> {
    let file = open(path)?;
    let actual = file.metadata().map_err(|e| e.to_string())?.len();
    if actual != entry.bytes {
        return Err(format!("has {actual} bytes instead of {}", entry.bytes));
    }
    let unreadable = |e: std::io::Error| format!("cannot be read: {e}");
    let mut length = [0; 8];
    file.read_exact_at(&mut length, 0).map_err(unreadable)?;
    let header = u64::from_le_bytes(length).checked_add(8).filter(|&end| end <= actual);
    match header.map(|end| range_digest(&file, end)).transpose().map_err(unreadable)? {
        Some(digest) if digest == entry.header_blake3 => Ok(()),
        _ => Err("its header was changed".into()),
    }
}

fn component_digest(component: &Component, progress: &(dyn Fn(u64) + Sync)) -> Result<Digest> {
    digest_of(component.bytes(), progress, |at, buffer| component.read_at(at, buffer))
}

fn decoded_digest(checkpoint: &Checkpoint, name: &str, progress: &(dyn Fn(u64) + Sync)) -> Result<Digest> {
    let bytes = checkpoint.tensor(name)?.bytes;
    digest_of(bytes, progress, |at, buffer| checkpoint.read(name, at, buffer))
}

fn digest_of(
    bytes: u64,
    progress: &(dyn Fn(u64) + Sync),
    mut read: impl FnMut(u64, &mut [u8]) -> Result<()>,
) -> Result<Digest> {
    let mut hasher = blake3::Hasher::new();
    // Words of 64 bits: aligned for every decoder.
    let mut buffer = vec![0u64; PIECE.min(bytes as usize).div_ceil(8)];
    let mut at = 0;
    while at < bytes {
        let take = (bytes - at).min(PIECE as u64) as usize;
        let piece = &mut bytemuck::cast_slice_mut::<u64, u8>(&mut buffer)[..take];
        read(at, piece)?;
        hasher.update_rayon(piece);
        progress(take as u64);
        at += take as u64;
    }
    Ok(hasher.finalize().into())
}

fn unknown_files(root: &Path, manifest: &Manifest) -> Result<Vec<String>> {
    let mut unknown = BTreeSet::new();
    let entries = std::fs::read_dir(root).map_err(|e| Error::io(root, "read", e))?;
    for entry in entries {
        let name = entry.map_err(|e| Error::io(root, "read", e))?.file_name().to_string_lossy().into_owned();
        if name != MANIFEST_FILE
            && !manifest.files.contains_key(&name)
            && !manifest.shards.contains_key(&name)
        {
            unknown.insert(name);
        }
    }
    Ok(unknown.into_iter().collect())
}
