//! Matrices whose codes are multiplied with activations in BF16.

use super::super::{Argument, Buffer, Gpu, Result, size32};
use super::layout::{HALF_COLS, TILE_COLS, TILE_ROWS, by_strip, tile_bytes, tiles};
use super::stored::{Stored, Zero, check, check_stack};

/// A matrix, or several one below the other. It takes the bits of the codes, and four bytes a scale and an offset.
#[derive(Debug)]
pub struct Matrix {
    rows: usize,
    cols: usize,
    planes: usize,
    centre: u32,
    groups: usize,
    /// Halves of tiles, of 32 columns, of a group.
    length: u32,
    codes: Buffer,
    /// `F32 [strips][groups][16]`.
    scale: Buffer,
    /// What belongs to the centre, where that is not always 0.
    offset: Option<Buffer>,
}

/// What is added to `scale (code - centre)`.
pub(super) fn offset_of(stored: &Stored<'_>, at: usize) -> f32 {
    let centre = f32::from(1u8 << (stored.bits - 1));
    match stored.zero {
        Zero::Symmetric => 0.0,
        Zero::Integer(zero) => stored.scale.get(at) * (centre - f32::from(zero[at])),
        Zero::Real(offset) => stored.scale.get(at) * centre + offset.get(at),
    }
}

impl Matrix {
    /// Copies a matrix to the device.
    ///
    /// # Errors
    /// [`super::super::Error::Invalid`] where its components do not belong together; not so much memory.
    pub fn upload(gpu: &Gpu, stored: &Stored<'_>) -> Result<Self> {
        Self::stack(gpu, std::slice::from_ref(stored))
    }

    /// Copies matrices of the same columns, widths and groups to the device, one below the other: one matrix to every kernel.
    ///
    /// # Errors
    /// [`super::super::Error::Invalid`] where components do not belong together, or a matrix but the last ends inside a strip of 16
    /// rows; not so much memory.
    pub fn stack(gpu: &Gpu, parts: &[Stored<'_>]) -> Result<Self> {
        let rows = check_stack(parts)?;
        parts.iter().try_for_each(|part| check(part).map(|_| ()))?;
        let first = &parts[0];
        let (cols, planes) = (first.cols, usize::from(first.planes));
        let across = cols.div_ceil(TILE_COLS);
        size32("tiles of an abq matrix", rows.div_ceil(TILE_ROWS).saturating_mul(across))?;
        let codes = gpu.allocate(rows.div_ceil(TILE_ROWS) * across * tile_bytes(planes))?;
        let (mut scale, mut offset) = (Vec::new(), Vec::new());
        let (mut at, mut groups) = (0, 1);
        for part in parts {
            groups = check(part)?;
            let bytes = tiles(part);
            codes.slice(at..at + bytes.len())?.write(&bytes)?;
            at += bytes.len();
            scale.extend(by_strip(part.rows, groups, |row, group| part.scale.get(row * groups + group)));
            offset.extend(by_strip(part.rows, groups, |row, group| offset_of(part, row * groups + group)));
        }
        let centred = offset.iter().all(|offset| *offset == 0.0);
        Ok(Self {
            rows,
            cols,
            planes,
            centre: 1 << (first.bits - 1),
            groups,
            length: match first.group_size {
                Some(size) => size32("columns of a group", size / HALF_COLS)?,
                None => u32::MAX,
            },
            codes,
            scale: gpu.upload(&scale)?,
            offset: if centred { None } else { Some(gpu.upload(&offset)?) },
        })
    }

    /// Another one with the same weights.
    ///
    /// # Errors
    /// Not so much memory.
    pub fn duplicate(&self, gpu: &Gpu) -> Result<Self> {
        Ok(Self {
            codes: copy(gpu, &self.codes)?,
            scale: copy(gpu, &self.scale)?,
            offset: self.offset.as_ref().map(|offset| copy(gpu, offset)).transpose()?,
            ..*self
        })
    }

    /// Output features.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bits of a code, 1 to 8.
    #[must_use]
    pub fn planes(&self) -> usize {
        self.planes
    }

    /// Bytes in device memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.codes.bytes() + self.scale.bytes() + self.offset.as_ref().map_or(0, Buffer::bytes)
    }

    /// Whether products add up x as well.
    pub(super) fn has_offsets(&self) -> bool {
        self.offset.is_some()
    }

    /// 32 columns each.
    pub(super) fn group_halves(&self) -> u32 {
        self.length
    }

    /// -(128 + centre) as two BF16 (kernels/cuda/abq.cuh).
    fn less_centre(&self) -> u32 {
        let word = u32::from(half::bf16::from_f32(-128.0 - self.centre as f32).to_bits());
        word | word << 16
    }

    /// From a strip of 16 rows on, the codes and what makes them integers.
    pub(super) fn codes_from(&self, strip: usize) -> [Argument; 2] {
        let bytes = strip * self.cols.div_ceil(TILE_COLS) * tile_bytes(self.planes);
        [from(&self.codes, bytes), Argument::U32(self.less_centre())]
    }

    /// From a strip of 16 rows on, the groups.
    pub(super) fn groups_from(&self, strip: usize) -> Result<[Argument; 4]> {
        let bytes = 4 * strip * self.groups * TILE_ROWS;
        Ok([
            from(&self.scale, bytes),
            self.offset.as_ref().map_or(Argument::Pointer(0), |offset| from(offset, bytes)),
            Argument::U32(size32("groups", self.groups)?),
            Argument::U32(self.length),
        ])
    }
}

/// Another buffer with the same bytes.
pub(super) fn copy(gpu: &Gpu, buffer: &Buffer) -> Result<Buffer> {
    let other = gpu.allocate(buffer.bytes())?;
    buffer.view().copy_to(other.view())?;
    Ok(other)
}

/// The address so many bytes into a buffer.
pub(super) fn from(buffer: &Buffer, bytes: usize) -> Argument {
    match buffer.view().pointer() {
        Argument::Pointer(address) => Argument::Pointer(address + bytes as u64),
        other => other,
    }
}
