//! Eight lanes at a time with AVX2, and bits spread and gathered with BMI2.

use std::arch::x86_64::*;

use super::decode::{Decoder, ESCAPED, Progress, note_escapes};
use super::encode::Backwards;
use super::low_bits::Stored;
use super::{ESCAPE, LANES, Model, PROBABILITY_BITS, Parts, START, SYMBOLS, TOTAL};

/// Proof that the processor has AVX2 and BMI2.
#[derive(Clone, Copy, Debug)]
pub(super) struct Avx2(());

impl Avx2 {
    pub(super) fn detect() -> Option<Self> {
        crate::isa::has_avx2_and_bmi2().then_some(Self(()))
    }

    /// Decodes symbols while there are 32 elements, and words to read ahead of.
    #[allow(unsafe_code)]
    pub(super) fn symbols(
        self,
        decoder: &Decoder<'_>,
        classes: &[u8],
        parts: &Parts<'_>,
        out: &mut [u16],
        progress: &mut Progress,
    ) {
        // SAFETY: `detect`, the only way to a `self`, saw AVX2 and what counts bits.
        unsafe {
            if classes.is_empty() {
                symbols::<false>(decoder, classes, parts, out, progress);
            } else {
                symbols::<true>(decoder, classes, parts, out, progress);
            }
        }
    }

    /// Runs the whole groups of 32 elements backwards through the states; the elements after them were.
    #[allow(unsafe_code)]
    pub(super) fn states(
        self,
        model: &Model,
        steps: &[u32],
        classes: &[u8],
        words: &[u16],
        backwards: &mut Backwards,
    ) {
        // SAFETY: `detect`, the only way to a `self`, saw AVX2 and what counts bits.
        unsafe {
            if classes.is_empty() {
                states::<false>(model, steps, classes, words, backwards);
            } else {
                states::<true>(model, steps, classes, words, backwards);
            }
        }
    }

    /// The classes of a part of a row.
    #[allow(unsafe_code)]
    pub(super) fn classes(self, row: i8, cols: &[i8], shift: u32, last: i8, out: &mut Vec<u8>) {
        // SAFETY: `detect`, the only way to a `self`, saw AVX2 and what counts bits.
        unsafe { classes(row, cols, shift, last, out) }
    }

    /// [`add_row_anywhere`](super::survey::add_row_anywhere), eight at a time.
    #[allow(unsafe_code)]
    pub(super) fn add_row(self, row: &[u16], floor: u16, ceiling: u16, sums: &mut [u32]) -> u64 {
        #[target_feature(enable = "avx2")]
        fn with_avx2(row: &[u16], floor: u16, ceiling: u16, sums: &mut [u32]) -> u64 {
            super::survey::add_row_anywhere(row, floor, ceiling, sums)
        }
        // SAFETY: `detect`, the only way to a `self`, saw AVX2.
        unsafe { with_avx2(row, floor, ceiling, sums) }
    }

    /// [`Stored::pack`].
    #[allow(unsafe_code)]
    pub(super) fn pack(self, stored: Stored, words: &[u16], out: &mut Vec<u8>) {
        // SAFETY: `detect`, the only way to a `self`, saw BMI2.
        unsafe { pack(stored, words, out) }
    }

    /// [`Stored::unpack`].
    #[allow(unsafe_code)]
    pub(super) fn unpack(self, stored: Stored, packed: &[u8], words: &mut [u16]) {
        // SAFETY: `detect`, the only way to a `self`, saw BMI2.
        unsafe { unpack(stored, packed, words) }
    }
}

/// For each set of lanes that want a word: which of the next eight words each of them gets.
static TAKEN: [[u32; 8]; 256] = {
    let mut all = [[0; 8]; 256];
    let mut mask = 0;
    while mask < 256 {
        let (mut lane, mut next) = (0, 0);
        while lane < 8 {
            if mask >> lane & 1 == 1 {
                all[mask][lane] = next;
                next += 1;
            }
            lane += 1;
        }
        mask += 1;
    }
    all
};

