//! Which files of a directory are the checkpoint: those that transformers takes, and never half of them.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::os::unix::fs::symlink;
use std::path::Path;

use llmpress_formats::{Checkpoint, Dtype, Error, INDEX_FILE, RenderEntry, render};

/// A file of U8 tensors of four bytes each, filled with `value`.
fn shard(names: &[&str], value: u8) -> Vec<u8> {
    let entries: Vec<RenderEntry> = (0u64..)
        .zip(names)
        .map(|(i, name)| RenderEntry {
            name: (*name).to_owned(),
            dtype: Dtype::U8,
            shape: vec![4],
            begin: i * 4,
            end: i * 4 + 4,
        })
        .collect();
    let mut bytes = render(&entries, &BTreeMap::new(), None).unwrap();
    bytes.resize(bytes.len() + names.len() * 4, value);
    bytes
}

/// The names of tensors with their first bytes, and what was left out.
type Opened = (Vec<(String, u8)>, Vec<String>);

/// Opens a directory made by `make`.
fn open(make: impl FnOnce(&Path)) -> Result<Opened, Error> {
    let dir = tempfile::tempdir().unwrap();
    make(dir.path());
    let checkpoint = Checkpoint::open(dir.path())?;
    let tensors = checkpoint.tensors().keys().map(|n| (n.clone(), checkpoint.read_tensor(n).unwrap()[0]));
    Ok((tensors.collect(), checkpoint.directory().left_out().to_vec()))
}

fn refused(make: impl FnOnce(&Path), words: &[&str]) {
    let error = open(make).unwrap_err().to_string();
    for word in words {
        assert!(error.contains(word), "{word:?} is not in: {error}");
    }
}

fn write(dir: &Path, name: &str, bytes: &[u8]) {
    std::fs::write(dir.join(name), bytes).unwrap();
}

fn index(dir: &Path, map: &[(&str, &str)]) {
    let map: BTreeMap<&str, &str> = map.iter().copied().collect();
    write(dir, INDEX_FILE, serde_json::json!({"metadata": {}, "weight_map": map}).to_string().as_bytes());
}

fn names(found: &[(String, u8)]) -> Vec<&str> {
    found.iter().map(|(name, _)| name.as_str()).collect()
}

#[test]
fn half_a_checkpoint_is_never_taken_for_a_whole_one() {
    let numbered = |numbers: &'static [u32], count: u32| {
        move |dir: &Path| {
            for n in numbers {
                write(
                    dir,
                    &format!("model-{n:05}-of-{count:05}.safetensors"),
                    &shard(&[&format!("t{n}")], 1),
                );
            }
        }
    };
    for (numbers, missing) in
        [(&[1, 3][..], "model-00002"), (&[2, 3], "model-00001"), (&[1, 2], "model-00003")]
    {
        refused(numbered(numbers, 3), &[missing, "is missing", "download it"]);
    }
    // Other names are numbered too, official DFloat11 directories as well.
    refused(
        |d| write(d, "diffusion_pytorch_model-00001-of-00002.safetensors", &shard(&["a"], 1)),
        &["00002-of"],
    );
    refused(
        |d| {
            numbered(&[1, 3], 3)(d);
            let config = r#"{"dfloat11_config": {"threads_per_block": [512], "bytes_per_thread": 8, "pattern_dict": {}}}"#;
            write(d, "config.json", config.as_bytes());
        },
        &["model-00002"],
    );
    let (found, _) = open(numbered(&[1, 2, 3], 3)).unwrap();
    assert_eq!(found.len(), 3);
    refused(
        |d| {
            numbered(&[1, 2], 2)(d);
            numbered(&[1, 2, 3], 3)(d);
        },
        &["two checkpoints"],
    );
    // The index is a link to nothing: nobody knows what it listed.
    refused(
        |d| {
            write(d, "a.safetensors", &shard(&["a"], 1));
            symlink("../../blobs/0123", d.join(INDEX_FILE)).unwrap();
        },
        &[INDEX_FILE, "a link to a file that is not there"],
    );
    refused(
        |d| {
            write(d, "a.safetensors", &shard(&["a"], 1));
            symlink("gone", d.join("b.safetensors")).unwrap();
        },
        &["b.safetensors", "a link to a file that is not there"],
    );
    refused(
        |d| {
            write(d, "model-00001-of-00001.safetensors", &shard(&["a"], 1));
            std::fs::create_dir(d.join(".llmpress")).unwrap();
        },
        &["unfinished conversion"],
    );
    refused(
        |d| {
            write(d, "model.safetensors", &shard(&["a"], 1));
            index(d, &[]);
        },
        &[INDEX_FILE, "empty weight_map"],
    );
}

