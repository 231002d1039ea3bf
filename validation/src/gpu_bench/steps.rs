//! The steps: what is run, for how long, and what is made of it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::call::{Call, Done};
use super::findings::Findings;
use super::judge;
use super::known::Known;
use super::options::{BUDGET, Options};
use super::report::StepReport;
use crate::random_model::RandomModel;

/// The steps in order.
pub const STEPS: [&str; 16] = [
    "doctor",
    "proofs",
    "small-model",
    "perplexity",
    "logits",
    "generate",
    "kernels-o",
    "kernels-gate_up",
    "kernels-down",
    "kernels-qkv",
    "prefill",
    "model-8b",
    "speed-bf16",
    "speed-fixed12",
    "speed-dfloat11",
    "kernels-more",
];

/// Ways in which weights lie in the GPU's memory.
const WEIGHTS: [&str; 3] = ["bf16", "fixed12", "dfloat11"];
/// Tokens whose products matter most: single tokens, and batches.
const FIRST_TOKENS: &str = "1,16,64";
/// The others that there are goals for, and where fixed12 must not lose to decoding first.
const MORE_TOKENS: &str = "8,32,128,256";
/// Tokens of long prompts.
const PREFILL_TOKENS: &str = "512,2048";
/// Memory that the model of 8B shapes leaves free: cache, activations, logits, the driver's own.
const GPU_RESERVE: u64 = 6 << 30;
/// Room that it leaves on the disk.
const DISK_RESERVE: u64 = 1 << 30;

type Calls = Box<dyn Fn(&Known) -> Result<Vec<Call>, String>>;
type Judge = Box<dyn Fn(&[Done], &Known) -> Findings>;

/// A step.
pub(super) struct Step {
    pub(super) name: &'static str,
    /// What it shows.
    pub(super) shows: &'static str,
    /// Steps that must have held.
    pub(super) after: &'static [&'static str],
    /// Whether it needs a GPU.
    pub(super) gpu: bool,
    /// Most time for all of its calls.
    pub(super) limit: Duration,
    /// With less time left it is not begun.
    pub(super) least: Duration,
    /// The calls, or why there can be none.
    pub(super) calls: Calls,
    pub(super) judge: Judge,
}

impl Step {
    /// What the report says of it before it runs.
    pub(super) fn waiting(&self) -> StepReport {
        StepReport::waiting(self.name, self.shows, self.limit)
    }
}

/// Makes calls of our own program.
#[derive(Clone)]
struct Program {
    path: PathBuf,
    device: String,
    /// A longer budget lengthens every limit.
    scale: f64,
}

impl Program {
    fn seconds(&self, seconds: u64) -> Duration {
        Duration::from_secs(seconds).mul_f64(self.scale)
    }

    fn call(&self, name: &str, limit: u64, arguments: &[&str]) -> Call {
        Call {
            name: name.to_owned(),
            program: self.path.clone(),
            arguments: arguments.iter().map(|&a| a.to_owned()).collect(),
            limit: self.seconds(limit),
            optional: false,
        }
    }

    fn step(
        &self,
        name: &'static str,
        shows: &'static str,
        (limit, least): (u64, u64),
        calls: impl Fn(&Self, &Known) -> Result<Vec<Call>, String> + 'static,
        judge: impl Fn(&[Done], &Known) -> Findings + 'static,
    ) -> Step {
        let program = self.clone();
        Step {
            name,
            shows,
            after: &[],
            gpu: true,
            limit: self.seconds(limit),
            least: Duration::from_secs(least),
            calls: Box::new(move |known| calls(&program, known)),
            judge: Box::new(judge),
        }
    }

    /// `bench kernels` on some matrices.
    fn kernels(
        &self,
        name: &'static str,
        shows: &'static str,
        (limit, least): (u64, u64),
        (shapes, tokens, runs): (&'static [&'static str], &'static str, &'static str),
    ) -> Step {
        let calls = move |program: &Self, _: &Known| {
            // A call a matrix: what ends one leaves the others.
            Ok(shapes
                .iter()
                .map(|shape| {
                    let device = &program.device;
                    let arguments = [
                        "--json", "bench", "kernels", "--shape", shape, "--tokens", tokens, "--runs", runs,
                        "--device", device,
                    ];
                    program.call(shape, limit, &arguments)
                })
                .collect())
        };
        self.step(name, shows, (limit, least), calls, judge::kernels)
    }

    fn speed(&self, name: &'static str, shows: &'static str, weights: &'static str, dir: String) -> Step {
        let calls = move |program: &Self, _: &Known| {
            let arguments = [
                "--json",
                "speed",
                &dir,
                "--device",
                &program.device,
                "--weights",
                weights,
                "--prompt-tokens",
                "512",
                "--new-tokens",
                "128",
            ];
            Ok(vec![program.call(weights, 90, &arguments)])
        };
        Step { after: &["model-8b"], ..self.step(name, shows, (90, 10), calls, judge::speeds) }
    }
}