#[target_feature(enable = "avx2,popcnt")]
#[allow(unsafe_code)]
fn symbols<const CLASSES: bool>(
    decoder: &Decoder<'_>,
    classes: &[u8],
    parts: &Parts<'_>,
    out: &mut [u16],
    progress: &mut Progress,
) {
    let (model, entries) = (decoder.model, &decoder.entries);
    let set = |value: u32| _mm256_set1_epi32(value as i32);
    let mut states = [_mm256_setzero_si256(); LANES / 8];
    for (state, lanes) in states.iter_mut().zip(progress.states.chunks_exact(8)) {
        // SAFETY: eight lanes.
        *state = unsafe { _mm256_loadu_si256(lanes.as_ptr().cast()) };
    }
    let base = set(u32::from(model.base()));
    let low = _mm_cvtsi32_si128(model.low() as i32);
    let mut at = progress.at;
    let mut first = 0;
    for words in out.chunks_exact_mut(LANES) {
        // 32 words at most are taken, and eight are read at a time.
        if parts.rest.len() < 2 * (at + LANES + 8) {
            break;
        }
        let mut pairs = [_mm256_setzero_si256(); LANES / 16];
        let mut escapes = _mm256_setzero_si256();
        let mut previous = _mm256_setzero_si256();
        for (half, state) in states.iter_mut().enumerate() {
            let x = *state;
            let mut slot = _mm256_and_si256(x, set(TOTAL - 1));
            if CLASSES {
                // SAFETY: `decode_chunk` saw that there are as many classes as elements, each less than the model's.
                let of_lanes = unsafe { _mm_loadl_epi64(classes.as_ptr().add(first + 8 * half).cast()) };
                let of_lanes = _mm256_cvtepu8_epi32(of_lanes);
                slot = _mm256_add_epi32(slot, _mm256_slli_epi32::<{ PROBABILITY_BITS as i32 }>(of_lanes));
            }
            // SAFETY: a model has 4096 entries for each class.
            let entry = unsafe { _mm256_i32gather_epi32::<4>(entries.as_ptr().cast(), slot) };
            let frequency = _mm256_add_epi32(_mm256_srli_epi32::<20>(entry), set(1));
            let offset = _mm256_and_si256(_mm256_srli_epi32::<8>(entry), set(TOTAL - 1));
            let upper = _mm256_srli_epi32::<{ PROBABILITY_BITS as i32 }>(x);
            let x = _mm256_add_epi32(_mm256_mullo_epi32(frequency, upper), offset);
            // States are unsigned: those below 2^16 have no upper half.
            let wants = _mm256_cmpeq_epi32(_mm256_srli_epi32::<16>(x), _mm256_setzero_si256());
            let mask = _mm256_movemask_ps(_mm256_castsi256_ps(wants)) as usize & 255;
            // SAFETY: 32 + 8 words from `at` on were seen to be there, of which at most 24 are taken so far.
            let next = unsafe { _mm_loadu_si128(parts.rest.as_ptr().add(2 * at).cast()) };
            // SAFETY: an array of eight.
            let taken = unsafe { _mm256_loadu_si256(TAKEN[mask].as_ptr().cast()) };
            let next = _mm256_permutevar8x32_epi32(_mm256_cvtepu16_epi32(next), taken);
            let filled = _mm256_or_si256(_mm256_slli_epi32::<16>(x), next);
            *state = _mm256_blendv_epi8(x, filled, wants);
            at += mask.count_ones() as usize;
            let symbol = _mm256_and_si256(entry, set(255));
            let is_zero = _mm256_cmpeq_epi32(symbol, _mm256_setzero_si256());
            let is_escape = _mm256_cmpeq_epi32(symbol, set(u32::from(ESCAPE)));
            let part = _mm256_andnot_si256(is_zero, _mm256_add_epi32(symbol, base));
            let part = _mm256_and_si256(_mm256_sll_epi32(part, low), set(0x7fff));
            let part = _mm256_blendv_epi8(part, set(u32::from(ESCAPED)), is_escape);
            escapes = _mm256_or_si256(escapes, is_escape);
            if half % 2 == 0 {
                previous = part;
            } else {
                let packed = _mm256_packus_epi32(previous, part);
                pairs[half / 2] = _mm256_permute4x64_epi64::<0b11_01_10_00>(packed);
            }
        }
        for (pair, words) in pairs.iter().zip(words.chunks_exact_mut(16)) {
            // SAFETY: sixteen words.
            unsafe { _mm256_storeu_si256(words.as_mut_ptr().cast(), *pair) };
        }
        if _mm256_testz_si256(escapes, escapes) == 0 {
            note_escapes(words, first, &mut progress.places);
        }
        first += LANES;
    }
    for (state, lanes) in states.iter().zip(progress.states.chunks_exact_mut(8)) {
        // SAFETY: eight lanes.
        unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), *state) };
    }
    (progress.at, progress.done) = (at, first);
    debug_assert!(progress.states.iter().all(|&state| state >= START || at > parts.words));
}

