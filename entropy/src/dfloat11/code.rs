//! The prefix code of a unit and its lookup tables.
//!
//! ```text
//! counts -> tree (official order) -> codes -> rows of 256 entries: exponent, or 256 - child row
//! ```

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::OnceLock;

use super::Histogram;
use super::pairs::Pairs;
use super::tables::Tables;
use super::word::{CodeWord, left_justified};
use crate::Error;

/// The longest code the format can hold.
const MAX_CODE_BITS: u32 = 32;
/// Entries from here on point to rows, so exponents must be below.
const FIRST_POINTER: usize = 240;
/// Rows besides row 0 that pointers can reach.
const MAX_CHILD_ROWS: usize = 256 - FIRST_POINTER;
/// The end symbol, as a symbol number above all exponents in storage; it sorts below them.
const END: u16 = 256;

/// Why the format cannot hold a unit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unrepresentable {
    /// There is no weight.
    #[error("DFloat11 cannot hold an empty unit")]
    Empty,
    /// An exponent that the tables would take for a pointer.
    #[error(
        "exponent {0} occurs, and DFloat11 can hold exponents below 240 only (huge values, infinities, NaN)"
    )]
    Exponent(u8),
    /// The first lookup row has nothing at byte 0: the official packer fails here.
    #[error("the first lookup table has no entry for byte 0, as happens with few distinct exponents")]
    NoFirstEntry,
    /// More rows than pointers.
    #[error("{0} lookup tables besides the first would be needed, and 16 can be addressed")]
    Rows(usize),
    /// A code would need a table between two others that no code ends in.
    #[error("a code skips a lookup table, which the tables cannot express")]
    MissingRow,
    /// Symbol numbers of 32 bits.
    #[error("{0} weights are more than the 2^32 - 1 a unit can number")]
    Elements(u64),
    /// The official decoder counts bytes in 31 bits.
    #[error("a stream of {0} bytes is longer than the 2^31 - 1 the official decoder can count")]
    StreamBytes(u64),
    /// The official decoder's shared memory.
    #[error("a block would hold {0} weights, more than the 23550 the official decoder has room for")]
    BlockSymbols(u64),
}

/// The prefix code of a unit.
#[derive(Clone)]
pub struct Code {
    words: Box<[CodeWord; 256]>,
    end: CodeWord,
    luts: Vec<u8>,
    lengths: Box<[u8; 256]>,
    pub(super) tables: Tables,
    pairs: OnceLock<Pairs>,
}

impl std::fmt::Debug for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Code").field("lengths", &self.lengths).finish_non_exhaustive()
    }
}

impl PartialEq for Code {
    fn eq(&self, other: &Self) -> bool {
        self.luts == other.luts
    }
}

/// A node of the tree under construction. The order is that of the official packer: count, then first
/// symbol, the end symbol below every exponent.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Node {
    count: u64,
    first: Option<u8>,
    symbols: Vec<(u16, u64, u32)>,
}

/// Codes in the order of the final node, as (symbol, bits, length).
fn tree(counts: &[u64; 256]) -> Vec<(u16, u64, u32)> {
    let mut heap = BinaryHeap::new();
    for (symbol, &count) in counts.iter().enumerate().filter(|(_, c)| **c > 0) {
        let node = Node { count, first: Some(symbol as u8), symbols: vec![(symbol as u16, 0, 0)] };
        heap.push(Reverse(node));
    }
    heap.push(Reverse(Node { count: 1, first: None, symbols: vec![(END, 0, 0)] }));
    while let Some(Reverse(mut a)) = heap.pop() {
        let Some(Reverse(b)) = heap.pop() else { return a.symbols };
        for (_, _, length) in &mut a.symbols {
            *length += 1;
        }
        // Codes above 64 bits only occur in trees that are built again with other counts.
        let longer =
            b.symbols.into_iter().map(|(s, bits, n)| (s, bits | 1u64.checked_shl(n).unwrap_or(0), n + 1));
        a.symbols.extend(longer);
        a.count = a.count.saturating_add(b.count);
        heap.push(Reverse(a));
    }
    Vec::new()
}