/// The steps, in order of importance. What is made for them lies in `scratch`; `words` is a text for a model that has none.
pub(super) fn steps(options: &Options, scratch: &Path, words: &Path) -> Vec<Step> {
    let program = Program {
        path: options.program.clone(),
        device: format!("cuda:{}", options.ordinal),
        scale: (options.budget.as_secs_f64() / BUDGET.as_secs_f64()).max(1.0),
    };
    let folder = |name: &str| scratch.join(name).display().to_string();
    let made = folder("small");
    let small = options.model.as_ref().map_or_else(|| made.clone(), |dir| dir.display().to_string());
    // The model that is made brings its own text.
    let own = Path::new(&small).join("eval.txt");
    let own = (options.model.is_none() || own.is_file()).then_some(own);
    let text = options.text.clone().or(own).unwrap_or_else(|| words.to_owned()).display().to_string();
    let encoded: Vec<(&'static str, String)> =
        [("fixed12", folder("small-fixed12")), ("dfloat11", folder("small-dfloat11"))].into();
    let big = folder("8b");
    vec![
        doctor(&program, options.ordinal),
        proofs(&program),
        small_model(&program, options.model.is_none(), &small, &encoded),
        perplexity(&program, &small, &text),
        logits(&program, &small, &text, &encoded),
        generate(&program, &small),
        program.kernels(
            "kernels-o",
            "the kernels at 4096 x 4096, the commonest matrix, cold cache",
            (40, 10),
            (&["4096x4096"], FIRST_TOKENS, "20"),
        ),
        program.kernels(
            "kernels-gate_up",
            "the kernels at 28672 x 4096, the largest matrix, cold cache",
            (45, 12),
            (&["28672x4096"], FIRST_TOKENS, "20"),
        ),
        program.kernels(
            "kernels-down",
            "the kernels at 4096 x 14336, cold cache",
            (40, 10),
            (&["4096x14336"], FIRST_TOKENS, "20"),
        ),
        program.kernels(
            "kernels-qkv",
            "the kernels at 6144 x 4096, cold cache",
            (40, 10),
            (&["6144x4096"], FIRST_TOKENS, "20"),
        ),
        program.kernels(
            "prefill",
            "products of 512 and 2048 tokens",
            (60, 15),
            (&["4096x4096", "28672x4096"], PREFILL_TOKENS, "5"),
        ),
        model_8b(&program, options, scratch.to_owned(), big.clone()),
        program.speed(
            "speed-bf16",
            "prefill, decode and memory of 8B shapes, plain BF16",
            "bf16",
            big.clone(),
        ),
        program.speed("speed-fixed12", "the same from fixed12", "fixed12", big.clone()),
        program.speed("speed-dfloat11", "the same from dfloat11", "dfloat11", big),
        program.kernels(
            "kernels-more",
            "the kernels for other numbers of tokens",
            (120, 15),
            (&["28672x4096", "4096x14336", "4096x4096", "6144x4096"], MORE_TOKENS, "10"),
        ),
    ]
}

fn doctor(program: &Program, ordinal: usize) -> Step {
    let calls = |program: &Program, _: &Known| {
        // All GPUs: it numbers them in an order of its own.
        let query = "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit";
        let smi = Call {
            program: "nvidia-smi".into(),
            optional: true,
            ..program.call("nvidia-smi", 10, &[query, "--format=csv,noheader"])
        };
        // The driver compiles every kernel here, once for all steps.
        Ok(vec![program.call("doctor", 100, &["--json", "doctor"]), smi])
    };
    let judge = move |calls: &[Done], _: &Known| judge::doctor(calls, ordinal);
    let step = program.step("doctor", "a GPU is there and every kernel loads", (110, 1), calls, judge);
    Step { gpu: false, ..step }
}

fn proofs(program: &Program) -> Step {
    let calls = |program: &Program, _: &Known| {
        Ok(vec![program.call("proofs", 90, &["--json", "bench", "proofs", "--device", &program.device])])
    };
    let shows = "every kernel against its reference on the processor, odd shapes";
    program.step("proofs", shows, (90, 5), calls, judge::proofs)
}

/// The small checkpoint, and its conversions.
fn small_model(program: &Program, make: bool, dir: &str, encoded: &[(&'static str, String)]) -> Step {
    let (dir, encoded) = (dir.to_owned(), encoded.to_vec());
    let calls = move |program: &Program, _: &Known| {
        let mut calls = Vec::new();
        if make {
            calls.push(program.call(
                "make",
                20,
                &["--json", "bench", "random-model", &dir, "--like", "small"],
            ));
        }
        calls.extend(encoded.iter().map(|(method, out)| {
            program.call(method, 30, &["--json", "convert", &dir, out, "--to", method])
        }));
        Ok(calls)
    };
    program.step("small-model", "a small checkpoint and its conversions", (45, 3), calls, judge::ends)
}

fn perplexity(program: &Program, dir: &str, text: &str) -> Step {
    let (dir, text) = (dir.to_owned(), text.to_owned());
    let calls = move |program: &Program, _: &Known| {
        let eval = ["--json", "eval", "ppl", &dir, "--text", &text, "--window", "256", "--limit", "8"];
        let of_gpu = WEIGHTS.iter().map(|weights| {
            let device = ["--device", &program.device, "--weights", weights];
            program.call(weights, 25, &[&eval[..], &device].concat())
        });
        Ok(of_gpu.chain([program.call("cpu", 25, &eval)]).collect())
    };
    let shows = "perplexity of a small model: the same from every encoding, near the processor's";
    Step { after: &["small-model"], ..program.step("perplexity", shows, (60, 5), calls, judge::perplexity) }
}

fn logits(program: &Program, dir: &str, text: &str, encoded: &[(&'static str, String)]) -> Step {
    let (dir, text, encoded) = (dir.to_owned(), text.to_owned(), encoded.to_vec());
    let calls = move |program: &Program, _: &Known| {
        let calls = encoded.iter().map(|(method, out)| {
            let arguments = [
                "--json",
                "verify",
                out,
                "--against",
                &dir,
                "--logits",
                "--text",
                &text,
                "--window",
                "256",
                "--limit",
                "4",
                "--device",
                &program.device,
            ];
            program.call(method, 25, &arguments)
        });
        Ok(calls.collect())
    };
    let shows = "logits and greedy tokens of converted checkpoints: the same bits";
    Step { after: &["small-model"], ..program.step("logits", shows, (45, 5), calls, judge::logits) }
}

fn generate(program: &Program, dir: &str) -> Step {
    let dir = dir.to_owned();
    let calls = move |program: &Program, _: &Known| {
        let text = [
            "--json",
            "generate",
            &dir,
            "--prompt",
            "Once upon a time",
            "--max-new-tokens",
            "64",
            "--ignore-eos",
        ];
        let drawn = ["--temperature", "0.8", "--seed", "7"];
        let greedy = ["--temperature", "0"];
        let mut calls = Vec::new();
        for (way, draws) in [("greedy", &greedy[..]), ("drawn", &drawn)] {
            for weights in WEIGHTS {
                let device = ["--device", &program.device, "--weights", weights];
                let arguments = [&text[..], draws, &device].concat();
                calls.push(program.call(&format!("{weights} {way}"), 20, &arguments));
            }
        }
        calls.push(program.call("cpu greedy", 20, &[&text[..], &greedy].concat()));
        Ok(calls)
    };
    let shows = "texts: the same tokens from every encoding";
    Step { after: &["small-model"], ..program.step("generate", shows, (60, 5), calls, judge::texts) }
}

/// A model of 8B shapes, as many layers as there is room for.
fn model_8b(program: &Program, options: &Options, scratch: PathBuf, dir: String) -> Step {
    let (layers, given) = (options.layers, options.scratch_bytes);
    let calls = move |program: &Program, known: &Known| {
        let free = given.map_or_else(|| free_bytes(&scratch), Ok)?;
        let room = [
            (free.saturating_sub(DISK_RESERVE), scratch.display().to_string()),
            (known.memory_bytes.unwrap_or(u64::MAX).saturating_sub(GPU_RESERVE), "the GPU".to_owned()),
        ];
        for (room, place) in room.iter() {
            let least = RandomModel::Llama3_8b { layers: 1 }.bytes();
            if *room < least {
                return Err(format!(
                    "one layer, embedding and head have {:.1} GB; {place} has room for {:.1}",
                    least as f64 / 1e9,
                    *room as f64 / 1e9
                ));
            }
        }
        let fits = |layers: &usize| {
            room.iter().all(|(room, _)| RandomModel::Llama3_8b { layers: *layers }.bytes() <= *room)
        };
        let layers = (1..=layers).rev().find(fits).unwrap_or(1).to_string();
        let arguments = ["--json", "bench", "random-model", &dir, "--like", "llama3-8b", "--layers", &layers];
        Ok(vec![program.call("make", 60, &arguments)])
    };
    let shows = "random weights in the shapes of Llama 3 8B";
    program.step("model-8b", shows, (60, 20), calls, judge::made)
}

/// What is free on the disk of a folder.
pub(super) fn free_bytes(dir: &Path) -> Result<u64, String> {
    let stat =
        rustix::fs::statvfs(dir).map_err(|e| format!("{}: the free space is unknown: {e}", dir.display()))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}
