//! A file that is cut short while it is mapped ends the program with an error that names it.
//!
//! ```text
//! touch a page past the new end --> SIGBUS --> address --> /proc/self/maps --> file --> "error: FILE: ...", exit 1
//! ```
//!
//! Everything here may run inside a signal handler: no allocation, no locks, system calls only.

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether errors are wanted as JSON.
static JSON: AtomicBool = AtomicBool::new(false);
/// Whether a thread says it already: several may read the file.
static SAID: AtomicBool = AtomicBool::new(false);
/// The longest path of Linux.
const PATH_BYTES: usize = 4096;

/// Installs the handler for the whole process.
pub(crate) fn install(json: bool) {
    JSON.store(json, Ordering::Relaxed);
    #[allow(unsafe_code)]
    // SAFETY: `sigaction` is plain data for which zeros are valid; the handler only makes async-signal-safe calls.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = handle;
        action.sa_sigaction = handler as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigemptyset(&mut action.sa_mask);
        libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut());
    }
}

extern "C" fn handle(signal: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
    #[allow(unsafe_code)]
    // SAFETY: with SA_SIGINFO the system passes a valid `info`, and SIGBUS fills in the address.
    let address = unsafe { (*info).si_addr() } as usize;
    let mut path = [0; PATH_BYTES];
    match mapped_file(address, &mut path) {
        Some(length) => {
            if SAID.swap(true, Ordering::AcqRel) {
                // The thread that says it ends the process.
                loop {
                    #[allow(unsafe_code)]
                    // SAFETY: async-signal-safe by POSIX.
                    unsafe {
                        libc::pause();
                    }
                }
            }
            say(&path[..length]);
            #[allow(unsafe_code)]
            // SAFETY: ends the process at once.
            unsafe {
                libc::_exit(1)
            }
        }
        // No file's: a fault of the machine. It strikes again, with the system's own answer.
        None => {
            #[allow(unsafe_code)]
            // SAFETY: async-signal-safe by POSIX.
            unsafe {
                libc::signal(signal, libc::SIG_DFL);
            }
        }
    }
}

/// Writes the error to stderr.
fn say(path: &[u8]) {
    const WHAT: &[u8] =
        b": was cut short while it was read: get a good copy of it and let nobody write to it";
    let json = JSON.load(Ordering::Relaxed);
    write(if json { b"{\"error\":{\"kind\":\"io\",\"message\":\"" } else { b"error: " });
    for &byte in path {
        match byte {
            // Control characters of a name are not passed on, in whatever form.
            0..=31 | 127 => write(b"?"),
            b'"' | b'\\' if json => write(&[b'\\', byte]),
            _ => write(&[byte]),
        }
    }
    write(WHAT);
    write(if json { b"\"}}\n" } else { b"\n" });
}

fn write(bytes: &[u8]) {
    #[allow(unsafe_code)]
    // SAFETY: the pointer and the length are those of a slice.
    unsafe {
        libc::write(libc::STDERR_FILENO, bytes.as_ptr().cast(), bytes.len());
    }
}

/// The file that is mapped at an address: its path goes to `path`, and its length is returned.
fn mapped_file(address: usize, path: &mut [u8; PATH_BYTES]) -> Option<usize> {
    #[allow(unsafe_code)]
    // SAFETY: the name ends in a zero byte.
    let maps = unsafe { libc::open(c"/proc/self/maps".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
    if maps < 0 {
        return None;
    }
    let mut search = Search::new(address, path);
    let mut buffer = [0u8; 1024];
    loop {
        #[allow(unsafe_code)]
        // SAFETY: the pointer and the length are those of the buffer.
        let read = unsafe { libc::read(maps, buffer.as_mut_ptr().cast(), buffer.len()) };
        let read = usize::try_from(read).ok().filter(|&n| n > 0)?;
        for &byte in &buffer[..read] {
            if let Some(found) = search.push(byte) {
                return found;
            }
        }
    }
}

/// Reads lines such as `7f00-7f10 r--p 00000000 08:01 1234    /path`, byte by byte.
struct Search<'a> {
    address: usize,
    path: &'a mut [u8; PATH_BYTES],
    bounds: [usize; 2],
    field: Field,
    length: usize,
}

#[derive(Clone, Copy, PartialEq)]
enum Field {
    Start,
    End,
    Between,
    Path,
}

impl<'a> Search<'a> {
    fn new(address: usize, path: &'a mut [u8; PATH_BYTES]) -> Self {
        Self { address, path, bounds: [0; 2], field: Field::Start, length: 0 }
    }

    /// `Some` at the end of the line that holds the address: the length of its path, if it has one.
    fn push(&mut self, byte: u8) -> Option<Option<usize>> {
        if byte == b'\n' {
            let [start, end] = self.bounds;
            if (start..end).contains(&self.address) {
                return Some(Some(self.length).filter(|&n| n > 0));
            }
            (self.bounds, self.field, self.length) = ([0; 2], Field::Start, 0);
            return None;
        }
        match (self.field, byte) {
            (Field::Start, b'-') => self.field = Field::End,
            (Field::End, b' ') => self.field = Field::Between,
            (Field::Start | Field::End, digit) => {
                let bound = &mut self.bounds[usize::from(self.field == Field::End)];
                *bound =
                    bound.wrapping_mul(16).wrapping_add((digit as char).to_digit(16).unwrap_or(0) as usize);
            }
            (Field::Between, b'/') | (Field::Path, _) => {
                self.field = Field::Path;
                if let Some(place) = self.path.get_mut(self.length) {
                    *place = byte;
                    self.length += 1;
                }
            }
            (Field::Between, _) => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_at_an_address_is_found() {
        let maps = b"1000-2000 r--p 00000000 08:01 1   /a/b c\n2000-3000 rw-p 00000000 00:00 0 \nff00-ff80 r--s 0 08:01 7 /x\n";
        let find = |address: usize| {
            let mut path = [0; PATH_BYTES];
            let mut search = Search::new(address, &mut path);
            let found = maps.iter().find_map(|&b| search.push(b)).flatten();
            found.map(|length| String::from_utf8(path[..length].to_vec()).unwrap())
        };
        assert_eq!(find(0x1fff).as_deref(), Some("/a/b c"));
        assert_eq!(find(0x2000), None);
        assert_eq!(find(0xff00).as_deref(), Some("/x"));
        assert_eq!(find(0x9999), None);
    }
}
