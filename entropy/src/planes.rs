//! planes: any elements, byte plane by byte plane, through zstd.
//!
//! ```text
//! elements   e0 e1 e2 ...      of 1, 2, 4 or 8 bytes, floats rotated left by one bit first
//! planes     e0[0] e1[0] e2[0] ... | e0[1] e1[1] e2[1] ... | ...      least significant byte first
//! data       each plane of a chunk of 2^18 elements: a zstd frame, or as is if no frame is smaller
//! ```
//!
//! The rotation moves the sign below the mantissa, so that the last plane of a float holds exponent bits
//! only (F32, BF16) or exponent bits and the mantissa's first (F16, F64).
//!
//! An exponent plane is skewed bytes in random order. zstd's usual match search does harm there: chance
//! matches of four to eight bytes cost more than the Huffman-coded literals that they replace, and the search
//! takes most of the time. So the first attempt is always a search that finds runs and near repetitions
//! only (matches of 7 bytes and up in a table of 64 entries). It makes smaller planes of trained weights than
//! zstd's level 19. Levels above 1 also try zstd's own parameters and keep what is smaller, which pays
//! where elements repeat over a distance.

mod transpose;

use zstd::zstd_safe::{self, CCtx, CParameter, DCtx};

use crate::Error;
#[doc(hidden)]
pub use transpose::{join, join_reference, split, split_reference};

/// Elements of a chunk; only a tensor's last chunk has fewer.
pub const CHUNK_ELEMENTS: usize = 1 << 18;

/// Only the search for near repetitions. On trained weights higher levels gain nothing and cost several
/// times the time.
pub const DEFAULT_LEVEL: i32 = 1;

/// The widths of elements, in bytes.
const WIDTHS: [usize; 4] = [1, 2, 4, 8];

/// Encodes chunks. Holds memory that is used again from chunk to chunk.
pub struct Encoder {
    near: CCtx<'static>,
    /// The context for zstd's own search and its level.
    far: Option<(CCtx<'static>, i32)>,
    planes: Vec<u8>,
    frame: Vec<u8>,
    other_frame: Vec<u8>,
}

impl Encoder {
    /// An encoder of zstd's `level`, which is brought into 1..=22.
    #[must_use]
    pub fn new(level: i32) -> Self {
        let level = level.clamp(1, zstd_safe::max_c_level());
        Self {
            near: CCtx::create(),
            far: (level > 1).then(|| (CCtx::create(), level)),
            planes: Vec::new(),
            frame: Vec::new(),
            other_frame: Vec::new(),
        }
    }

    /// Encodes a chunk of elements of `width` bytes, rotated left by one bit first if `rotate`. Appends the
    /// planes to `data` and `width` entries to `lengths`.
    ///
    /// # Errors
    /// [`Error::Invalid`] where `width` is not 1, 2, 4 or 8 or `bytes` is no whole number of elements or more
    /// than [`CHUNK_ELEMENTS`].
    pub fn encode_chunk(
        &mut self,
        width: usize,
        rotate: bool,
        bytes: &[u8],
        data: &mut Vec<u8>,
        lengths: &mut Vec<u32>,
    ) -> Result<(), Error> {
        let elements = elements(width, bytes.len())?;
        // Written in full by the split: what an earlier chunk left need not be cleared.
        self.planes.resize(bytes.len(), 0);
        split(width, rotate, bytes, &mut self.planes);
        for plane in 0..width {
            let plane = &self.planes[plane * elements..][..elements];
            self.near.set_parameter(CParameter::CompressionLevel(1)).map_err(refused)?;
            self.near.set_parameter(CParameter::MinMatch(7)).map_err(refused)?;
            self.near.set_parameter(CParameter::HashLog(6)).map_err(refused)?;
            compress(&mut self.near, plane, &mut self.frame)?;
            if let Some((context, level)) = &mut self.far {
                context.set_parameter(CParameter::CompressionLevel(*level)).map_err(refused)?;
                compress(context, plane, &mut self.other_frame)?;
                if self.other_frame.len() < self.frame.len() {
                    std::mem::swap(&mut self.frame, &mut self.other_frame);
                }
            }
            let stored = if self.frame.len() < plane.len() { &self.frame } else { plane };
            data.extend_from_slice(stored);
            // At most CHUNK_ELEMENTS.
            lengths.push(stored.len() as u32);
        }
        Ok(())
    }
}

/// Makes `frame` the zstd frame of `plane`.
pub(crate) fn compress(context: &mut CCtx<'_>, plane: &[u8], frame: &mut Vec<u8>) -> Result<(), Error> {
    frame.clear();
    frame.reserve(zstd_safe::compress_bound(plane.len()));
    context.compress2(frame, plane).map_err(refused)?;
    Ok(())
}

/// zstd has no reason to refuse a plane or a level in its range; if it does, the caller may store the bytes.
pub(crate) fn refused(code: zstd_safe::ErrorCode) -> Error {
    Error::Invalid(format!("zstd: {}", zstd_safe::get_error_name(code)))
}

/// Decodes chunks. Holds memory that is used again from chunk to chunk, never more than a chunk's size beside
/// zstd's fixed tables.
pub struct Decoder {
    context: DCtx<'static>,
    planes: Vec<u8>,
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new()
    }
}