/// For each set of lanes that give a word: they, in order, in the last places of eight.
static GIVEN: [[u32; 8]; 256] = {
    let mut all = [[0; 8]; 256];
    let mut mask = 0usize;
    while mask < 256 {
        let (mut lane, mut next) = (0, 8 - mask.count_ones() as usize);
        while lane < 8 {
            if mask >> lane & 1 == 1 {
                all[mask][next] = lane as u32;
                next += 1;
            }
            lane += 1;
        }
        mask += 1;
    }
    all
};

#[target_feature(enable = "avx2,popcnt")]
#[allow(unsafe_code)]
fn states<const CLASSES: bool>(
    model: &Model,
    steps: &[u32],
    classes: &[u8],
    words: &[u16],
    backwards: &mut Backwards,
) {
    let set = |value: u32| _mm256_set1_epi32(value as i32);
    let groups = words.len() / LANES;
    if steps.len() < SYMBOLS || CLASSES && classes.len() < groups * LANES {
        return;
    }
    let mut states = [_mm256_setzero_si256(); LANES / 8];
    for (state, lanes) in states.iter_mut().zip(backwards.states.chunks_exact(8)) {
        // SAFETY: eight lanes.
        *state = unsafe { _mm256_loadu_si256(lanes.as_ptr().cast()) };
    }
    let (base, shift) = (set(u32::from(model.base())), _mm_cvtsi32_si128(model.low() as i32));
    let magnitude = set(u32::from(model.magnitude()));
    let zero = _mm256_setzero_si256();
    // Signed conversion of unsigned states, and a half so that no quotient is near a whole number.
    let half = _mm256_set1_pd(2_147_483_648.5);
    for group in (0..groups).rev() {
        // 32 words at most are given, eight are written at a time.
        let Some(below) = backwards.at.checked_sub(LANES + 8) else { return };
        debug_assert!(below < backwards.words.len());
        for (eight, state) in states.iter_mut().enumerate().rev() {
            let first = group * LANES + 8 * eight;
            // SAFETY: the group is a whole one.
            let word = unsafe { _mm_loadu_si128(words.as_ptr().add(first).cast()) };
            let part = _mm256_and_si256(_mm256_cvtepu16_epi32(word), magnitude);
            let part = _mm256_srl_epi32(part, shift);
            let is_zero = _mm256_cmpeq_epi32(part, zero);
            let symbol = _mm256_sub_epi32(part, base);
            let outside =
                _mm256_or_si256(_mm256_cmpgt_epi32(set(1), symbol), _mm256_cmpgt_epi32(symbol, set(254)));
            let symbol = _mm256_blendv_epi8(symbol, set(u32::from(ESCAPE)), outside);
            let mut symbol = _mm256_andnot_si256(is_zero, symbol);
            let mut table = zero;
            if CLASSES {
                // SAFETY: there are as many classes as elements.
                let of_lanes = unsafe { _mm_loadl_epi64(classes.as_ptr().add(first).cast()) };
                table = _mm256_slli_epi32::<8>(_mm256_cvtepu8_epi32(of_lanes));
            }
            let gather = |symbol| {
                // SAFETY: the encoder saw that each class has its 256 steps.
                unsafe { _mm256_i32gather_epi32::<4>(steps.as_ptr().cast(), _mm256_or_si256(table, symbol)) }
            };
            let mut step = gather(symbol);
            let without = _mm256_cmpeq_epi32(_mm256_and_si256(step, set(0xffff)), zero);
            if _mm256_testz_si256(without, without) == 0 {
                symbol = _mm256_blendv_epi8(symbol, set(u32::from(ESCAPE)), without);
                step = gather(symbol);
                let lost = _mm256_cmpeq_epi32(_mm256_and_si256(step, set(0xffff)), zero);
                backwards.lost |= _mm256_testz_si256(lost, lost) == 0;
            }
            let is_escape = _mm256_cmpeq_epi32(symbol, set(u32::from(ESCAPE)));
            let escapes = _mm256_movemask_ps(_mm256_castsi256_ps(is_escape)) as u32 & 255;
            if escapes != 0 {
                let of_lanes: [u32; 8] = bytemuck::cast(part);
                let lanes = (0..8).rev().filter(|lane| escapes >> lane & 1 == 1);
                backwards.escapes.extend(lanes.map(|lane| of_lanes[lane] as u16));
            }
            let frequency = _mm256_and_si256(step, set(0xffff));
            let x = *state;
            let upper = _mm256_srli_epi32::<{ 32 - PROBABILITY_BITS as i32 }>(x);
            let full = _mm256_cmpgt_epi32(upper, _mm256_sub_epi32(frequency, set(1)));
            let mask = _mm256_movemask_ps(_mm256_castsi256_ps(full)) as usize & 255;
            // SAFETY: an array of eight.
            let given = unsafe { _mm256_loadu_si256(GIVEN[mask].as_ptr().cast()) };
            let lower = _mm256_permutevar8x32_epi32(_mm256_and_si256(x, set(0xffff)), given);
            let lower = _mm_packus_epi32(_mm256_castsi256_si128(lower), _mm256_extracti128_si256::<1>(lower));
            // SAFETY: 40 words below `at` were seen to be there, of which at most 24 are taken so far.
            unsafe { _mm_storeu_si128(backwards.words.as_mut_ptr().add(backwards.at - 8).cast(), lower) };
            backwards.at -= mask.count_ones() as usize;
            let x = _mm256_blendv_epi8(x, _mm256_srli_epi32::<16>(x), full);
            let signed = _mm256_xor_si256(x, set(0x8000_0000));
            let quotient = |x: __m128i, frequency: __m128i| {
                let x = _mm256_add_pd(_mm256_cvtepi32_pd(x), half);
                _mm256_cvttpd_epi32(_mm256_div_pd(x, _mm256_cvtepi32_pd(frequency)))
            };
            let lower = quotient(_mm256_castsi256_si128(signed), _mm256_castsi256_si128(frequency));
            let upper =
                quotient(_mm256_extracti128_si256::<1>(signed), _mm256_extracti128_si256::<1>(frequency));
            let quotient = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(lower), upper);
            let rest = _mm256_mullo_epi32(quotient, _mm256_sub_epi32(set(TOTAL), frequency));
            *state = _mm256_add_epi32(_mm256_add_epi32(x, _mm256_srli_epi32::<16>(step)), rest);
        }
        backwards.left = group * LANES;
    }
    for (state, lanes) in states.iter().zip(backwards.states.chunks_exact_mut(8)) {
        // SAFETY: eight lanes.
        unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), *state) };
    }
}

