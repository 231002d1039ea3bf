//! Programs in C, compiled against the static and the shared library, read what was compressed to the byte.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use llmpress_pipeline::{Counted, Options, Progress, Recipe, Request, Task, Watch, convert_request};

struct Silent;

impl Progress for Silent {
    fn start(&self, _: u64) {}
    fn advance(&self, _: u64) {}
    fn shard(&self, _: &str) {}
}

impl Watch for Silent {
    fn begin(&self, task: Task) -> Box<dyn Progress + '_> {
        assert!(task.counted == Counted::Bytes);
        Box::new(Self)
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Where cargo puts libraries: this test lies beside them.
fn libraries() -> PathBuf {
    // Links the library into this test, so that it is built before.
    assert_eq!(llmpress_c::llmpress_abi_version(), llmpress_c::LLMPRESS_ABI_VERSION);
    std::env::current_exe().unwrap().parent().unwrap().to_owned()
}

fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{command:?}\n{}", String::from_utf8_lossy(&output.stderr));
    output
}

/// A program in C, against the static library or the shared one.
fn compile(source: &str, shared: bool, dir: &Path, more: &[&str]) -> PathBuf {
    let name = Path::new(source).file_stem().unwrap().to_str().unwrap();
    let program = dir.join(format!("{name}-{shared}-{}", more.len()));
    let mut command = Command::new(std::env::var_os("CC").unwrap_or_else(|| "cc".into()));
    command
        .args(["-std=c11", "-D_POSIX_C_SOURCE=200809L", "-Wall", "-Wextra", "-Werror", "-g", "-I"])
        .arg(root().join("include"));
    command.args(more).arg(root().join(source)).arg("-o").arg(&program);
    let libraries = libraries();
    if shared {
        command
            .arg("-L")
            .arg(&libraries)
            .arg("-lllmpress_c")
            .arg(format!("-Wl,-rpath,{}", libraries.display()));
    } else {
        command.arg(libraries.join("libllmpress_c.a"));
    }
    run(command.args(["-lm", "-lpthread", "-ldl"]));
    program
}

/// The model of the examples, as dfloat11.
fn converted(dir: &Path) -> (PathBuf, PathBuf) {
    let (source, out) = (root().join("../../examples/tinylm"), dir.join("out"));
    let options = Options {
        jobs: None,
        max_memory: None,
        resume: false,
        force: false,
        producer: llmpress_formats::Producer {
            name: "test".to_owned(),
            version: "0".to_owned(),
            revision: None,
        },
        extra_files: Default::default(),
    };
    let request = Request::new(Recipe::from_short("dfloat11").unwrap());
    convert_request(&source, &out, &request, 4 << 30, &options, &Silent).unwrap();
    (source, out)
}

#[test]
fn a_c_program_lists_and_decodes_what_the_original_holds() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = converted(dir.path());
    let original = llmpress_formats::Checkpoint::open(&source).unwrap();
    for shared in [false, true] {
        let program = compile("examples/decode.c", shared, dir.path(), &[]);
        let decode = |args: &[&str]| run(Command::new(&program).arg(&out).args(args)).stdout;
        let list = String::from_utf8(decode(&[])).unwrap();
        assert_eq!(list.lines().count(), original.tensors().len());
        for (line, (name, tensor)) in list.lines().zip(original.tensors()) {
            let encoding = if name.contains("_proj.") { "dfloat11" } else { "raw" };
            let expected =
                format!("{name} {} {:?} {encoding} {}", tensor.dtype.name(), tensor.shape, tensor.bytes);
            assert_eq!(line, expected);
        }
        for name in original.tensors().keys().step_by(7) {
            let whole = original.read_tensor(name).unwrap();
            assert!(decode(&[name]) == whole, "{name}");
            let rows = original.tensor(name).unwrap().shape[0] as usize;
            let row = whole.len() / rows;
            let (first, end) = (rows / 3, rows / 3 + rows / 2);
            assert!(
                decode(&[name, &first.to_string(), &end.to_string()]) == whole[first * row..end * row],
                "{name}"
            );
        }
        // What is wrong is said in a line, with the nearest name.
        let wrong =
            Command::new(&program).arg(&out).arg("model.layers.0.self_attn.q_prj.weight").output().unwrap();
        let text = String::from_utf8(wrong.stderr).unwrap();
        assert!(
            wrong.status.code() == Some(1) && text.contains("q_proj") && text.lines().count() == 1,
            "{text}"
        );
    }
}

#[test]
fn wrong_use_and_many_threads_end_in_a_status() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = converted(dir.path());
    let cut = dir.path().join("cut");
    std::fs::create_dir(&cut).unwrap();
    let whole = std::fs::read(source.join("model.safetensors")).unwrap();
    std::fs::write(cut.join("model.safetensors"), &whole[..1000]).unwrap();
    let name = "model.layers.1.mlp.up_proj.weight";
    let golden = root().join("../tests/golden");
    let [delta, base, tuned] = ["1.5/delta", "source", "tuned"].map(|dir| golden.join(dir));
    let arguments = [out.as_path(), Path::new(name), &cut, &delta, &base, &tuned];
    for shared in [false, true] {
        let program = compile("tests/misuse.c", shared, dir.path(), &[]);
        let said = run(Command::new(&program).args(arguments)).stdout;
        assert_eq!(said, b"well\n");
        // Where it is there, it finds what is lost or read outside of its bounds.
        if Command::new("valgrind").arg("--version").output().is_ok_and(|found| found.status.success()) {
            run(Command::new("valgrind")
                .args(["--quiet", "--error-exitcode=9", "--leak-check=full"])
                .arg(&program)
                .args(arguments));
        }
    }
    // AddressSanitizer in the C part, and its leak check in all of it.
    let program = compile("tests/misuse.c", false, dir.path(), &["-fsanitize=address,undefined"]);
    run(Command::new(&program).args(arguments));
}
