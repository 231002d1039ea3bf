//! archive in memory.

use llmpress_entropy::archive::{self, CHUNK_ELEMENTS, Choice, Decoder, Encoder, Layout};
use llmpress_formats::Dtype;
use llmpress_formats::encoding::archive::sides;

use crate::Result;
use crate::method::timed::{Joined, Timed, invalid};

/// One matrix.
struct Matrix {
    choice: Choice,
    /// Elements, and the stored length of each chunk of them.
    elements: usize,
    lengths: Vec<usize>,
}

pub(super) struct Chunks {
    layout: Layout,
    wide: bool,
    matrices: Vec<Matrix>,
    data: Vec<u8>,
    classes: Vec<u8>,
    words: Vec<u16>,
}

impl Chunks {
    pub(super) fn new(layout: Layout, dtype: Dtype) -> Self {
        let wide = dtype.bits() == 16;
        Self { layout, wide, matrices: Vec::new(), data: Vec::new(), classes: Vec::new(), words: Vec::new() }
    }
}

impl Timed for Chunks {
    fn encode(&mut self, unit: &Joined) -> Result<usize> {
        self.data.clear();
        self.matrices.clear();
        let mut stored = 0;
        let mut at = 0;
        for (shape, bytes) in &unit.matrices {
            let words = if self.wide {
                unit.words().get(at / 2..(at + bytes) / 2).unwrap_or_default()
            } else {
                archive::widen(unit.bytes().get(at..at + bytes).unwrap_or_default(), &mut self.words);
                &self.words
            };
            at += bytes;
            let (rows, cols) = sides(shape);
            let choice = Choice::of(self.layout, rows as usize, cols as usize, words).map_err(invalid)?;
            let scales = &choice.scales;
            stored += choice.model.pack(scales).map_err(invalid)?.len();
            let mut encoder = Encoder::new(&choice.model);
            let mut lengths = Vec::new();
            for (first, chunk) in (0..).step_by(CHUNK_ELEMENTS).zip(words.chunks(CHUNK_ELEMENTS)) {
                let classes = &mut self.classes;
                archive::classes(&choice.model, &scales.rows, &scales.cols, first, chunk.len(), classes)
                    .map_err(invalid)?;
                let start = self.data.len();
                encoder.encode_chunk(classes, chunk, &mut self.data).map_err(invalid)?;
                lengths.push(self.data.len() - start);
            }
            stored += 4 * lengths.len();
            self.matrices.push(Matrix { choice, elements: words.len(), lengths });
        }
        Ok(stored + self.data.len())
    }

    fn decode(&mut self, out: &mut [u8]) -> Result<()> {
        let width = if self.wide { 2 } else { 1 };
        let (mut data, mut rest) = (self.data.as_slice(), out);
        for Matrix { choice: Choice { model, scales, .. }, elements, lengths } in &self.matrices {
            let decoder = Decoder::new(model);
            for (first, &length) in (0..*elements).step_by(CHUNK_ELEMENTS).zip(lengths) {
                let (chunk, later) = data.split_at_checked(length).ok_or_else(|| invalid("cut short"))?;
                data = later;
                let count = (elements - first).min(CHUNK_ELEMENTS);
                let (bytes, later) = rest.split_at_mut((count * width).min(rest.len()));
                rest = later;
                let classes = &mut self.classes;
                archive::classes(model, &scales.rows, &scales.cols, first as u64, count, classes)
                    .map_err(invalid)?;
                if self.wide {
                    let words = bytemuck::cast_slice_mut(bytes);
                    decoder.decode_chunk(classes, chunk, words).map_err(invalid)?;
                } else {
                    self.words.resize(count, 0);
                    decoder.decode_chunk(classes, chunk, &mut self.words).map_err(invalid)?;
                    archive::narrow(&self.words, bytes);
                }
            }
        }
        Ok(())
    }
}