#[target_feature(enable = "avx2")]
#[allow(unsafe_code)]
fn classes(row: i8, cols: &[i8], shift: u32, last: i8, out: &mut Vec<u8>) {
    let row_all = _mm256_set1_epi16(i16::from(row));
    let (shift_all, last_all) = (_mm_cvtsi32_si128(shift as i32), _mm_set1_epi8(last));
    let sixteens = cols.chunks_exact(16);
    let rest = sixteens.remainder();
    out.reserve(cols.len());
    for cols in sixteens {
        // SAFETY: sixteen columns.
        let cols = unsafe { _mm_loadu_si128(cols.as_ptr().cast()) };
        let sum = _mm256_sra_epi16(_mm256_add_epi16(_mm256_cvtepi8_epi16(cols), row_all), shift_all);
        let bytes = _mm_packus_epi16(_mm256_castsi256_si128(sum), _mm256_extracti128_si256::<1>(sum));
        let bytes: [u8; 16] = bytemuck::cast(_mm_min_epu8(bytes, last_all));
        out.extend_from_slice(&bytes);
    }
    super::classes_one_by_one(row, rest, shift, last, out);
}

/// The fields of four words.
fn fields(stored: Stored) -> u64 {
    u64::from(stored.mask()) * 0x0001_0001_0001_0001
}