impl Decoder {
    /// A decoder.
    #[must_use]
    pub fn new() -> Self {
        Self { context: DCtx::create(), planes: Vec::new() }
    }

    /// Decodes a chunk: `lengths` are its `width` entries, `data` exactly their bytes, and `out` as long as
    /// the chunk's elements.
    ///
    /// On an error the content of `out` is unspecified.
    ///
    /// # Errors
    /// [`Error::Corrupt`] where the data break the format; [`Error::Invalid`] where `width` is not 1, 2, 4 or
    /// 8, `lengths` has another number of entries, or `out` is no whole number of elements or more than
    /// [`CHUNK_ELEMENTS`].
    pub fn decode_chunk(
        &mut self,
        width: usize,
        rotate: bool,
        lengths: &[u32],
        data: &[u8],
        out: &mut [u8],
    ) -> Result<(), Error> {
        let elements = elements(width, out.len())?;
        if lengths.len() != width {
            return Err(Error::Invalid(format!("{} lengths for {width} planes", lengths.len())));
        }
        self.planes.resize(out.len(), 0);
        let mut planes = [&[][..]; 8];
        let mut scratch = &mut self.planes[..];
        let mut rest = data;
        for (plane, &length) in planes.iter_mut().zip(lengths) {
            let length = length as usize;
            if length > elements {
                return Err(Error::corrupt("lengths", format!("{length} bytes for a plane of {elements}")));
            }
            let Some((stored, after)) = rest.split_at_checked(length) else {
                return Err(Error::corrupt("data", format!("{} bytes, fewer than the lengths", data.len())));
            };
            rest = after;
            *plane = if length == elements {
                stored
            } else {
                let (decoded, after) = scratch.split_at_mut(elements);
                scratch = after;
                decompress(&mut self.context, stored, decoded)?;
                decoded
            };
        }
        if !rest.is_empty() {
            return Err(Error::corrupt("data", format!("{} bytes beyond the lengths", rest.len())));
        }
        join(rotate, &planes[..width], out);
        Ok(())
    }
}

/// Decodes one frame, neither less nor more, that fills `plane`.
pub(crate) fn decompress(context: &mut DCtx<'_>, frame: &[u8], plane: &mut [u8]) -> Result<(), Error> {
    let corrupt = |code| Error::corrupt("data", format!("zstd: {}", zstd_safe::get_error_name(code)));
    let frame_length = zstd_safe::find_frame_compressed_size(frame).map_err(corrupt)?;
    if frame_length != frame.len() {
        return Err(Error::corrupt("data", format!("a frame of {frame_length} in {} bytes", frame.len())));
    }
    let length = context.decompress(plane, frame).map_err(corrupt)?;
    if length != plane.len() {
        return Err(Error::corrupt("data", format!("{length} bytes for a plane of {}", plane.len())));
    }
    Ok(())
}

/// How many elements of `width` bytes `bytes` are, if that is a chunk.
fn elements(width: usize, bytes: usize) -> Result<usize, Error> {
    if !WIDTHS.contains(&width) {
        return Err(Error::Invalid(format!("elements of {width} bytes")));
    }
    let elements = bytes / width;
    if !bytes.is_multiple_of(width) || elements > CHUNK_ELEMENTS {
        return Err(Error::Invalid(format!("{bytes} bytes are no chunk of elements of {width}")));
    }
    Ok(elements)
}
