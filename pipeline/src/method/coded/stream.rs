//! What of a unit can go through the entropy coder: rows of bytes, wherever in the unit they lie.
//!
//! ```text
//! abq                      planes --> codes, code_lengths
//! sparse24 over abq        values.planes --> ..., positions --> position_codes, position_lengths
//! lowrank over sparse24    base.values.planes --> ..., base.positions --> ...
//! ```

use std::ops::Range;

use llmpress_entropy::planes::{CHUNK_ELEMENTS, DEFAULT_LEVEL, Encoder as Frames};
use llmpress_formats::encoding::abq::{self, Abq, coded};
use llmpress_formats::encoding::lowrank::{Base, BaseRows};
use llmpress_formats::encoding::sparse24::{self, Kept, positions};
use llmpress_formats::encoding::{ComponentSpec, Encoding, lowrank};

use crate::source::UnitSource;
use crate::work::Work;
use crate::{Error, Result};

/// Rows of bytes of a matrix.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stream {
    bytes: Bytes,
    place: Place,
    rows: u64,
    /// Columns that a row of these bytes stands for: of kept values half of the matrix's.
    cols: usize,
}

#[derive(Debug, Clone, Copy)]
enum Bytes {
    Codes(Abq),
    Positions,
}

/// Where the matrix is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Alone,
    Sparse,
    Base,
}

impl Stream {
    /// Those of a matrix that is stored so.
    pub(super) fn of(encoding: &Encoding, shape: &[u64]) -> Vec<Self> {
        let Some((rows, cols)) = abq::matrix(shape) else { return Vec::new() };
        let cols = cols as usize;
        let (sparse, place) = match encoding {
            Encoding::Abq(abq) => {
                return vec![Self { bytes: Bytes::Codes(*abq), place: Place::Alone, rows, cols }];
            }
            Encoding::Sparse24(sparse) => (sparse, Place::Sparse),
            Encoding::Lowrank(lowrank::Lowrank { base: Base::Sparse24(sparse), .. }) => (sparse, Place::Base),
            _ => return Vec::new(),
        };
        let codes = sparse.abq().map(|abq| Self { bytes: Bytes::Codes(*abq), place, rows, cols: cols / 2 });
        let positions = Self { bytes: Bytes::Positions, place, rows, cols };
        std::iter::once(positions).chain(codes).collect()
    }

    /// The component that it is stored as without a coder, and the two that it is with one.
    pub(super) fn names(&self) -> [&'static str; 3] {
        let names = match self.bytes {
            Bytes::Codes(_) => [abq::PLANES, abq::CODES, abq::CODE_LENGTHS],
            Bytes::Positions => [sparse24::POSITIONS, sparse24::POSITION_CODES, sparse24::POSITION_LENGTHS],
        };
        names.map(|name| self.named(name))
    }

    fn named(&self, name: &'static str) -> &'static str {
        let name = match self.bytes {
            Bytes::Codes(_) if self.place != Place::Alone => sparse24::within(name),
            _ => name,
        };
        if self.place == Place::Base { sparse24::in_base(name) } else { name }
    }

    /// Bytes that it takes without a coder.
    pub(super) fn plain_bytes(&self) -> u64 {
        let row = match self.bytes {
            Bytes::Codes(abq) => u64::from(abq.planes()) * self.cols.div_ceil(abq::WORD_COLUMNS) as u64 * 4,
            Bytes::Positions => positions::row_bytes(self.cols) as u64,
        };
        row.saturating_mul(self.rows)
    }

    /// The components that it takes with one, whose frames have `stored` bytes.
    pub(super) fn components(&self, stored: u64) -> [ComponentSpec; 2] {
        let specs = match self.bytes {
            Bytes::Codes(abq) => coded::components(&abq, self.rows, self.cols as u64, stored),
            Bytes::Positions => sparse24::coded_positions(self.rows, self.cols as u64, stored),
        };
        specs.map(|spec| ComponentSpec { name: self.named(spec.name), ..spec })
    }

    /// Gives `take` every frame in turn, with the length that is stored of it.
    pub(super) fn each_frame(
        &self,
        unit: &UnitSource<'_>,
        work: Work<'_>,
        take: &mut dyn FnMut(&[u8], u32) -> Result<()>,
    ) -> Result<()> {
        let step = (work.piece_bytes / self.cols.max(1)).max(1) as u64;
        let mut frames = Frames::new(DEFAULT_LEVEL);
        let (mut bytes, mut frame, mut lengths) = (Vec::new(), Vec::new(), Vec::new());
        let mut encode = |chunk: &[u8]| {
            frame.clear();
            lengths.clear();
            let done = frames.encode_chunk(1, false, chunk, &mut frame, &mut lengths);
            done.map_err(|e| Error::Invalid(format!("tensor {}: {e}", unit.first_name())))?;
            take(&frame, frame.len() as u32)
        };
        for first in (0..self.rows).step_by(step as usize) {
            self.append(unit, first..(first + step).min(self.rows), &mut bytes)?;
            let whole = bytes.len() / CHUNK_ELEMENTS * CHUNK_ELEMENTS;
            bytes[..whole].chunks_exact(CHUNK_ELEMENTS).try_for_each(&mut encode)?;
            bytes.drain(..whole);
        }
        if bytes.is_empty() { Ok(()) } else { encode(&bytes) }
    }

    /// Adds the bytes of some rows.
    fn append(&self, unit: &UnitSource<'_>, rows: Range<u64>, bytes: &mut Vec<u8>) -> Result<()> {
        let (checkpoint, name) = (unit.checkpoint(), unit.first_name());
        let abq = match self.bytes {
            Bytes::Codes(abq) => abq,
            Bytes::Positions => {
                bytes.extend_from_slice(self.sparse(unit, rows)?.positions());
                return Ok(());
            }
        };
        let mut codes = vec![0; (rows.end - rows.start) as usize * self.cols];
        let each = codes.chunks_exact_mut(self.cols.max(1)).enumerate();
        if self.place != Place::Alone {
            let packed = self.sparse(unit, rows)?;
            let Kept::Abq(values) = packed.values() else {
                return Err(Error::Invalid(format!("tensor {name}: its kept values are no codes")));
            };
            each.for_each(|(row, out)| values.codes(row, out));
        } else if let Some(foreign) = checkpoint.codes(name)? {
            foreign.read_codes(rows, &mut codes)?;
        } else {
            let packed = checkpoint.packed_rows(name, rows)?;
            each.for_each(|(row, out)| packed.codes(row, out));
        }
        let of_row = coded::row_bytes(&abq, self.cols);
        for row in codes.chunks_exact(self.cols.max(1)) {
            let at = bytes.len();
            bytes.resize(at + of_row, 0);
            coded::join(&abq, row, &mut bytes[at..]);
        }
        Ok(())
    }

    /// Some rows of what is two in four.
    fn sparse(&self, unit: &UnitSource<'_>, rows: Range<u64>) -> Result<sparse24::Packed<'static>> {
        let (checkpoint, name) = (unit.checkpoint(), unit.first_name());
        if self.place == Place::Sparse {
            return Ok(checkpoint.sparse_rows(name, rows)?);
        }
        match checkpoint.lowrank_rows(name, rows)?.into_base() {
            BaseRows::Sparse24(packed) => Ok(packed),
            BaseRows::Raw(_) => Err(Error::Invalid(format!("tensor {name}: its base is not two in four"))),
        }
    }
}
