//! Checkpoints by name, from a hub that misbehaves.

#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use llmpress_formats::{Checkpoint, ShardFile};
use llmpress_hub::{Error, Headers, Hub, Id, Progress, Settings};
use llmpress_hub_standin::{COMMIT, Faults, Server};

/// Bytes of each of the two files of weights.
const WEIGHTS: usize = 700_000;

#[derive(Default)]
struct Count {
    total: AtomicU64,
    done: AtomicU64,
}

impl Progress for Count {
    fn total(&self, bytes: u64) {
        self.total.store(bytes, Ordering::Relaxed);
    }
    fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }
    fn retreat(&self, bytes: u64) {
        self.done.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// A repository of two shards, with what hubs have beside them.
fn repository(dir: &Path) {
    let write = |name: &str, bytes: &[u8]| {
        let path = dir.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    };
    let shard = |tensor: &str, seed: u8| {
        let header =
            format!(r#"{{"{tensor}":{{"dtype":"U8","shape":[{WEIGHTS}],"data_offsets":[0,{WEIGHTS}]}}}}"#);
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend((0..WEIGHTS).map(|i| (i as u8).wrapping_mul(31) ^ (i >> 8) as u8 ^ seed));
        bytes
    };
    write("model-00001-of-00002.safetensors", &shard("a", 1));
    write("model-00002-of-00002.safetensors", &shard("b", 2));
    let map = format!(
        r#"{{"metadata":{{"total_size":{}}},"weight_map":{{"a":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors"}}}}"#,
        2 * WEIGHTS
    );
    write("model.safetensors.index.json", map.as_bytes());
    write("config.json", br#"{"model_type":"unheard"}"#);
    write("README.md", b"# A model\n");
    write(".gitattributes", b"*.safetensors filter=lfs\n");
    write("pytorch_model.bin", &[7; 5000]);
    write("consolidated.safetensors", &shard("all", 3));
    write("onnx/model.onnx", &[8; 5000]);
}

struct Case {
    server: Server,
    dirs: [tempfile::TempDir; 2],
}

impl Case {
    fn new(faults: Faults) -> Self {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        repository(dirs[0].path());
        Self { server: Server::start("org/name", dirs[0].path(), faults), dirs }
    }

    fn settings(&self) -> Settings {
        Settings {
            endpoint: self.server.endpoint(),
            token: None,
            cache: self.dirs[1].path().join("hub"),
            offline: false,
            patience: Duration::from_millis(1),
        }
    }

    fn hub(&self) -> Hub {
        Hub::new(self.settings())
    }

    fn original(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.dirs[0].path().join(name)).unwrap()
    }

    fn blobs(&self) -> Vec<String> {
        let blobs = self.dirs[1].path().join("hub/models--org--name/blobs");
        let Ok(entries) = std::fs::read_dir(blobs) else { return Vec::new() };
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// The files of a snapshot hold what those of the repository do, as far as they count.
    fn check(&self, path: &Path) {
        let mut names: Vec<String> =
            std::fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        let wanted = [
            "README.md",
            "config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
        ];
        assert_eq!(names, wanted);
        for name in wanted {
            assert_eq!(std::fs::read(path.join(name)).unwrap(), self.original(name), "{name}");
        }
        assert!(self.blobs().iter().all(|name| !name.ends_with(".incomplete")));
    }
}

fn id() -> Id {
    "org/name".parse().unwrap()
}

#[test]
fn a_snapshot_is_the_repository_as_far_as_it_counts_and_lies_where_other_tools_look() {
    let case = Case::new(Faults::default());
    let count = Count::default();
    let snapshot = case.hub().snapshot(&id(), &count).unwrap();
    case.check(&snapshot.path);
    let repository = case.dirs[1].path().join("hub/models--org--name");
    assert_eq!(snapshot.path, repository.join("snapshots").join(COMMIT));
    assert_eq!(std::fs::read_to_string(repository.join("refs/main")).unwrap(), COMMIT);
    let link = std::fs::read_link(snapshot.path.join("config.json")).unwrap();
    assert!(link.starts_with("../../blobs"), "{link:?}");
    assert_eq!(count.done.load(Ordering::Relaxed), count.total.load(Ordering::Relaxed));
    // Neither second copies nor other formats were asked for, but for headers.
    let asked = case.server.asked();
    assert!(asked.iter().all(|asked| !asked.path.contains("pytorch_model") && !asked.path.contains("onnx")));
    assert!(case.server.sent() < 2 * WEIGHTS as u64 + 4 * (256 << 10));
    // A second time nothing large is.
    let before = case.server.sent();
    assert_eq!(case.hub().snapshot(&id(), &Count::default()).unwrap().path, snapshot.path);
    assert!(case.server.sent() - before <= 3 * (256 << 10));
}

#[test]
fn connections_that_break_are_gone_on_with_where_they_broke() {
    let case = Case::new(Faults { cut_after: Some(300_000), busy: 2, ..Faults::default() });
    let snapshot = case.hub().snapshot(&id(), &Count::default()).unwrap();
    case.check(&snapshot.path);
    let ranges: Vec<String> = case.server.asked().into_iter().filter_map(|asked| asked.range).collect();
    assert!(ranges.iter().any(|range| range == "bytes=300000-"), "{ranges:?}");
    // No byte twice, but for headers.
    assert!(case.server.sent() <= 2 * (WEIGHTS as u64 + 200) + 3 * (256 << 10), "{}", case.server.sent());
}

#[test]
fn what_an_earlier_run_left_is_gone_on_with() {
    let case = Case::new(Faults { cut_after: Some(0), ..Faults::default() });
    // Headers come, then nothing more does: small ranges are allowed for.
    case.server.set(Faults { cut_after: Some(262_144), ..Faults::default() });
    let first = Settings { patience: Duration::ZERO, ..case.settings() };
    let hub = Hub::new(first);
    assert!(hub.headers(&id()).is_ok());
    let name = "model-00001-of-00002.safetensors";
    let whole = case.original(name);
    let snapshot = hub.snapshot(&id(), &Count::default()).unwrap();
    let blob = std::fs::canonicalize(snapshot.path.join(name)).unwrap();
    let partial = PathBuf::from(format!("{}.incomplete", blob.display()));
    for (left, sent) in
        [(&whole[..500_000], whole.len() - 500_000), (&whole[..0], whole.len()), (&[9; 100][..], whole.len())]
    {
        std::fs::remove_file(&blob).unwrap();
        std::fs::write(&partial, left).unwrap();
        case.server.set(Faults::default());
        let before = case.server.sent();
        case.check(&case.hub().snapshot(&id(), &Count::default()).unwrap().path);
        let sent_now = (case.server.sent() - before) as usize;
        // Wrong bytes are found out at the end: then all comes again.
        let most = if left == [9; 100] { 2 * sent } else { sent };
        assert!(sent_now <= most + 3 * (256 << 10), "{sent_now} of {most}");
    }
}

#[test]
fn what_is_not_what_the_hub_says_is_never_taken() {
    let name = "model-00002-of-00002.safetensors".to_owned();
    let once = Case::new(Faults::default());
    once.server.set(Faults { garbled: vec![name.clone()], ..Faults::default() });
    once.check(&once.hub().snapshot(&id(), &Count::default()).unwrap().path);
    let always = Case::new(Faults { garbled: vec![name.clone(), name.clone()], ..Faults::default() });
    let error = always.hub().snapshot(&id(), &Count::default()).unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }) && error.to_string().contains(&name), "{error}");
    assert!(!always.dirs[1].path().join("hub/models--org--name/snapshots").exists());
    let long = Case::new(Faults { too_long: true, ..Faults::default() });
    assert!(matches!(long.hub().snapshot(&id(), &Count::default()), Err(Error::Corrupt { .. })));
}

