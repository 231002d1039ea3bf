//! `planes`: byte planes through zstd; any dtype.

mod timed;

use llmpress_entropy::planes;
use llmpress_formats::encoding::planes::{self as names, Split};
use llmpress_formats::encoding::{self, Encoding};
use llmpress_formats::{Dtype, ShardWriter, Tensor};

use super::room::{Coding, Encoder, Fit, Room, StreamedEncoder, Survey, share};
use super::timed::Timed;
use crate::sink::{Encoded, Sink, Slots, SourceDigests};
use crate::source::UnitSource;
use crate::work::{Work, pieces};
use crate::{Error, Result};

/// Tensors smaller than this are kept raw: their frames and names would cost more.
const MIN_BYTES: u64 = 1024;

pub(crate) struct Planes;

impl Room for Planes {
    fn name(&self) -> &'static str {
        "planes"
    }

    fn fit(&self, tensor: &Tensor) -> Fit {
        if tensor.bytes >= MIN_BYTES { Fit::Suits } else { Fit::Raw }
    }

    fn expected_bytes(&self, _tensor: Option<&Tensor>, bytes: u64) -> u64 {
        share(bytes, 70)
    }

    fn components(&self) -> &'static [&'static str] {
        &[names::PLANES, names::LENGTHS]
    }

    fn indivisible_bytes(&self, tensor: &Tensor) -> u64 {
        chunk_bytes(names::split(tensor.dtype)) as u64
    }

    fn timed(&self, dtype: Dtype) -> Option<Box<dyn Timed>> {
        Some(Box::new(timed::Chunks::new(dtype)))
    }

    fn gb_per_second(&self) -> f64 {
        0.31
    }

    fn survey(&self, _unit: &UnitSource<'_>, first: &Tensor, _work: Work<'_>) -> Result<Survey> {
        let split = names::split(first.dtype);
        Ok(Ok(Coding {
            encoding: encoding_of(split),
            spec: names::components(first.bytes, split.width, first.bytes),
            step: chunk_bytes(split),
            encoder: Encoder::Streamed(Box::new(Frames(split))),
            fallback: None,
        }))
    }
}

fn chunk_bytes(split: Split) -> usize {
    planes::CHUNK_ELEMENTS * split.width
}

fn encoding_of(split: Split) -> Encoding {
    Encoding::Planes { rotate: split.rotate }
}

struct Frames(Split);

impl StreamedEncoder for Frames {
    fn encode(
        &self,
        name: &str,
        unit: &UnitSource<'_>,
        writer: &mut ShardWriter,
        work: Work<'_>,
    ) -> Result<(Encoded, Slots)> {
        let split = self.0;
        let stored_name = |component| encoding::stored_name(name, &encoding_of(split), component);
        let room = writer.open_end(&stored_name(names::PLANES));
        let mut data = Sink::new(names::PLANES, room, work.threads);
        let mut digests = SourceDigests::new(unit, work.threads);
        let mut lengths: Vec<u32> = Vec::new();
        let all: Vec<(u64, usize)> = pieces(unit.bytes(), chunk_bytes(split)).collect();
        let mut buffers: Vec<Chunk> = Vec::new();
        buffers.resize_with(work.batch.min(all.len()), Chunk::new);
        for batch in all.chunks(work.batch) {
            buffers.truncate(batch.len());
            let jobs = buffers.iter_mut().zip(batch).collect();
            work.threads.map(
                jobs,
                || (),
                |(), (chunk, &(offset, len))| {
                    chunk.bytes.resize(len, 0);
                    unit.read(offset, &mut chunk.bytes)?;
                    chunk.data.clear();
                    chunk.lengths.clear();
                    chunk
                        .encoder
                        .encode_chunk(
                            split.width,
                            split.rotate,
                            &chunk.bytes,
                            &mut chunk.data,
                            &mut chunk.lengths,
                        )
                        .map_err(|e| Error::Invalid(format!("tensor {name}: {e}")))
                },
            )?;
            let (written, ()) = work.threads.join(
                || buffers.iter().try_for_each(|chunk| data.append(&chunk.data)),
                || buffers.iter().for_each(|chunk| digests.update(&chunk.bytes)),
            );
            written?;
            lengths.extend(buffers.iter().flat_map(|chunk| &chunk.lengths));
            work.progress.advance(batch.iter().map(|&(_, len)| len as u64).sum());
        }
        let specs = names::components(unit.bytes(), split.width, data.written());
        let rest = [(names::LENGTHS, bytemuck::cast_slice(&lengths))];
        let (components, placed) = data.end_unit(name, &encoding_of(split), specs, &rest, writer, work)?;
        Ok((Encoded { tensors: digests.finish(), components }, placed))
    }
}

struct Chunk {
    encoder: planes::Encoder,
    bytes: Vec<u8>,
    data: Vec<u8>,
    lengths: Vec<u32>,
}

impl Chunk {
    fn new() -> Self {
        Self {
            encoder: planes::Encoder::new(planes::DEFAULT_LEVEL),
            bytes: Vec::new(),
            data: Vec::new(),
            lengths: Vec::new(),
        }
    }
}
