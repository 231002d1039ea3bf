//! Memory for matrices, in huge pages where the system has them to give.
//!
//! A product of one token reads its matrix once, in order: finding a page anew every 4 KiB takes up to a third of the time.
//! Most matrices fill no huge page by themselves, so those that are made one after the other share a stretch.

use std::alloc::{Layout, alloc, handle_alloc_error};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use bytemuck::Pod;

#[cfg(target_arch = "x86_64")]
use super::isa::Isa;

/// Bytes of a huge page, as most processors have them.
const HUGE: usize = 2 << 20;
/// Bytes of a stretch that matrices share. What is not used of it was never touched.
const STRETCH: usize = 32 << 20;
/// Bytes of a line of the cache: no two values of different matrices lie in one.
const LINE: usize = 64;

/// Values, zero at first.
#[derive(Debug)]
pub struct Room<T> {
    start: NonNull<T>,
    len: usize,
    /// Where they lie, unless there are none.
    _stretch: Option<Arc<Stretch>>,
    _values: PhantomData<T>,
}

// SAFETY: a room's values are its own, like a vector's.
#[allow(unsafe_code)]
unsafe impl<T: Send> Send for Room<T> {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl<T: Sync> Sync for Room<T> {}

impl<T: Pod> Room<T> {
    /// So many zeros.
    #[must_use]
    pub fn new(len: usize) -> Self {
        const { assert!(align_of::<T>() <= LINE) };
        let bytes = len.saturating_mul(size_of::<T>());
        if bytes == 0 {
            return Self { start: NonNull::dangling(), len, _stretch: None, _values: PhantomData };
        }
        let (stretch, at) = take(bytes);
        // SAFETY: these bytes lie in the stretch, are aligned to a line, and were given to nothing else; zeros are values.
        #[allow(unsafe_code)]
        let start = unsafe {
            let start = stretch.start.add(at);
            start.write_bytes(0, bytes);
            start.cast()
        };
        Self { start, len, _stretch: Some(stretch), _values: PhantomData }
    }

    /// Those of a slice.
    #[must_use]
    pub fn of(values: &[T]) -> Self {
        let mut room = Self::new(values.len());
        room.copy_from_slice(values);
        room
    }
}

impl<T> Deref for Room<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: so many values begin there, and they are this room's.
        #[allow(unsafe_code)]
        unsafe {
            std::slice::from_raw_parts(self.start.as_ptr(), self.len)
        }
    }
}

impl<T> DerefMut for Room<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above.
        #[allow(unsafe_code)]
        unsafe {
            std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len)
        }
    }
}