#[test]
fn a_hub_without_ranges_or_digests_serves_too() {
    for faults in
        [Faults { no_ranges: true, ..Faults::default() }, Faults { names_only: true, ..Faults::default() }]
    {
        let case = Case::new(faults);
        case.check(&case.hub().snapshot(&id(), &Count::default()).unwrap().path);
    }
}

#[test]
fn the_token_is_told_to_the_hub_and_to_nobody_else() {
    let case = Case::new(Faults { token: Some("hf_secret".to_owned()), ..Faults::default() });
    let error = case.hub().snapshot(&id(), &Count::default()).unwrap_err();
    assert!(
        matches!(error, Error::Refused { status: 401, .. }) && error.to_string().contains("HF_TOKEN"),
        "{error}"
    );
    let settings = Settings { token: Some("hf_secret".to_owned()), ..case.settings() };
    case.check(&Hub::new(settings).snapshot(&id(), &Count::default()).unwrap().path);
    let to_others: Vec<_> =
        case.server.asked().into_iter().filter(|asked| asked.path.starts_with("/cdn/")).collect();
    assert!(!to_others.is_empty() && to_others.iter().all(|asked| !asked.with_token));
}

#[test]
fn headers_alone_open_like_the_checkpoint_and_take_no_weights() {
    let case = Case::new(Faults::default());
    let headers = case.hub().headers(&id()).unwrap();
    let (there, here) =
        (Checkpoint::open(headers.path()).unwrap(), Checkpoint::open(case.dirs[0].path()).unwrap());
    assert!(matches!(headers, Headers::Shell(_)) && headers.path().ends_with("org/name"));
    let names = |checkpoint: &Checkpoint| checkpoint.tensors().keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&there), names(&here));
    let entries = |checkpoint: &Checkpoint| -> Vec<_> {
        checkpoint.directory().shards().iter().map(|shard: &ShardFile| shard.entry().unwrap()).collect()
    };
    assert_eq!(entries(&there), entries(&here));
    assert!(case.server.sent() <= 3 * (256 << 10));
    let path = headers.path().to_owned();
    drop((there, headers));
    assert!(!path.exists());
}