#[target_feature(enable = "bmi2")]
fn pack(stored: Stored, words: &[u16], out: &mut Vec<u8>) {
    let (each, fields) = (stored.each(), fields(stored));
    let groups = words.chunks_exact(8);
    let rest = groups.remainder();
    let start = out.len();
    out.resize(start + stored.bytes(words.len() - rest.len()) + 16, 0);
    let mut at = start;
    for group in groups {
        let four = |from: usize| -> u64 {
            let mut four = [0u16; 4];
            four.copy_from_slice(&group[from..from + 4]);
            _pext_u64(bytemuck::cast(four), fields)
        };
        let bits = u128::from(four(0)) | u128::from(four(4)) << (4 * each);
        // Sixteen bytes are written at a time, the later ones again by the next group.
        if let Some(bytes) = out.get_mut(at..at + 16) {
            bytes.copy_from_slice(&bits.to_le_bytes());
        }
        at += each;
    }
    out.truncate(at);
    stored.pack(rest, out);
}

#[target_feature(enable = "bmi2")]
fn unpack(stored: Stored, packed: &[u8], words: &mut [u16]) {
    let (each, fields) = (stored.each(), fields(stored));
    let mut at = 0;
    let mut groups = words.chunks_exact_mut(8);
    for group in groups.by_ref() {
        // Sixteen bytes are read at a time; the last groups are left to the plain code.
        let Some(bytes) = packed.get(at..at + 16) else {
            let mut bytes = [0; 16];
            let left = packed.get(at..).unwrap_or_default();
            bytes[..left.len().min(16)].copy_from_slice(&left[..left.len().min(16)]);
            spread(u128::from_le_bytes(bytes), each, fields, group);
            at += each;
            continue;
        };
        let mut whole = [0; 16];
        whole.copy_from_slice(bytes);
        spread(u128::from_le_bytes(whole), each, fields, group);
        at += each;
    }
    stored.unpack(packed.get(at..).unwrap_or_default(), groups.into_remainder());
}

#[target_feature(enable = "bmi2")]
fn spread(bits: u128, each: usize, fields: u64, group: &mut [u16]) {
    let halves = [bits as u64, (bits >> (4 * each)) as u64];
    for (half, words) in halves.into_iter().zip(group.chunks_exact_mut(4)) {
        let four: [u16; 4] = bytemuck::cast(_pdep_u64(half, fields));
        words.iter_mut().zip(four).for_each(|(word, bits)| *word |= bits);
    }
}
