//! What sequences on a GPU are asked for.

use std::ops::Range;

use llmpress_formats::{Error, Result};
use llmpress_kernels::gpu::sampling::{Draw, draw, soft_cap};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;

use super::super::device;
use super::{GpuSession, padded};
use crate::engine::no_sequence;
use crate::{Batch, Panels, Sampling, Session, Skips};

impl GpuSession<'_> {
    /// Reads as many tokens of each sequence at `places`, those of the first one first.
    fn read_each(&mut self, places: &[usize], ids: &[u32], skips: &Skips, keep: Range<usize>) -> Result<()> {
        let each = self.check(places, ids)?;
        let lengths: Vec<usize> = places.iter().map(|place| self.lengths[*place]).collect();
        let first = lengths.iter().copied().min().unwrap_or(0);
        let last = lengths.iter().copied().max().unwrap_or(0);
        let positions: Vec<u32> = lengths.iter().map(|length| *length as u32).collect();
        self.make_angles(first..last + each)?;
        self.at_hand = places.len();
        self.positions.view().write(&positions).map_err(device)?;
        let numbers: Vec<u32> = places.iter().map(|place| *place as u32).collect();
        self.places.view().write(&numbers).map_err(device)?;
        if each == 1 && keep == (0..1) && skips.is_empty() {
            self.ids.view().write(ids).map_err(device)?;
            self.single(places.len()).map_err(device)?;
            (self.picked, self.kept_tokens) = (true, 0);
            places.iter().for_each(|place| self.lengths[*place] += 1);
            return Ok(());
        }
        let row = 2 * padded(self.model.config.hidden_size);
        let kept_bytes = places.len() * keep.len() * row;
        if self.kept.bytes() < kept_bytes {
            self.kept = self.model.gpu.allocate(kept_bytes).map_err(device)?;
        }
        (self.picked, self.kept_tokens) = (false, keep.len());
        let step = (self.chunk / places.len()).max(1);
        for first in (0..each).step_by(step) {
            let count = step.min(each - first);
            let piece: Vec<u32> =
                ids.chunks(each).flat_map(|ids| &ids[first..first + count]).copied().collect();
            self.ids.view().write(&piece).map_err(device)?;
            self.run(places.len(), count, last + first + count, skips).map_err(device)?;
            let kept = keep.start.clamp(first, first + count)..keep.end.clamp(first, first + count);
            for sequence in (0..places.len()).filter(|_| !kept.is_empty()) {
                let to = (sequence * keep.len() + kept.start - keep.start) * row;
                let to = self.kept.slice(to..to + kept.len() * row).map_err(device)?;
                let from = sequence * count + kept.start - first;
                self.last_norm(from..from + kept.len(), to).map_err(device)?;
            }
            places.iter().for_each(|place| self.lengths[*place] += count);
        }
        Ok(())
    }

    /// Refuses what cannot be read. Tokens of each sequence.
    fn check(&self, places: &[usize], ids: &[u32]) -> Result<usize> {
        let sequences = self.lengths.len();
        let twice = |(i, place): (usize, &usize)| *place >= sequences || places[..i].contains(place);
        if places.is_empty()
            || !ids.len().is_multiple_of(places.len())
            || places.iter().enumerate().any(twice)
        {
            return Err(Error::Invalid(format!(
                "{} tokens for the sequences {places:?} of {sequences}",
                ids.len()
            )));
        }
        let each = ids.len() / places.len();
        let needed = places.iter().map(|place| self.lengths[*place].saturating_add(each)).max().unwrap_or(0);
        if needed > self.capacity {
            return Err(Error::Limit(format!("{needed} tokens do not fit a cache of {}", self.capacity)));
        }
        if let Some((_, learned)) = &self.model.positions
            && needed > *learned
        {
            return Err(Error::Limit(format!(
                "{} has learned {learned} positions, and a token stands at {}",
                self.model.checkpoint.root().display(),
                needed - 1
            )));
        }
        let vocab = self.model.embedding.rows;
        match ids.iter().enumerate().find(|(_, id)| **id as usize >= vocab) {
            Some((token, id)) => Err(Error::Invalid(format!(
                "token id {id} at {token} is beyond the vocabulary of {vocab} of {}",
                self.model.checkpoint.root().display()
            ))),
            None => Ok(each),
        }
    }

    /// Logits and likeliest successors of the last kept tokens.
    fn ready(&mut self) -> Result<()> {
        if self.picked {
            return self.check_quantised();
        }
        let row = 2 * padded(self.model.config.hidden_size);
        let last = self
            .kept_tokens
            .checked_sub(1)
            .ok_or_else(|| Error::Invalid("no token was kept to go on from".to_owned()))?;
        for sequence in 0..self.at_hand {
            let from = (sequence * self.kept_tokens + last) * row;
            self.kept
                .slice(from..from + row)
                .and_then(|state| state.copy_to(self.state.slice(sequence * row..(sequence + 1) * row)?))
                .map_err(device)?;
        }
        self.succeed(self.at_hand).map_err(device)?;
        self.picked = true;
        self.check_quantised()
    }

    /// A token that is drawn after a sequence at hand.
    fn draw(&self, sequence: usize, sampling: Sampling, random: &mut ChaCha8Rng) -> Result<u32> {
        let vocab = self.model.head().rows;
        self.random.view().write(&[random.next_u64()]).map_err(device)?;
        let operands = Draw {
            logits: self.logits.slice(4 * sequence * vocab..4 * (sequence + 1) * vocab).map_err(device)?,
            vocab,
            limits: sampling.limits(),
            random: self.random.view(),
            workspace: self.drawing.view(),
            ids: self.drawn.view(),
        };
        draw(&self.model.gpu, &operands).map_err(device)?;
        Ok(self.drawn.view().read::<u32>(1).map_err(device)?[0])
    }

    fn logits_of_kept(&mut self, sequence: usize, run: Range<usize>, out: &mut Panels) -> Result<()> {
        let tokens = if self.picked { 1 } else { self.kept_tokens };
        out.resize(run.len(), tokens);
        if tokens == 0 || run.is_empty() {
            return Ok(());
        }
        let m = self.model;
        let count = tokens * run.len();
        let logits = m.gpu.allocate(4 * count).map_err(device)?;
        let x = if self.picked { &self.state } else { &self.kept };
        let bytes = 2 * tokens * padded(m.config.hidden_size);
        let x = x.slice(sequence * bytes..(sequence + 1) * bytes).map_err(device)?;
        self.product_of(m.head(), run.clone(), x, tokens, logits.view(), run.len(), false).map_err(device)?;
        if let Some(cap) = m.config.final_softcap {
            soft_cap(&m.gpu, logits.view(), count, cap).map_err(device)?;
        }
        let values: Vec<f32> = logits.view().read(count).map_err(device)?;
        self.check_quantised()?;
        for (token, values) in values.chunks_exact(run.len()).enumerate() {
            out.set_token(token, values.iter().copied());
        }
        Ok(())
    }
}