/// A repository of torch's files alone; the last storage of each part is so much longer than its tensor.
fn of_torch(dir: &Path, longer: usize) {
    repository(dir);
    for name in ["model-00001-of-00002", "model-00002-of-00002", "consolidated"] {
        std::fs::remove_file(dir.join(format!("{name}.safetensors"))).unwrap();
    }
    for name in ["model.safetensors.index.json", "pytorch_model.bin"] {
        std::fs::remove_file(dir.join(name)).unwrap();
    }
    let parts = Path::new(env!("CARGO_MANIFEST_DIR")).join("../formats/tests/torch/parts");
    for entry in std::fs::read_dir(parts).unwrap().map(|entry| entry.unwrap()) {
        let (name, bytes) = (entry.file_name(), std::fs::read(entry.path()).unwrap());
        let to = dir.join(&name);
        match longer {
            0 => std::fs::write(to, bytes).unwrap(),
            _ if name.to_string_lossy().ends_with(".json") => std::fs::write(to, bytes).unwrap(),
            _ => std::fs::write(to, lengthened(&bytes, longer)).unwrap(),
        }
    }
}

/// The same archive with longer storages, and a comment as long as comments get.
fn lengthened(archive: &[u8], longer: usize) -> Vec<u8> {
    let archive = rawzip::ZipArchive::from_slice(archive).unwrap();
    let mut out = rawzip::ZipArchiveWriter::new(Vec::new());
    for record in archive.entries() {
        let record = record.unwrap();
        let name = String::from_utf8(record.file_path().as_bytes().to_vec()).unwrap();
        let mut data = archive.get_entry(record.wayfinder()).unwrap().data().to_vec();
        if name.contains("/data/") {
            data.extend((0..longer).map(|i| i as u8));
        }
        let (mut entry, config) = out.new_file(name.as_str()).start().unwrap();
        let mut writer = config.wrap(&mut entry);
        writer.write_all(&data).unwrap();
        let (_, descriptor) = writer.finish().unwrap();
        entry.finish(descriptor).unwrap();
    }
    out.set_comment(vec![b'.'; 65_535]);
    out.finish().unwrap()
}

#[test]
fn where_there_are_no_safetensors_the_headers_of_torch_tell_its_tensors_without_storages() {
    for (longer, most) in [(0, 6_000), (1_000_000, 2 * (384 << 10) + 6_000)] {
        let case = Case::new(Faults::default());
        let dir = tempfile::tempdir().unwrap();
        of_torch(dir.path(), longer);
        std::fs::write(dir.path().join("pytorch_model.fp32-00001-of-00009.bin"), [7; 500]).unwrap();
        let server = Server::start("org/name", dir.path(), Faults::default());
        let hub = Hub::new(Settings { endpoint: server.endpoint(), ..case.settings() });
        let headers = hub.headers(&id()).unwrap();
        let entries = |path: &Path| -> Vec<_> {
            let checkpoint = Checkpoint::open(path).unwrap();
            let shards = checkpoint.directory().shards().iter();
            shards.map(|shard: &ShardFile| shard.entry().unwrap()).collect()
        };
        assert!(matches!(headers, Headers::Shell(_)));
        assert_eq!(entries(headers.path()), entries(dir.path()));
        assert!(server.sent() <= most, "{}", server.sent());
        // And whole: what the headers name, and nothing else.
        let snapshot = hub.snapshot(&id(), &Count::default()).unwrap();
        for part in ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"] {
            let (there, here) = (dir.path().join(part), snapshot.path.join(part));
            assert!(std::fs::read(there).unwrap() == std::fs::read(here).unwrap());
        }
        assert!(!snapshot.path.join("pytorch_model.fp32-00001-of-00009.bin").exists());
        assert!(server.asked().iter().all(|a| !a.path.contains("onnx")));
    }
}

