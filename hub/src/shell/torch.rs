//! What tells the tensors of a `pytorch_model.bin`, a zip file whose directory stands at its end.
//!
//! ```text
//! beginning | ... header of an entry | (a hole, as long as its storage) | header of an entry | ... | directory | end
//! ```

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rawzip::{FileReader, RECOMMENDED_BUFFER_SIZE, ZipArchive};

use super::{BEGINNING, part};
use crate::at_once::at_once;
use crate::client::Client;
use crate::listing::Remote;
use crate::{Error, Result};

/// The end of a zip file: its last record with the longest comment, and where torch's directories have their place, too.
const END: u64 = 128 << 10;
/// The largest directory, and the largest entry that is no storage: a pickle of a hundred thousand tensors takes some 15 MB.
const LARGEST: u64 = 64 << 20;
/// What a header takes beside its name: torch fills it up until its storage begins at a multiple of 64.
const HEADER: u64 = 1 << 10;
/// Ranges with less than this between them are asked for as one.
const NEAR: u64 = 64 << 10;
/// As long as these become so: each is in memory for a moment.
const MOST: u64 = 8 << 20;

/// Asks for all that is read of a file but its storages, and writes it where it stands. What is no zip file is left to whoever opens it.
pub(super) fn fill(client: &Client, file: &Remote, out: &File, path: &Path) -> Result<()> {
    out.set_len(file.bytes).map_err(Error::io(path, "lengthen"))?;
    let fetch = |range: &Range<u64>| -> Result<()> {
        let bytes = part(client, file, range.start, range.end)?;
        out.write_all_at(&bytes, range.start).map_err(Error::io(path, "write"))
    };
    let ends = [
        0..BEGINNING.min(file.bytes),
        file.bytes.saturating_sub(END).max(BEGINNING.min(file.bytes))..file.bytes,
    ];
    at_once(&ends, fetch)?;
    let Some(directory) = directory(out, file.bytes).map_err(Error::io(path, "read"))? else { return Ok(()) };
    at_once(&missing(vec![directory], &ends), fetch)?;
    let Some(wanted) = entries(out, file.bytes).map_err(Error::io(path, "read"))? else { return Ok(()) };
    at_once(&missing(wanted, &ends), fetch)
}

fn open(out: &File) -> std::io::Result<Option<ZipArchive<FileReader>>> {
    let mut buffer = vec![0; RECOMMENDED_BUFFER_SIZE];
    Ok(ZipArchive::from_file(out.try_clone()?, &mut buffer).ok())
}

/// Where the directory lies, if it has a size that may be.
fn directory(out: &File, bytes: u64) -> std::io::Result<Option<Range<u64>>> {
    let range = open(out)?.map(|archive| archive.directory_offset()..bytes);
    Ok(range.filter(|range| range.start < range.end && range.end - range.start <= LARGEST))
}

/// The headers of all storages and everything else whole.
fn entries(out: &File, bytes: u64) -> std::io::Result<Option<Vec<Range<u64>>>> {
    let Some(archive) = open(out)? else { return Ok(None) };
    let mut buffer = vec![0; RECOMMENDED_BUFFER_SIZE];
    let mut records = archive.entries(&mut buffer);
    let (mut wanted, mut contents) = (Vec::new(), 0u64);
    while let Ok(record) = records.next_entry() {
        let Some(record) = record else { return Ok(Some(wanted)) };
        let name = record.file_path().as_bytes().to_vec();
        let storage =
            name.windows(6).any(|part| part == b"/data/") || record.compressed_size_hint() > LARGEST;
        let content = if storage { 0 } else { record.compressed_size_hint() };
        contents = contents.saturating_add(content);
        if contents > LARGEST {
            // No file of torch's has so much beside its storages.
            return Ok(None);
        }
        let start = record.local_header_offset().min(bytes);
        let end = start.saturating_add(HEADER + name.len() as u64 + content).min(bytes);
        wanted.push(start..end);
    }
    Ok(None)
}

/// What of the ranges is not there yet, near ones together.
fn missing(mut wanted: Vec<Range<u64>>, there: &[Range<u64>; 2]) -> Vec<Range<u64>> {
    let [beginning, end] = there;
    wanted.sort_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in wanted {
        let range = range.start.max(beginning.end)..range.end.min(end.start);
        match joined.last_mut() {
            _ if range.is_empty() => {}
            Some(last)
                if range.start <= last.end.saturating_add(NEAR)
                    && range.end.saturating_sub(last.start) <= MOST =>
            {
                last.end = last.end.max(range.end);
            }
            _ => joined.push(range),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_ranges_are_asked_for_as_one_that_is_never_long() {
        let ends = [0..1000, 90 << 20..91 << 20];
        let small = missing(vec![5000..6000, 900..1100, 2000..3000], &ends);
        assert!(small.len() == 1 && small.first() == Some(&(1000..6000)), "{small:?}");
        // A header every 50 KB, up to the end: all of them, in pieces.
        let many = (0..2000u64).map(|i| 50_000 * i..50_000 * i + 1000).collect();
        let found = missing(many, &ends);
        assert!(found.len() > 5 && found.iter().all(|range| range.end - range.start <= MOST));
        assert!(found.windows(2).all(|pair| pair[0].end <= pair[1].start));
    }
}
