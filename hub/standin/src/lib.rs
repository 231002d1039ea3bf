//! A hub on loopback that serves one directory as one repository, and misbehaves as told.
//!
//! ```text
//! GET  /api/models/NAME/revision/REVISION?blobs=true    commit, files, sizes, digests
//! GET  /NAME/resolve/COMMIT/FILE                        small files; of weights: 302 to another host, as hubs do
//! GET  http://localhost:PORT/cdn/FILE                   weights, by ranges
//! ```

#![allow(clippy::expect_used, clippy::unwrap_used)] // It serves tests alone.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use sha1::Sha1;
use sha2::{Digest, Sha256};

/// The commit that every revision is.
pub const COMMIT: &str = "0c0ffee00c0ffee00c0ffee00c0ffee00c0ffee0";

/// What goes wrong.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// Every connection that sends weights is cut after so many bytes of them.
    pub cut_after: Option<usize>,
    /// So many requests at first are answered with 503.
    pub busy: u32,
    /// Ranges are ignored: files are sent whole.
    pub no_ranges: bool,
    /// The first answer with a byte of this file has it wrong; all, where it is said twice.
    pub garbled: Vec<String>,
    /// Who does not send this token is refused.
    pub token: Option<String>,
    /// The listing names files alone.
    pub names_only: bool,
    /// More bytes are sent of every file than it has.
    pub too_long: bool,
    /// Each answer of weights takes so many milliseconds for each 64 KiB.
    pub slow: u64,
}

/// A request that came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Its path.
    pub path: String,
    /// The header `Range`.
    pub range: Option<String>,
    /// Whether it brought a token.
    pub with_token: bool,
}

/// The server; it ends with the process.
pub struct Server {
    port: u16,
    state: Arc<State>,
}

struct State {
    repository: String,
    files: BTreeMap<String, Vec<u8>>,
    port: u16,
    now: Mutex<Now>,
}

#[derive(Default)]
struct Now {
    faults: Faults,
    asked: Vec<Asked>,
    sent: u64,
}

impl Server {
    /// Serves the files of a directory, and of its folders.
    pub fn start(repository: &str, dir: &Path, faults: Faults) -> Self {
        let mut files = BTreeMap::new();
        collect(dir, "", &mut files);
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port on loopback");
        let port = listener.local_addr().expect("its address").port();
        let now = Mutex::new(Now { faults, ..Now::default() });
        let state = Arc::new(State { repository: repository.to_owned(), files, port, now });
        let of_threads = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = of_threads.clone();
                std::thread::spawn(move || state.answer(stream));
            }
        });
        Self { port, state }
    }

    /// What `HF_ENDPOINT` is to be.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The requests so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.state.now().asked.clone()
    }

    /// Bytes of weights that were sent so far.
    pub fn sent(&self) -> u64 {
        self.state.now().sent
    }

    /// What goes wrong from now on.
    pub fn set(&self, faults: Faults) {
        self.state.now().faults = faults;
    }
}