#[test]
fn files_of_torch_that_are_none_are_found_before_anything_large_is_downloaded() {
    let case = Case::new(Faults::default());
    let dir = tempfile::tempdir().unwrap();
    of_torch(dir.path(), 0);
    let part = dir.path().join("pytorch_model-00002-of-00002.bin");
    let whole = lengthened(&std::fs::read(&part).unwrap(), 1_000_000);
    let mut broken = whole.clone();
    let directory = broken.windows(4).rposition(|four| four == b"PK\x01\x02").unwrap();
    broken[directory] = 0;
    for bytes in [vec![7; 2_000_000], whole[..900_000].to_vec(), broken, vec![]] {
        std::fs::write(&part, &bytes).unwrap();
        let server = Server::start("org/name", dir.path(), Faults::default());
        let hub = Hub::new(Settings { endpoint: server.endpoint(), ..case.settings() });
        let error = hub.snapshot(&id(), &Count::default()).unwrap_err().to_string();
        assert!(error.contains("pytorch_model-00002-of-00002.bin"), "{error}");
        assert!(server.sent() < 600_000, "{}", server.sent());
    }
}

#[test]
fn a_shard_that_is_missing_is_found_before_anything_large_is_downloaded() {
    let case = Case::new(Faults::default());
    let dir = tempfile::tempdir().unwrap();
    repository(dir.path());
    std::fs::remove_file(dir.path().join("model-00002-of-00002.safetensors")).unwrap();
    let server = Server::start("org/name", dir.path(), Faults::default());
    let settings = Settings { endpoint: server.endpoint(), ..case.settings() };
    let error = Hub::new(settings).snapshot(&id(), &Count::default()).unwrap_err();
    assert!(error.to_string().contains("model-00002-of-00002.safetensors"), "{error}");
    assert!(server.sent() <= 2 * (256 << 10));
}

#[test]
fn without_a_hub_the_cache_serves_and_says_so() {
    let case = Case::new(Faults::default());
    let offline = || Hub::new(Settings { offline: true, ..case.settings() });
    let error = offline().snapshot(&id(), &Count::default()).unwrap_err();
    assert!(error.to_string().contains("HF_HUB_OFFLINE"), "{error}");
    let gone = || Hub::new(Settings { endpoint: "http://127.0.0.1:9".to_owned(), ..case.settings() });
    let error = gone().snapshot(&id(), &Count::default()).unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    let first = case.hub().snapshot(&id(), &Count::default()).unwrap();
    let asked = case.server.asked().len();
    let second = offline().snapshot(&id(), &Count::default()).unwrap();
    assert_eq!(
        (&second.path, second.unasked.as_ref(), case.server.asked().len()),
        (&first.path, None, asked)
    );
    let third = gone().snapshot(&id(), &Count::default()).unwrap();
    assert!(third.path == first.path && third.unasked.is_some());
    assert!(
        matches!(gone().headers(&id()).unwrap(), Headers::Whole(snapshot) if snapshot.path == first.path)
    );
}

#[test]
fn what_is_not_there_is_said_to_be() {
    let case = Case::new(Faults::default());
    let error = case.hub().snapshot(&"org/other".parse().unwrap(), &Count::default()).unwrap_err();
    assert!(
        matches!(error, Error::Refused { status: 404, .. }) && error.to_string().contains("org/other"),
        "{error}"
    );
}

#[test]
fn two_that_download_the_same_at_once_both_have_it() {
    let case = Case::new(Faults { slow: 2, ..Faults::default() });
    let both: Vec<PathBuf> = std::thread::scope(|scope| {
        let one = || case.hub().snapshot(&id(), &Count::default()).unwrap().path;
        let both = [scope.spawn(one), scope.spawn(one)];
        both.map(|thread| thread.join().unwrap()).to_vec()
    });
    assert_eq!(both[0], both[1]);
    case.check(&both[0]);
    assert!(case.server.sent() <= 2 * (WEIGHTS as u64 + 200) + 6 * (256 << 10));
}

/// Has had enough as soon as something is there.
struct Enough;

impl Progress for Enough {
    fn total(&self, _: u64) {}
    fn advance(&self, _: u64) {
        std::panic::resume_unwind(Box::new("enough"));
    }
    fn retreat(&self, _: u64) {}
}

#[test]
fn who_hears_of_progress_may_unwind_a_download_which_goes_on_later() {
    let case = Case::new(Faults::default());
    let unwound = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        case.hub().snapshot(&id(), &Enough).map(|_| ())
    }));
    assert_eq!(unwound.unwrap_err().downcast_ref::<&str>(), Some(&"enough"));
    let snapshot = case.hub().snapshot(&id(), &Count::default()).unwrap();
    case.check(&snapshot.path);
}
