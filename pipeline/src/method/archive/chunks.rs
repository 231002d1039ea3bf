//! Chunk after chunk of a tensor through the coder of words.
//!
//! ```text
//! elements --(words, classes)--> chunk ... | lengths | model's frame
//! ```

use llmpress_entropy::archive::{self, CHUNK_ELEMENTS, Model};
use llmpress_formats::encoding::archive as names;
use llmpress_formats::encoding::{self, Encoding};
use llmpress_formats::{Dtype, ShardWriter};

use crate::method::room::StreamedEncoder;
use crate::sink::{Encoded, Sink, Slots, SourceDigests};
use crate::source::UnitSource;
use crate::work::{Work, pieces};
use crate::{Error, Result};

/// The elements of a unit as words.
#[derive(Clone, Copy)]
pub(crate) struct Words<'a> {
    pub(crate) unit: &'a UnitSource<'a>,
    /// Whether elements have 16 bits, not 8.
    pub(crate) wide: bool,
}

impl<'a> Words<'a> {
    pub(crate) fn of(unit: &'a UnitSource<'a>, dtype: Dtype) -> Self {
        Self { unit, wide: dtype.bits() == 16 }
    }

    pub(crate) fn elements(&self) -> u64 {
        self.unit.bytes() / if self.wide { 2 } else { 1 }
    }

    /// Elements `first..first + count`, and their bytes where these are not the words themselves.
    pub(crate) fn read(
        &self,
        first: u64,
        count: usize,
        words: &mut Vec<u16>,
        bytes: &mut Vec<u8>,
    ) -> Result<()> {
        if self.wide {
            words.resize(count, 0);
            return self.unit.read(2 * first, bytemuck::cast_slice_mut(words));
        }
        bytes.resize(count, 0);
        self.unit.read(first, bytes)?;
        archive::widen(bytes, words);
        Ok(())
    }
}

/// What a tensor's chunks are coded by.
pub(crate) trait Coder: Send + Sync {
    /// The model.
    fn model(&self) -> &Model;

    /// What the manifest says of it.
    fn encoding(&self) -> Encoding;

    /// What is stored of it.
    fn frame(&self) -> std::result::Result<Vec<u8>, llmpress_entropy::Error>;

    /// Encodes a chunk's words, the first of which is element `first`.
    fn encode(&self, words: Words<'_>, first: u64, chunk: &mut Chunk) -> Result<()>;
}

/// A chunk's buffers.
pub(crate) struct Chunk {
    pub(crate) encoder: archive::Encoder,
    pub(crate) words: Vec<u16>,
    bytes: Vec<u8>,
    pub(crate) classes: Vec<u8>,
    pub(crate) data: Vec<u8>,
    /// Those of the base, as words and as bytes, and the differences from it.
    pub(crate) base: (Vec<u16>, Vec<u8>),
    pub(crate) differences: Vec<u16>,
}

impl Chunk {
    fn new(model: &Model) -> Self {
        Self {
            encoder: archive::Encoder::new(model),
            words: Vec::new(),
            bytes: Vec::new(),
            classes: Vec::new(),
            data: Vec::new(),
            base: (Vec::new(), Vec::new()),
            differences: Vec::new(),
        }
    }

    /// The bytes that the words came from.
    fn source(&self, wide: bool) -> &[u8] {
        if wide { bytemuck::cast_slice(&self.words) } else { &self.bytes }
    }
}

/// Encodes chunk after chunk.
pub(crate) struct Chunks<C> {
    pub(crate) coder: C,
    pub(crate) wide: bool,
}

impl<C: Coder> StreamedEncoder for Chunks<C> {
    fn encode(
        &self,
        name: &str,
        unit: &UnitSource<'_>,
        writer: &mut ShardWriter,
        work: Work<'_>,
    ) -> Result<(Encoded, Slots)> {
        let encoding = self.coder.encoding();
        let words = Words { unit, wide: self.wide };
        let room = writer.open_end(&encoding::stored_name(name, &encoding, names::CHUNKS));
        let mut data = Sink::new(names::CHUNKS, room, work.threads);
        let mut digests = SourceDigests::new(unit, work.threads);
        let mut lengths: Vec<u32> = Vec::new();
        let all: Vec<(u64, usize)> = pieces(words.elements(), CHUNK_ELEMENTS).collect();
        let mut buffers: Vec<Chunk> = Vec::new();
        buffers.resize_with(work.batch.min(all.len()), || Chunk::new(self.coder.model()));
        for batch in all.chunks(work.batch.max(1)) {
            buffers.truncate(batch.len());
            work.threads.map(
                buffers.iter_mut().zip(batch).collect(),
                || (),
                |(), (chunk, &(first, count))| {
                    words.read(first, count, &mut chunk.words, &mut chunk.bytes)?;
                    chunk.data.clear();
                    self.coder.encode(words, first, chunk)
                },
            )?;
            let (written, ()) = work.threads.join(
                || buffers.iter().try_for_each(|chunk| data.append(&chunk.data)),
                || buffers.iter().for_each(|chunk| digests.update(chunk.source(self.wide))),
            );
            written?;
            // A chunk has at most 2^18 elements of some bytes each.
            lengths.extend(buffers.iter().map(|chunk| chunk.data.len() as u32));
            work.progress.advance(buffers.iter().map(|chunk| chunk.source(self.wide).len() as u64).sum());
        }
        let frame = self.coder.frame().map_err(|e| Error::Invalid(format!("tensor {name}: {e}")))?;
        let specs = names::components(words.elements(), data.written(), frame.len() as u64);
        let rest = [(names::LENGTHS, bytemuck::cast_slice(&lengths)), (names::MODEL, frame.as_slice())];
        let (components, placed) = data.end_unit(name, &encoding, specs, &rest, writer, work)?;
        Ok((Encoded { tensors: digests.finish(), components }, placed))
    }
}