impl Session for GpuSession<'_> {
    fn len(&self) -> usize {
        self.lengths[0]
    }

    fn clear(&mut self) {
        self.lengths.fill(0);
        self.announced = 0;
    }

    fn announce(&mut self, length: usize) {
        self.announced = length;
    }

    fn read(&mut self, ids: &[u32], skips: &Skips, keep: Range<usize>) -> Result<()> {
        self.read_each(&[0], ids, skips, keep)
    }

    /// In the pieces of this device: the more tokens at once, the less often weights are read.
    fn prefill(&mut self, ids: &[u32]) -> Result<()> {
        Batch::prefill(self, 0, ids)
    }

    fn logits(&mut self, run: Range<usize>, out: &mut Panels) -> Result<()> {
        self.logits_of_kept(0, run, out)
    }

    fn pick(&mut self, sampling: Sampling, random: &mut ChaCha8Rng) -> Result<u32> {
        self.ready()?;
        if sampling.temperature == 0.0 {
            return Ok(self.next.view().read::<u32>(1).map_err(device)?[0]);
        }
        self.draw(0, sampling, random)
    }
}

impl Batch for GpuSession<'_> {
    fn clear(&mut self, place: usize) {
        if let Some(length) = self.lengths.get_mut(place) {
            *length = 0;
        }
        if self.lengths.iter().all(|length| *length == 0) {
            self.announced = 0;
        }
    }

    fn read(&mut self, places: &[usize], ids: &[u32], skips: &Skips, keep: Range<usize>) -> Result<()> {
        self.read_each(places, ids, skips, keep)
    }

    fn prefill(&mut self, place: usize, ids: &[u32]) -> Result<()> {
        let last =
            ids.len().checked_sub(1).ok_or_else(|| Error::Invalid("the prompt has no tokens".to_owned()))?;
        let before = self.lengths.get(place).copied().unwrap_or(0);
        self.announced = before.saturating_add(ids.len());
        self.read_each(&[place], ids, &Skips::new(), last..last + 1)
    }

    fn logits(&mut self, number: usize, run: Range<usize>, out: &mut Panels) -> Result<()> {
        if number >= self.at_hand {
            return Err(no_sequence(number, self.at_hand));
        }
        self.logits_of_kept(number, run, out)
    }

    fn pick(&mut self, sampling: Sampling, random: &mut [&mut ChaCha8Rng]) -> Result<Vec<u32>> {
        self.ready()?;
        if sampling.temperature == 0.0 {
            return self.next.view().read(self.at_hand).map_err(device);
        }
        random
            .iter_mut()
            .enumerate()
            .map(|(sequence, random)| self.draw(sequence, sampling, random))
            .collect()
    }
}