#[test]
fn the_files_are_those_that_transformers_takes() {
    // One file and an index of shards that are gone.
    let (found, left) = open(|d| {
        write(d, "model.safetensors", &shard(&["a", "b"], 1));
        index(d, &[("a", "model-00001-of-00002.safetensors"), ("b", "model-00002-of-00002.safetensors")]);
    })
    .unwrap();
    assert_eq!((names(&found), left), (vec!["a", "b"], vec![INDEX_FILE.to_owned()]));
    // Both whole: the one file counts, the others are named.
    let (found, left) = open(|d| {
        write(d, "model.safetensors", &shard(&["a"], 1));
        write(d, "model-00001-of-00001.safetensors", &shard(&["a"], 2));
        index(d, &[("a", "model-00001-of-00001.safetensors")]);
    })
    .unwrap();
    assert_eq!(found, [("a".to_owned(), 1)]);
    assert_eq!(left, ["model-00001-of-00001.safetensors", INDEX_FILE]);
    // What the index does not list is not merged in.
    let (found, left) = open(|d| {
        write(d, "model-00001-of-00001.safetensors", &shard(&["a"], 1));
        write(d, "mtp.safetensors", &shard(&["mtp"], 2));
        write(d, "old.safetensors", b"not even safetensors");
        index(d, &[("a", "model-00001-of-00001.safetensors")]);
    })
    .unwrap();
    assert_eq!((names(&found), left), (vec!["a"], vec!["mtp.safetensors".into(), "old.safetensors".into()]));
    // Of two files with one tensor the index says which counts.
    for (file, value) in [("1.safetensors", 1), ("2.safetensors", 2)] {
        let (found, _) = open(|d| {
            write(d, "1.safetensors", &shard(&["a", "b"], 1));
            write(d, "2.safetensors", &shard(&["a", "c"], 2));
            index(d, &[("a", file), ("b", "1.safetensors"), ("c", "2.safetensors")]);
        })
        .unwrap();
        assert_eq!(found[0], ("a".to_owned(), value));
    }
}

#[test]
fn second_copies_and_adapters_are_left_out() {
    for other in [
        "consolidated.safetensors",
        "consolidated-00001-of-00002.safetensors",
        "adapter_model.safetensors",
        "mtp.safetensors",
    ] {
        for main in ["model.safetensors", "model-00001-of-00001.safetensors", "weights.safetensors"] {
            let (found, left) = open(|d| {
                write(d, main, &shard(&["a"], 1));
                write(d, other, &shard(&["lora"], 2));
            })
            .unwrap();
            assert_eq!((names(&found), left), (vec!["a"], vec![other.to_owned()]));
        }
    }
    // Mistral's own layout alone is a checkpoint; an adapter is not.
    let (found, _) = open(|d| write(d, "consolidated.safetensors", &shard(&["a"], 1))).unwrap();
    assert_eq!(names(&found), ["a"]);
    refused(
        |d| write(d, "adapter_model.safetensors", &shard(&["lora"], 1)),
        &["adapter_model.safetensors", "no model by themselves"],
    );
}

#[test]
fn only_files_count() {
    let (found, left) = open(|d| {
        write(d, "a.safetensors", &shard(&["a"], 1));
        write(d, "._a.safetensors", b"\0\x05\x16\x07Mac OS X");
        write(d, ".hidden.safetensors", b"x");
        symlink("someone@host.1:1", d.join(".#config.json")).unwrap();
        std::fs::create_dir(d.join("old.safetensors")).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            d.join("pipe.safetensors"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
            0,
        )
        .unwrap();
        std::os::unix::net::UnixListener::bind(d.join("socket.safetensors")).unwrap();
    })
    .unwrap();
    assert_eq!(names(&found), ["a"]);
    assert_eq!(left, ["old.safetensors", "pipe.safetensors", "socket.safetensors"]);
    // Nor does one hang or pass where a file is needed.
    for name in ["config.json", "llmpress.json", INDEX_FILE] {
        refused(
            |d| {
                write(d, "a.safetensors", &shard(&["a"], 1));
                let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
                let place = rustix::fs::CWD;
                rustix::fs::mknodat(place, d.join(name), rustix::fs::FileType::Fifo, mode, 0).unwrap();
            },
            &[name, "is not a file"],
        );
    }
}

