//! Byte planes in memory.

use llmpress_entropy::planes;
use llmpress_formats::Dtype;
use llmpress_formats::encoding::planes::{Split, split};

use crate::Result;
use crate::method::timed::{Joined, Timed, invalid};

pub(super) struct Chunks {
    split: Split,
    encoder: planes::Encoder,
    decoder: planes::Decoder,
    data: Vec<u8>,
    lengths: Vec<u32>,
}

impl Chunks {
    pub(super) fn new(dtype: Dtype) -> Self {
        Self {
            split: split(dtype),
            encoder: planes::Encoder::new(planes::DEFAULT_LEVEL),
            decoder: planes::Decoder::new(),
            data: Vec::new(),
            lengths: Vec::new(),
        }
    }

    fn chunk(&self) -> usize {
        planes::CHUNK_ELEMENTS * self.split.width
    }
}

impl Timed for Chunks {
    fn encode(&mut self, unit: &Joined) -> Result<usize> {
        self.data.clear();
        self.lengths.clear();
        for bytes in unit.bytes().chunks(self.chunk()) {
            let (width, rotate) = (self.split.width, self.split.rotate);
            let (data, lengths) = (&mut self.data, &mut self.lengths);
            self.encoder.encode_chunk(width, rotate, bytes, data, lengths).map_err(invalid)?;
        }
        Ok(self.data.len() + self.lengths.len() * 4)
    }

    fn decode(&mut self, out: &mut [u8]) -> Result<()> {
        let mut at = 0;
        for (bytes, lengths) in out.chunks_mut(self.chunk()).zip(self.lengths.chunks(self.split.width)) {
            let len: usize = lengths.iter().map(|&l| l as usize).sum();
            let (width, rotate) = (self.split.width, self.split.rotate);
            let data = &self.data[at..at + len];
            self.decoder.decode_chunk(width, rotate, lengths, data, bytes).map_err(invalid)?;
            at += len;
        }
        Ok(())
    }
}