/// Codes of at most 32 bits: while one is longer, the counts of the k rarest exponents become 1, for
/// k = 2, 3, ... Of equal counts the lower exponent goes first (the official packer's choice there is
/// that of numpy's `argpartition` and not defined).
fn limited_tree(counts: &[u64; 256]) -> Vec<(u16, u64, u32)> {
    let mut rarest: Vec<usize> = (0..256).filter(|&s| counts[s] > 0).collect();
    rarest.sort_by_key(|&s| (counts[s], s));
    let mut codes = tree(counts);
    let mut k = 2;
    while codes.iter().any(|&(_, _, length)| length > MAX_CODE_BITS) && k <= rarest.len() {
        let mut flattened = *counts;
        for &symbol in &rarest[..k] {
            flattened[symbol] = 1;
        }
        codes = tree(&flattened);
        k += 1;
    }
    codes
}

impl Code {
    /// The code that the official packer gives a unit with these exponents.
    pub fn build(histogram: &Histogram) -> Result<Self, Unrepresentable> {
        if histogram.total() == 0 {
            return Err(Unrepresentable::Empty);
        }
        let counts = histogram.counts();
        if let Some(exponent) = (FIRST_POINTER..256).rev().find(|&e| counts[e] > 0) {
            return Err(Unrepresentable::Exponent(exponent as u8));
        }
        let codes = limited_tree(counts);
        let mut words = Box::new([CodeWord::default(); 256]);
        let mut end = CodeWord::default();
        let mut lengths = Box::new([0u8; 256]);
        let mut order = Vec::with_capacity(codes.len());
        for (symbol, bits, length) in codes {
            let word = CodeWord { bits: bits as u32, length };
            if symbol == END {
                end = word;
            } else {
                words[usize::from(symbol)] = word;
                lengths[usize::from(symbol)] = length as u8;
                order.push(symbol as u8);
            }
        }
        let luts = build_luts(&words, &order, &lengths)?;
        let tables = Tables::new(&words);
        Ok(Self { words, end, luts, lengths, tables, pairs: OnceLock::new() })
    }

    /// Reads the code from stored tables: rows of 256 entries, then a row of code lengths.
    pub fn from_luts(luts: &[u8]) -> Result<Self, Error> {
        let corrupt = |what: String| Error::corrupt("luts", what);
        if !luts.len().is_multiple_of(256) || luts.len() < 512 || luts.len() > 256 * (MAX_CHILD_ROWS + 2) {
            return Err(corrupt(format!("{} bytes are not 2 to 18 rows of 256", luts.len())));
        }
        let (rows, last) = luts.split_at(luts.len() - 256);
        let mut lengths = Box::new([0u8; 256]);
        lengths.copy_from_slice(last);
        if lengths[FIRST_POINTER..].iter().any(|&l| l > 0) {
            return Err(corrupt("gives an exponent from 240 on a code".into()));
        }
        let words = read_codes(rows, &lengths).map_err(corrupt)?;
        let tables = Tables::new(&words);
        // Decoding needs no end symbol, and its code cannot be told from unused ones.
        Ok(Self {
            words,
            end: CodeWord::default(),
            luts: luts.to_vec(),
            lengths,
            tables,
            pairs: OnceLock::new(),
        })
    }

    /// The tables as they are stored: rows of 256 entries, then the lengths.
    #[must_use]
    pub fn luts(&self) -> &[u8] {
        &self.luts
    }

    /// Bits of each exponent's code; 0 for exponents that do not occur.
    #[must_use]
    pub fn lengths(&self) -> &[u8; 256] {
        &self.lengths
    }

    /// Bits that the exponents of a histogram take.
    #[must_use]
    pub fn encoded_bits(&self, histogram: &Histogram) -> u64 {
        histogram.counts().iter().zip(self.lengths.iter()).map(|(&n, &l)| n * u64::from(l)).sum()
    }

    pub(super) fn words(&self) -> &[CodeWord; 256] {
        &self.words
    }

    /// The table for encoding, made when it is first needed.
    pub(super) fn pairs(&self) -> &Pairs {
        self.pairs.get_or_init(|| Pairs::new(&self.words))
    }

    pub(super) fn end(&self) -> CodeWord {
        self.end
    }
}

/// The first `bytes` whole bytes of a code.
fn prefix(word: CodeWord, bytes: u32) -> u32 {
    let kept = 8 * bytes;
    if kept == 0 { 0 } else { word.bits >> (word.length - kept) }
}

/// Whole bytes before the one that a code ends in.
fn depth(word: CodeWord) -> u32 {
    (word.length - 1) / 8
}