#[test]
fn shards_may_be_links_to_anywhere() {
    let elsewhere = tempfile::tempdir().unwrap();
    write(elsewhere.path(), "blob", &shard(&["a"], 7));
    let (found, _) =
        open(|d| symlink(elsewhere.path().join("blob"), d.join("model.safetensors")).unwrap()).unwrap();
    assert_eq!(found, [("a".to_owned(), 7)]);
}

#[test]
fn a_git_lfs_pointer_is_called_one() {
    let pointer =
        format!("version https://git-lfs.github.com/spec/v1\noid sha256:{:064}\nsize 14696792\n", 0);
    for name in ["model.safetensors", "config.json", INDEX_FILE] {
        refused(
            |d| {
                write(d, "model.safetensors", &shard(&["a"], 1));
                write(d, name, pointer.as_bytes());
            },
            &[name, "Git LFS pointer", "git lfs pull"],
        );
    }
}

#[test]
fn headers_are_read_as_the_reference_implementation_reads_them() {
    let file = |header: &str| {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend([9; 4]);
        bytes
    };
    let entry = r#""a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}"#;
    for header in [
        format!(r#"{{"__metadata__":null,{entry}}}"#),
        format!(r#" {{{entry}}}"#),
        format!("\n\t {{{entry}}}  "),
        format!(r#"{{"__metadata__":{{}},{entry}}}"#),
    ] {
        let bytes = file(&header);
        let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(theirs.names().len(), 1, "{header}");
        let (found, _) = open(|d| write(d, "model.safetensors", &bytes)).unwrap();
        assert_eq!(found, [("a".to_owned(), 9)]);
    }
}

#[test]
fn what_python_writes_for_infinity_is_read() {
    let (found, _) = open(|d| {
        write(d, "1.safetensors", &shard(&["a"], 1));
        write(d, "config.json", br#"{"time_step_limit": [0.0, Infinity], "x": -Infinity, "y": NaN}"#);
        write(d, INDEX_FILE, br#"{"metadata": {"total_size": NaN}, "weight_map": {"a": "1.safetensors"}}"#);
    })
    .unwrap();
    assert_eq!(names(&found), ["a"]);
}

#[test]
fn no_tensor_can_take_the_name_of_the_metadata() {
    let entry =
        RenderEntry { name: "__metadata__".to_owned(), dtype: Dtype::U8, shape: vec![1], begin: 0, end: 1 };
    let error = render(&[entry], &BTreeMap::new(), None).unwrap_err().to_string();
    assert!(error.contains("__metadata__") && error.contains("rename"), "{error}");
}

#[test]
fn the_weights_that_a_configuration_names_are_the_checkpoint() {
    let named = |d: &Path, name: &str| {
        write(d, "config.json", serde_json::json!({"transformers_weights": name}).to_string().as_bytes());
        write(d, "model.safetensors", &shard(&["a"], 1));
        write(d, "other.safetensors", &shard(&["a", "b"], 2));
        write(d, "third.safetensors", &shard(&["a"], 3));
        let map = serde_json::json!({"weight_map": {"a": "third.safetensors"}});
        write(d, "third.safetensors.index.json", map.to_string().as_bytes());
    };
    let (found, left) = open(|d| named(d, "other.safetensors")).unwrap();
    assert_eq!(found, [("a".to_owned(), 2), ("b".to_owned(), 2)]);
    assert_eq!(left, ["model.safetensors", "third.safetensors", "third.safetensors.index.json"]);
    let (found, left) = open(|d| named(d, "third.safetensors.index.json")).unwrap();
    assert_eq!(found, [("a".to_owned(), 3)]);
    assert_eq!(left, ["model.safetensors", "other.safetensors"]);
    for (name, words) in [
        ("gone.safetensors", ["gone.safetensors", "not there"]),
        ("gone.safetensors.index.json", ["gone.safetensors.index.json", "not there"]),
        ("../other.safetensors", ["config.json", "not a file of this directory"]),
        ("model.bin", ["config.json", "neither"]),
        ("", ["config.json", "not a file of this directory"]),
    ] {
        refused(|d| named(d, name), &words);
    }
    refused(|d| write(d, "config.json", b"{\"transformers_weights\": 3}"), &["must be the name of a file"]);
    let (found, _) = open(|d| {
        write(d, "config.json", b"{\"transformers_weights\": null}");
        write(d, "model.safetensors", &shard(&["a"], 1));
    })
    .unwrap();
    assert_eq!(found, [("a".to_owned(), 1)]);
}