/// Memory that is given away piece by piece, and given back when all of its rooms are gone.
#[derive(Debug)]
struct Stretch {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: memory of no thread; what lies in it is looked after by rooms.
#[allow(unsafe_code)]
unsafe impl Send for Stretch {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for Stretch {}

impl Stretch {
    fn new(bytes: usize) -> Self {
        // Bytes are those of values that a stored matrix has: far from all that can be addressed.
        let layout = Layout::from_size_align(bytes, HUGE).unwrap_or(Layout::new::<u8>());
        if layout.size() < bytes {
            handle_alloc_error(layout);
        }
        // SAFETY: there is at least one byte.
        #[allow(unsafe_code)]
        let Some(start) = NonNull::new(unsafe { alloc(layout) }) else { handle_alloc_error(layout) };
        #[cfg(target_os = "linux")]
        advise(start, bytes);
        Self { start, layout }
    }
}

impl Drop for Stretch {
    fn drop(&mut self) {
        // SAFETY: as it was allocated; no room is left.
        #[allow(unsafe_code)]
        unsafe {
            std::alloc::dealloc(self.start.as_ptr(), self.layout);
        }
    }
}

/// Says of all whole huge pages that they may be such. That it is not heard changes no value.
#[cfg(target_os = "linux")]
fn advise(start: NonNull<u8>, bytes: usize) {
    use rustix::mm::{Advice, madvise};

    let whole = bytes / HUGE * HUGE;
    if whole > 0 {
        // SAFETY: the advice changes how these bytes, which are ours, are mapped, not what they are.
        #[allow(unsafe_code)]
        let _ = unsafe { madvise(start.as_ptr().cast(), whole, Advice::LinuxHugepage) };
    }
}

/// The stretch that is being filled, and how far it is.
static OPEN: Mutex<(Weak<Stretch>, usize)> = Mutex::new((Weak::new(), 0));

/// Bytes of a stretch that nothing else has or will have, and where in it they begin.
fn take(bytes: usize) -> (Arc<Stretch>, usize) {
    if bytes > STRETCH / 4 {
        return (Arc::new(Stretch::new(bytes)), 0);
    }
    let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    let (weak, used) = &mut *open;
    let stretch = match weak.upgrade().filter(|_| *used + bytes <= STRETCH) {
        Some(stretch) => stretch,
        None => {
            let stretch = Arc::new(Stretch::new(STRETCH));
            (*weak, *used) = (Arc::downgrade(&stretch), 0);
            stretch
        }
    };
    let at = *used;
    *used = (at + bytes).next_multiple_of(LINE);
    (stretch, at)
}

/// The sum of all words, in steps wide enough that reading them is what takes the time.
#[must_use]
pub fn sum(words: &[u64]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if Isa::detect() != Isa::Portable {
        // SAFETY: the instructions were detected.
        #[allow(unsafe_code)]
        return unsafe { sum_avx2(words) };
    }
    words.iter().fold(0, |a, b| a.wrapping_add(*b))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn sum_avx2(words: &[u64]) -> u64 {
    use std::arch::x86_64::{_mm256_add_epi64, _mm256_setzero_si256};

    let mut sums = [_mm256_setzero_si256(); 8];
    let (steps, rest) = words.as_chunks::<32>();
    for step in steps {
        for (sum, part) in sums.iter_mut().zip(step.as_chunks::<4>().0) {
            *sum = _mm256_add_epi64(*sum, bytemuck::cast(*part));
        }
    }
    let sums: [[u64; 4]; 8] = bytemuck::cast(sums);
    sums.as_flattened().iter().chain(rest).fold(0, |a, b| a.wrapping_add(*b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rooms_share_no_byte_and_begin_as_zeros() {
        let sizes = [0, 1, 63, 64, 65, 4096, STRETCH / 4 - 1, STRETCH / 4, STRETCH / 4 + 1, STRETCH + 5];
        for round in 0..3u8 {
            let mut rooms: Vec<Room<u8>> = sizes.iter().map(|len| Room::new(*len)).collect();
            for (i, room) in rooms.iter_mut().enumerate() {
                assert!(room.iter().all(|byte| *byte == 0), "{round} {i}");
                assert_eq!(room.as_ptr().align_offset(if room.is_empty() { 1 } else { LINE }), 0);
                room.fill(i as u8 + 1);
            }
            for (i, (room, len)) in rooms.iter().zip(sizes).enumerate() {
                assert_eq!(room.len(), len);
                assert!(room.iter().all(|byte| usize::from(*byte) == i + 1));
            }
        }
    }

    #[test]
    fn every_word_is_read_once() {
        for len in [0, 1, 31, 32, 33, 1000] {
            let words: Vec<u64> = (0..len).map(|i| (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect();
            assert_eq!(sum(&words), words.iter().fold(0, |a: u64, b| a.wrapping_add(*b)), "{len}");
        }
    }

    #[test]
    fn rooms_of_many_threads_share_no_byte() {
        std::thread::scope(|scope| {
            for thread in 0..4u32 {
                scope.spawn(move || {
                    let rooms: Vec<Room<u32>> =
                        (0..200).map(|i| Room::of(&vec![thread * 1000 + i; 37 * (1 + i as usize)])).collect();
                    for (i, room) in rooms.iter().enumerate() {
                        assert!(room.iter().all(|value| *value == thread * 1000 + i as u32));
                    }
                });
            }
        });
    }
}