/// The official tables, quirks included: unwritten entries repeat the last written one, across rows.
fn build_luts(
    words: &[CodeWord; 256],
    order: &[u8],
    lengths: &[u8; 256],
) -> Result<Vec<u8>, Unrepresentable> {
    let word = |symbol: u8| words[usize::from(symbol)];
    // Row numbers: distinct prefixes (in bytes, value), shorter first.
    let mut rows: Vec<(u32, u32)> = vec![(0, 0)];
    for &symbol in order {
        let w = word(symbol);
        let key = (depth(w), prefix(w, depth(w)));
        if !rows.contains(&key) {
            rows.push(key);
        }
    }
    rows.sort_by_key(|&(bytes, _)| bytes);
    if rows.len() > MAX_CHILD_ROWS + 1 {
        return Err(Unrepresentable::Rows(rows.len() - 1));
    }
    let mut luts = Vec::with_capacity((rows.len() + 1) * 256);
    let mut fill: Option<u8> = None;
    for &(bytes, value) in &rows {
        let mut row: [Option<u8>; 256] = [None; 256];
        for &symbol in order {
            let w = word(symbol);
            if depth(w) < bytes || prefix(w, bytes) != value {
                continue;
            }
            let rest = w.length - 8 * bytes;
            if depth(w) == bytes {
                let tail = w.bits & ones(rest);
                row[(tail << (8 - rest)) as usize & 255] = Some(symbol);
            } else {
                let column = (w.bits >> (rest - 8)) & 255;
                let child = rows.iter().position(|&r| r == (bytes + 1, prefix(w, bytes + 1)));
                // A row exists only where a code ends in it: a code whose next prefix is nobody's own has no
                // way down. The official packer fails here too.
                let Some(child) = child else { return Err(Unrepresentable::MissingRow) };
                row[column as usize] = Some((256 - child) as u8);
            }
        }
        for entry in row {
            fill = entry.or(fill);
            luts.push(fill.ok_or(Unrepresentable::NoFirstEntry)?);
        }
    }
    luts.extend_from_slice(lengths);
    Ok(luts)
}

fn ones(bits: u32) -> u32 {
    if bits >= 32 { u32::MAX } else { (1 << bits) - 1 }
}

/// The codes behind stored rows. The first place of a value, row by row, is where it was written; later
/// ones may be repetitions.
fn read_codes(rows: &[u8], lengths: &[u8; 256]) -> Result<Box<[CodeWord; 256]>, String> {
    let count = rows.len() / 256;
    // Depth and prefix of each row, once a pointer to it was found.
    let mut row_prefix: Vec<Option<(u32, u32)>> = vec![None; count];
    row_prefix[0] = Some((0, 0));
    let mut words = Box::new([CodeWord::default(); 256]);
    for row in 0..count {
        let entries = &rows[row * 256..][..256];
        let (bytes, value) = row_prefix[row].ok_or_else(|| format!("nothing points to row {row}"))?;
        for (column, &entry) in entries.iter().enumerate() {
            if usize::from(entry) >= FIRST_POINTER {
                let child = 256 - usize::from(entry);
                if child >= count {
                    return Err(format!("row {row} points to row {child} of {count}"));
                }
                if row_prefix[child].is_none() {
                    if child <= row || bytes >= 3 {
                        return Err(format!("row {row} points to row {child}"));
                    }
                    row_prefix[child] = Some((bytes + 1, value << 8 | column as u32));
                }
                continue;
            }
            let length = u32::from(lengths[usize::from(entry)]);
            if length == 0 || length > MAX_CODE_BITS {
                return Err(format!("exponent {entry} has a code of {length} bits"));
            }
            if words[usize::from(entry)].length != 0 {
                continue;
            }
            if length <= 8 * bytes || length > 8 * (bytes + 1) {
                return Err(format!("exponent {entry} with a code of {length} bits stands in row {row}"));
            }
            let free = 8 * (bytes + 1) - length;
            let span = 1usize << free;
            if column % span != 0 || entries[column..column + span].iter().any(|&e| e != entry) {
                return Err(format!("exponent {entry} does not fill the {span} entries of its code"));
            }
            let bits = (u64::from(value) << 8 | column as u64) >> free;
            words[usize::from(entry)] = CodeWord { bits: bits as u32, length };
        }
    }
    if let Some(symbol) = (0..256).find(|&s| lengths[s] > 0 && words[s].length == 0) {
        return Err(format!("exponent {symbol} has a length but no entry"));
    }
    let mut sorted: Vec<CodeWord> = words.iter().copied().filter(|w| w.length > 0).collect();
    sorted.sort_by_key(|w| left_justified(*w));
    for pair in sorted.windows(2) {
        if left_justified(pair[0]) | ones(32 - pair[0].length) >= left_justified(pair[1]) {
            return Err("one code is the start of another".into());
        }
    }
    Ok(words)
}