fn collect(dir: &Path, prefix: &str, files: &mut BTreeMap<String, Vec<u8>>) {
    for entry in std::fs::read_dir(dir).expect("the directory to serve").flatten() {
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        match entry.path().is_dir() {
            true => collect(&entry.path(), &format!("{name}/"), files),
            false => drop(files.insert(name, std::fs::read(entry.path()).expect("a file to serve"))),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn git(content: &[u8]) -> String {
    let mut sha = Sha1::new();
    sha.update(format!("blob {}\0", content.len()));
    sha.update(content);
    hex(&sha.finalize())
}

/// Whether a hub keeps a file as a large one.
fn is_large(name: &str) -> bool {
    [".safetensors", ".bin", ".gguf"].iter().any(|end| name.ends_with(end))
}

impl State {
    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn answer(&self, stream: TcpStream) {
        let mut reader = BufReader::new(stream.try_clone().expect("a second handle"));
        let (mut line, mut head) = (String::new(), Vec::new());
        while reader.read_line(&mut line).is_ok_and(|count| count > 2) {
            head.push(std::mem::take(&mut line).trim_end().to_owned());
        }
        let mut words = head.first().map_or("", String::as_str).split(' ');
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let field = |name: &str| {
            let fields = head.iter().skip(1).filter_map(|line| line.split_once(": "));
            fields.filter(|field| field.0.eq_ignore_ascii_case(name)).map(|field| field.1.to_owned()).next()
        };
        let (range, token) = (field("range"), field("authorization"));
        let faults = {
            let mut now = self.now();
            now.asked.push(Asked {
                path: path.to_owned(),
                range: range.clone(),
                with_token: token.is_some(),
            });
            let faults = now.faults.clone();
            now.faults.busy = faults.busy.saturating_sub(1);
            faults
        };
        let _ = self.send(stream, (method, path), (range, token), &faults);
    }

    fn send(
        &self,
        mut out: TcpStream,
        (method, path): (&str, &str),
        (range, token): (Option<String>, Option<String>),
        faults: &Faults,
    ) -> std::io::Result<()> {
        if faults.busy > 0 {
            return out.write_all(
                b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
            );
        }
        if let Some(name) = path.strip_prefix("/cdn/") {
            let Some(content) = self.files.get(name) else { return nothing(&mut out) };
            return self.weights(out, (name, content), range.as_deref(), faults);
        }
        let wanted = faults.token.as_ref().map(|token| format!("Bearer {token}"));
        if wanted.is_some_and(|wanted| token != Some(wanted)) {
            return out
                .write_all(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        }
        let repository = &self.repository;
        if path.starts_with(&format!("/api/models/{repository}/revision/")) {
            let body = self.listing(faults.names_only);
            let head =
                format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
            return out.write_all(head.as_bytes()).and_then(|()| out.write_all(body.as_bytes()));
        }
        let name = path.strip_prefix(&format!("/{repository}/resolve/{COMMIT}/")).unwrap_or_default();
        let Some(content) = self.files.get(name) else { return nothing(&mut out) };
        if is_large(name) {
            let head = format!(
                "HTTP/1.1 302 Found\r\nLocation: http://localhost:{}/cdn/{name}\r\nX-Linked-Size: {}\r\n\
                 X-Linked-Etag: \"{}\"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
                self.port,
                content.len(),
                hex(&Sha256::digest(content))
            );
            return out.write_all(head.as_bytes());
        }
        let head = format!(
            "HTTP/1.1 200 OK\r\nETag: \"{}\"\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            git(content),
            content.len()
        );
        out.write_all(head.as_bytes())?;
        if method == "HEAD" { Ok(()) } else { out.write_all(content) }
    }

    fn listing(&self, names_only: bool) -> String {
        let sibling = |(name, content): (&String, &Vec<u8>)| match (names_only, is_large(name)) {
            (true, _) => serde_json::json!({"rfilename": name}),
            (false, true) => serde_json::json!({
                "rfilename": name, "size": content.len(), "blobId": git(b"a pointer"),
                "lfs": {"sha256": hex(&Sha256::digest(content)), "size": content.len(), "pointerSize": 134},
            }),
            (false, false) => {
                serde_json::json!({"rfilename": name, "size": content.len(), "blobId": git(content)})
            }
        };
        let siblings: Vec<_> = self.files.iter().map(sibling).collect();
        serde_json::json!({"sha": COMMIT, "siblings": siblings}).to_string()
    }

    fn weights(
        &self,
        mut out: TcpStream,
        (name, content): (&str, &[u8]),
        range: Option<&str>,
        faults: &Faults,
    ) -> std::io::Result<()> {
        let bounds = range
            .filter(|_| !faults.no_ranges)
            .and_then(|range| range.strip_prefix("bytes=")?.split_once('-'));
        let (from, to) = match bounds {
            Some((from, last)) => {
                let to = last.parse::<usize>().map_or(content.len(), |last| content.len().min(last + 1));
                (from.parse::<usize>().unwrap_or(0), to)
            }
            None => (0, content.len()),
        };
        if from >= to && !content.is_empty() {
            return out.write_all(
                b"HTTP/1.1 416 Range Not Satisfiable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
            );
        }
        let mut body = content[from..to].to_vec();
        let garbled = {
            let mut now = self.now();
            let at = now.faults.garbled.iter().position(|garbled| garbled == name);
            // Said twice it stays.
            if let Some(at) =
                at.filter(|_| faults.garbled.iter().filter(|garbled| *garbled == name).count() == 1)
            {
                now.faults.garbled.remove(at);
            }
            at.is_some()
        };
        if let Some(byte) = body.last_mut().filter(|_| garbled) {
            *byte ^= 1;
        }
        if faults.too_long {
            body.extend([0; 100]);
        }
        let status = match bounds {
            Some(_) => format!(
                "206 Partial Content\r\nContent-Range: bytes {from}-{}/{}",
                to.max(1) - 1,
                content.len()
            ),
            None => "200 OK".to_owned(),
        };
        let head =
            format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
        out.write_all(head.as_bytes())?;
        let end = faults.cut_after.unwrap_or(usize::MAX).min(body.len());
        for piece in body[..end].chunks(1 << 16) {
            out.write_all(piece)?;
            self.now().sent += piece.len() as u64;
            std::thread::sleep(std::time::Duration::from_millis(faults.slow));
        }
        Ok(())
    }
}

fn nothing(out: &mut TcpStream) -> std::io::Result<()> {
    out.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
}
