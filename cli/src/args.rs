//! The command line.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::TypedValueParser;
use clap::{ArgAction, Args, ColorChoice, Parser, Subcommand, ValueEnum, ValueHint};
use llmpress_calibrate::Texts;
use llmpress_hub::Id;
use llmpress_pipeline::{CalibrationText, ExportFormat, MeanBits, Recipe, Rule, Share, Target};
use llmpress_prune::Pass;
use llmpress_validation::gpu_bench::STEPS;

use crate::report::Failure;

/// Compresses, converts, restores and proves checkpoints of large language models.
#[derive(Debug, Parser)]
#[command(version, long_version = crate::version::long(), about, max_term_width = 100, propagate_version = true)]
#[command(disable_help_flag = true, disable_version_flag = true)]
#[command(after_help = "Examples:
  llmpress convert examples/tinylm OUT --to dfloat11   compress, checking every bit
  llmpress verify OUT --against examples/tinylm        prove it
  llmpress restore OUT BACK                            get the BF16 checkpoint back

Exit codes:
  0  done; of diff: the checkpoints are identical
  1  failed, or something that was checked is not as it should be
  2  wrong usage
  3  of worker and merge: failed, and so it will again

Environment:
  NO_COLOR      no colours where --color is auto
  LLMPRESS_ISA  instructions that the processor's kernels use at most: portable, avx2 or avx512;
                results are the same to the bit")]
pub(crate) struct Cli {
    /// Print results and errors as JSON.
    #[arg(long, global = true, help_heading = "Output")]
    pub(crate) json: bool,
    /// Print nothing but results and errors.
    #[arg(long, short, global = true, help_heading = "Output")]
    pub(crate) quiet: bool,
    /// Colours on stderr and in help pages.
    #[arg(long, global = true, value_name = "WHEN", default_value_t = ColorChoice::Auto, help_heading = "Output")]
    pub(crate) color: ColorChoice,
    /// Print help: -h a line for each option, --help everything.
    #[arg(long, short, global = true, action = ArgAction::Help, help_heading = "Output")]
    pub(crate) help: Option<bool>,
    /// Print the version: --version with revision, target and kernels.
    #[arg(long, short = 'V', global = true, action = ArgAction::Version, help_heading = "Output")]
    pub(crate) version: Option<bool>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show what is in a checkpoint: tensors, dtypes, encodings, sizes.
    Inspect(InspectArgs),
    /// Show what a conversion would do, from headers alone.
    Plan(PlanArgs),
    /// Convert a checkpoint.
    Convert(ConvertArgs),
    /// Make units of a plan, beside others who make others: one of many machines.
    Worker(WorkerArgs),
    /// Complete what workers made: check every unit, then write index, configuration and manifest.
    Merge(MergeArgs),
    /// Rank the sub-layers of a model for pruning, without converting.
    Rank(RankArgs),
    /// Turn a compressed checkpoint back into a plain one.
    Restore(RestoreArgs),
    /// Write a checkpoint in the format of other runtimes, number for number.
    Export(ExportArgs),
    /// Check every digest of a converted checkpoint, or compare it with its source bit for bit.
    Verify(VerifyArgs),
    /// Show how far the tensors of two checkpoints are from each other.
    Diff(DiffArgs),
    /// Measure what a model predicts: perplexity, or KL divergence from its base.
    #[command(
        subcommand,
        after_help = "Examples:
  llmpress eval ppl OUT --text wiki.txt
  llmpress eval kld OUT --base MODEL --text wiki.txt"
    )]
    Eval(EvalCommand),
    /// Generate text with a model.
    Generate(GenerateArgs),
    /// Measure ratio and speed of each lossless method on a checkpoint's own tensors, on one thread; or a GPU's
    /// kernels, or everything on a GPU.
    Bench(BenchArgs),
    /// Measure how fast models run, beside each other: prefill and decode.
    Speed(SpeedArgs),
    /// Say what there is to run models on: processor, GPUs, driver, kernels, and what is missing.
    Doctor(DoctorArgs),
    /// Print a completion script for a shell.
    Completions(CompletionsArgs),
    /// Write the manual pages into a directory.
    Man(ManArgs),
    /// Render a chat template: asked on stdin, answered on stdout.
    #[command(name = crate::render_chat_template::NAME, hide = true)]
    RenderChatTemplate,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  llmpress inspect examples/tinylm --entropy
  llmpress inspect OUT --tensors")]
#[command(next_help_heading = "What to show")]
pub(crate) struct InspectArgs {
    /// The checkpoint's directory, or a GGUF file.
    #[arg(value_hint = ValueHint::DirPath)]
    pub(crate) dir: PathBuf,
    /// List every tensor.
    #[arg(long)]
    pub(crate) tensors: bool,
    /// Read the BF16 tensors and report the entropy of their exponents and the ratio to expect.
    #[arg(long)]
    pub(crate) entropy: bool,
}

/// What is to be made of the tensors.
#[derive(Debug, Args)]
#[command(next_help_heading = "What to make")]
pub(crate) struct RecipeArgs {
    /// The method: dfloat11, fixed12, planes, archive (the smallest, for storage and transfer), sparse24 (what is 2:4 already; sparse24:fixed12 encodes its values) or raw; prunings such as drop:attn=8, drop:mlp=4, drop:joint=12,
    /// drop:block=4 or finercut:25%; quantisers such as rtn:w8, grid:w3,g128 or gptq:w4a8,g128 (weights of 1 to 8 bits,
    /// activations of 1 to 8; w2* has five levels; symmetric, int for other zero points; abq is the best of them;
    /// rotate or rotate=r2r4, smooth and qkv8 for low widths of activations; kv8 or kv4 for a cache of so many bits; learn,
    /// for codes and scales learned from there); sparse24:magnitude, sparse24:wanda or sparse24:sparsegpt, with reconstruct and
    /// slorb, to make matrices 2:4 (dense=10%: but for those that cost most), and right after it ast:steps=2000 to train them against the dense model on all of the text (kd,
    /// lr, decay, batch, window, slorb, blockwise); or a chain of any number of prunings, what makes matrices 2:4, what trains
    /// them, a quantiser and a method: drop:attn=8+gptq:w4+dfloat11, sparse24:wanda+fixed12, sparse24:sparsegpt+gptq:w4,g64,
    /// sparse24:sparsegpt,reconstruct+ast:steps=600+gptq:w4,g64.
    #[arg(long, value_name = "CHAIN", value_parser = parse_to, conflicts_with = "recipe")]
    pub(crate) to: Option<Recipe>,
    /// A TOML file with passes, the method, and exceptions by tensor name.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) recipe: Option<PathBuf>,
    /// Store a fine-tune as its difference from this checkpoint, which it was trained from; for --to archive. Reading it takes the same
    /// base.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) base: Option<PathBuf>,
    /// An exception by tensor name, after those of the recipe: TENSORS is a regular expression of whole names, TO a method
    /// or, where a pass quantises, a quantiser, such as 'model.embed_tokens.weight=rtn:w8,g64'; may be given several times,
    /// and the last that matches counts.
    #[arg(long = "rule", value_name = "TENSORS=TO", value_parser = parse_rule)]
    pub(crate) rules: Vec<Rule>,
    /// Most source bytes in one shard, such as 500M or 5GB.
    #[arg(long, value_name = "SIZE", default_value = "4GB", value_parser = parse_size)]
    pub(crate) max_shard_size: u64,
    /// Take the order of removal from this file, which `llmpress rank` made; once for each pruning of a chain, in
    /// order.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Pruning")]
    pub(crate) ranking: Vec<PathBuf>,
    /// Keep every tensor and make what the removed sub-layers add zero, so that any runtime loads the result (whole
    /// layers are removed all the same, and the others renumbered).
    #[arg(long, help_heading = "Pruning")]
    pub(crate) portable: bool,
    /// A JSON file with the `pattern_dict` to use instead of the derived one.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "DFloat11")]
    pub(crate) pattern_file: Option<PathBuf>,
    /// Compress an embedding that is also the output head (the official runtime cannot run such a checkpoint;
    /// llmpress can).
    #[arg(long, help_heading = "DFloat11")]
    pub(crate) tied_embedding: bool,
    /// Put the codes of quantised matrices through an entropy coder: 4 to 10 % smaller on disk at 3 and 4 bits, the same
    /// numbers, and the same in memory.
    #[arg(long, help_heading = "What to make")]
    pub(crate) entropy_code: bool,
    /// Give each matrix of the quantiser its own width, so that weights take so many bits on average, scales and zero points
    /// included: more where it matters, as --calib tells. The same as a width of w3.5.
    #[arg(long, value_name = "BITS")]
    pub(crate) target_bits: Option<MeanBits>,
    /// Leave each matrix of sparse24:... dense, make it 2:4, or have the quantiser after it take it or not, so that all of them
    /// take so much of their bytes at most: more where it matters, as --calib tells. The same as ratio=0.6.
    #[arg(long, value_name = "RATIO")]
    pub(crate) target_ratio: Option<Share>,
    /// How often a quantiser that learns sees each window [default: 200 to 400 windows in all, the more the fewer bits].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) epochs: Option<u32>,
    /// What draws the windows of its steps [default: 0].
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u32>,
}

/// How much sub-layers are judged on.
#[derive(Debug, Args)]
#[command(next_help_heading = "Pruning")]
pub(crate) struct CutArgs {
    /// Windows of the texts that are read [default: 64, FinerCut 10].
    #[arg(long, visible_alias = "samples", value_name = "N", value_parser = clap::value_parser!(u32).range(1..).map(|n| n as usize))]
    pub(crate) calib_windows: Option<usize>,
    /// Tokens of a window.
    #[arg(long, visible_alias = "seq-len", value_name = "TOKENS", default_value_t = CalibrationText::LENGTH, value_parser = clap::value_parser!(u32).range(2..).map(|n| n as usize))]
    pub(crate) calib_window: usize,
}

/// What sub-layers are judged on.
#[derive(Debug, Args)]
#[command(next_help_heading = "Pruning")]
pub(crate) struct CalibrationArgs {
    /// A text on which sub-layers are judged: UTF-8, or JSON lines (.jsonl) with a `text` each; may be given several
    /// times.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) calib: Vec<PathBuf>,
    /// Draw the windows by chance from all of the texts instead of taking the first ones; the same seed draws the
    /// same ones.
    #[arg(long, value_name = "N", requires = "calib")]
    pub(crate) calib_seed: Option<u64>,
    #[command(flatten)]
    pub(crate) cut: CutArgs,
}

impl CutArgs {
    fn text(&self, files: &[PathBuf], seed: Option<u64>) -> CalibrationText {
        let texts = Texts { files: files.to_vec() };
        CalibrationText { texts, windows: self.calib_windows, length: self.calib_window, seed }
    }

    /// A text that is not there yet.
    pub(crate) fn without_text(&self) -> CalibrationText {
        self.text(&[], None)
    }
}

impl CalibrationArgs {
    /// The text, if one is given.
    pub(crate) fn text(&self) -> Result<CalibrationText, Failure> {
        if self.calib.is_empty() && self.cut.calib_windows.is_some() {
            return Err(Failure::Usage("--calib-windows goes with --calib".to_owned()));
        }
        Ok(self.cut.text(&self.calib, self.calib_seed))
    }
}

fn parse_rule(text: &str) -> Result<Rule, String> {
    // Expressions may have the sign in them, and so may quantisers: what can be a target is one, else the last part is meant.
    let parts: Vec<(&str, &str)> =
        text.match_indices('=').map(|(at, _)| (&text[..at], &text[at + 1..])).collect();
    let whole = parts.iter().find_map(|(tensors, to)| Some((*tensors, to.parse().ok()?)));
    let (tensors, to) = match (whole, parts.last()) {
        (Some(found), _) => found,
        (None, Some((_, to))) => {
            return Err(to.parse::<Target>().err().map(|e| e.to_string()).unwrap_or_default());
        }
        (None, None) => return Err("a rule is TENSORS=TO, as in 'lm_head.weight=rtn:w8,g64'".to_owned()),
    };
    Ok(Rule { tensors: tensors.to_owned(), to })
}

fn parse_to(text: &str) -> Result<Recipe, String> {
    Recipe::from_short(text).map_err(|e| e.to_string())
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  llmpress rank MODEL --by drop:joint --calib text.txt --svg scores.svg
  llmpress rank MODEL --by finercut:25% --calib text.txt --out pruning.json --resume

drop:attn, drop:mlp, drop:joint and drop:block rank everything at once; finercut and the iterative forms rank as much as
is asked for.")]
pub(crate) struct RankArgs {
    /// The checkpoint, compressed or not.
    #[arg(value_hint = ValueHint::DirPath)]
    pub(crate) dir: PathBuf,
    /// How: as --to of convert says it.
    #[arg(long, value_name = "METHOD", value_parser = parse_by, help_heading = "What to rank")]
    pub(crate) by: Pass,
    #[command(flatten)]
    pub(crate) calibration: CalibrationArgs,
    /// Where the ranking goes; FinerCut saves it there after each removal.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Result")]
    pub(crate) out: Option<PathBuf>,
    /// FinerCut: go on from what is at --out.
    #[arg(long, requires = "out", help_heading = "Result")]
    pub(crate) resume: bool,
    /// Draw the scores by layer into this file.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Result")]
    pub(crate) svg: Option<PathBuf>,
    /// Threads [default: one per processor].
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024), help_heading = "Job")]
    pub(crate) jobs: Option<u16>,
}

/// A pruning whose amount may be left out where everything is ranked at once.
fn parse_by(text: &str) -> Result<Pass, String> {
    let (head, options) = text.split_once(',').map_or((text, String::new()), |(h, o)| (h, format!(",{o}")));
    let whole =
        matches!(head, "drop:attn" | "drop:mlp" | "drop:joint" | "drop:block" | "drop:random" | "drop:last");
    let pass = if whole { format!("{head}=1{options}") } else { text.to_owned() };
    pass.parse::<Pass>().map_err(|e| e.to_string())
}

/// How a job is to run; none of it changes the result.
#[derive(Debug, Args)]
#[command(next_help_heading = "Job")]
pub(crate) struct JobArgs {
    /// Worker threads [default: one per processor].
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) jobs: Option<u16>,
    /// Most memory to use, such as 512M.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) max_memory: Option<u64>,
    /// Go on with an interrupted job; of a complete one, check that it is what this job would make.
    #[arg(long, conflicts_with = "force")]
    pub(crate) resume: bool,
    /// Replace what an earlier job made at OUT; files that it did not make stay.
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  llmpress plan examples/tinylm --to dfloat11
  llmpress plan MODEL --to fixed12 --json > plan.json && llmpress convert MODEL OUT --plan plan.json
  llmpress plan MODEL --to finercut:25%+dfloat11      what ranking, and what is left, would take
  llmpress plan MODEL --to fixed12 --device cuda --context 8192
  llmpress plan MODEL --to gptq:w4a8,g128             bytes of every tensor, bits a weight, work
  llmpress plan MODEL --to dfloat11 --workers 64 --jobs 16      hours and storage traffic on 64 machines

Reads headers alone. What a pruning removes is known only when it has judged: until then, or with a --ranking, sizes are
those of a model that loses as much.")]
pub(crate) struct PlanArgs {
    /// The checkpoint's directory.
    #[arg(value_hint = ValueHint::DirPath)]
    pub(crate) dir: PathBuf,
    #[command(flatten)]
    pub(crate) recipe: RecipeArgs,
    #[command(flatten)]
    pub(crate) cut: CutArgs,
    /// Worker threads to plan the memory for [default: one per processor].
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024), help_heading = "Job")]
    pub(crate) jobs: Option<u16>,
    /// Most memory the conversion may use, such as 512M.
    #[arg(long, value_name = "SIZE", value_parser = parse_size, help_heading = "Job")]
    pub(crate) max_memory: Option<u64>,
    /// List every unit.
    #[arg(long, help_heading = "What to show")]
    pub(crate) tensors: bool,
    /// Also say what it comes to on so many machines of --jobs threads each: units, hours, storage traffic.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000).map(|n| n as usize), help_heading = "Many machines")]
    pub(crate) workers: Option<usize>,
    /// GB of source that one core takes through the conversion a second [default: what docs/benchmarks.md measured, by method].
    #[arg(long, value_name = "GB/S", requires = "workers", value_parser = parse_rate, help_heading = "Many machines")]
    pub(crate) core_rate: Option<f64>,
    /// GB that the storage reads and writes a second, for all workers together: the time is no less than that takes.
    #[arg(long, value_name = "GB/S", requires = "workers", value_parser = parse_rate, help_heading = "Many machines")]
    pub(crate) storage_rate: Option<f64>,
    /// The checkpoint as it was named, where it lies on the hub.
    #[arg(skip)]
    pub(crate) named: Option<String>,
    /// Also say what the model takes of a GPU's memory, now and after the conversion: weights, cache, workspace. Without
    /// --to or --recipe, only that.
    #[arg(long, value_name = "DEVICE", value_parser = parse_device, help_heading = "What to show")]
    pub(crate) device: Option<Device>,
    /// Tokens of the sequence that the GPU has to hold [default: 4096].
    #[arg(long, value_name = "TOKENS", requires = "device", value_parser = clap::value_parser!(u32).range(1..).map(|n| n as usize), help_heading = "What to show")]
    pub(crate) context: Option<usize>,
}

fn parse_rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate.is_finite() && rate > 0.0 => Ok(rate),
        _ => Err("GB/s are a number above zero, such as 0.3".to_owned()),
    }
}

/// Numbers of units: `3`, `0-7`, `0-3,9`.
fn parse_units(text: &str) -> Result<Vec<RangeInclusive<usize>>, String> {
    let number =
        |text: &str| text.trim().parse::<usize>().map_err(|_| format!("{text:?} is no number of a unit"));
    let range = |part: &str| match part.split_once('-') {
        None => number(part).map(|n| n..=n),
        Some((first, last)) => match (number(first)?, number(last)?) {
            (first, last) if first <= last => Ok(first..=last),
            _ => Err(format!("{part:?} is no range: the smaller number comes first")),
        },
    };
    text.split(',').map(range).collect()
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  llmpress plan MODEL --to dfloat11 --json > plan.json
  llmpress worker --plan plan.json OUT --unit 0-7
  llmpress worker --plan plan.json OUT --num-jobs 8 --job-rank 3
  llmpress worker --plan plan.json OUT --num-jobs 8             the rank from the environment
  llmpress merge --plan plan.json OUT

A unit is a shard of the plan, by number from 0. Workers share no more than the source and OUT: any number of them, in any order, twice,
killed and started again, come to the same bytes as `llmpress convert`. What is done already is hashed and left as it is.

Without --unit the units are shared out by their bytes among --num-jobs jobs, of which this is --job-rank, or what a scheduler says, of
these the first that is set
  JOB_COMPLETION_INDEX                          Kubernetes, an Indexed Job (which does not say how many: --num-jobs)
  SLURM_ARRAY_TASK_ID                           Slurm, counted from SLURM_ARRAY_TASK_MIN in steps of SLURM_ARRAY_TASK_STEP;
                                                how many: SLURM_ARRAY_TASK_COUNT
  SKYPILOT_JOB_RANK and SKYPILOT_NODE_RANK      SkyPilot, all nodes of all jobs of a pool;
                                                how many: SKYPILOT_NUM_JOBS times SKYPILOT_NUM_NODES

Exit codes:
  0    the units are done
  1    failed, and may succeed when it is tried again, here or elsewhere: files that cannot be read or written, no room on the disk, OUT
       taken by another job, a fault of the memory
  2    wrong usage
  3    failed, and will fail again: a source that is damaged, or not the one that was planned; a plan of another version; a job that
       cannot be spread; an OUT that holds something else
  130, 143   stopped by Ctrl-C or SIGTERM: start it again, what was done is done")]
pub(crate) struct WorkerArgs {
    #[command(flatten)]
    pub(crate) spread: SpreadArgs,
    /// The units to make: 3, 0-7 or 0-3,9; may be given several times.
    #[arg(long = "unit", value_name = "N", value_parser = parse_units, conflicts_with_all = ["num_jobs", "job_rank"], help_heading = "Which units")]
    pub(crate) units: Vec<Vec<RangeInclusive<usize>>>,
    /// How many jobs share the units.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..).map(|n| n as usize), help_heading = "Which units")]
    pub(crate) num_jobs: Option<usize>,
    /// Which of them this is, from 0.
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u32).map(|n| n as usize), help_heading = "Which units")]
    pub(crate) job_rank: Option<usize>,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  llmpress merge --plan plan.json OUT

Every shard is hashed and compared with its receipt. Where units are missing or damaged it says which, and the command that makes them.
Exit codes are those of `llmpress worker`; missing units and workers that are still there are 1.")]
pub(crate) struct MergeArgs {
    #[command(flatten)]
    pub(crate) spread: SpreadArgs,
}

/// A plan that many carry out.
#[derive(Debug, Args)]
pub(crate) struct SpreadArgs {
    /// The directory that all of them make.
    #[arg(value_hint = ValueHint::DirPath)]
    pub(crate) out: PathBuf,
    /// The plan, made by `llmpress plan --json`.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "What to make")]
    pub(crate) plan: PathBuf,
    /// Where the source lies here, if not where it was planned.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, help_heading = "What to make")]
    pub(crate) source: Option<PathBuf>,
    /// Threads [default: one per processor].
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024), help_heading = "Job")]
    pub(crate) jobs: Option<u16>,
    /// Most memory to use, such as 512M.
    #[arg(long, value_name = "SIZE", value_parser = parse_size, help_heading = "Job")]
    pub(crate) max_memory: Option<u64>,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  llmpress convert examples/tinylm OUT --to dfloat11
  llmpress convert MODEL OUT --to fixed12 --jobs 8 --max-memory 2G
  llmpress convert MODEL OUT --recipe recipe.toml
  llmpress convert MODEL OUT --to drop:attn=8+dfloat11 --calib text.txt
  llmpress convert MODEL OUT --to drop:attn=8+drop:mlp=2+fixed12 --calib a.txt --calib b.jsonl --calib-seed 1
  llmpress convert MODEL OUT --to gptq:w4,g128 --calib text.txt
  llmpress convert MODEL OUT --to abq:w4a4,rotate --calib text.txt
  llmpress convert MODEL OUT --to abq:w2a8,learn=block,maps --calib text.txt --samples 128 --epochs 4
  llmpress convert MODEL OUT --to abq:w2a8,rotate,learn=model --calib text.txt --samples 512 --epochs 1
  llmpress convert MODEL OUT --to sparse24:sparsegpt,reconstruct+fixed12 --calib text.txt
  llmpress convert MODEL OUT --to dfloat11 --resume     after an interruption")]
pub(crate) struct ConvertArgs {
    /// The checkpoint: a directory of Hugging Face, llmpress or official DFloat11, or a GGUF file.
    #[arg(value_hint = ValueHint::DirPath)]
    pub(crate) dir: PathBuf,
    /// The directory to make.
    #[arg(value_hint = ValueHint::DirPath)]
    pub(crate) out: PathBuf,
    #[command(flatten)]
    pub(crate) recipe: RecipeArgs,
    #[command(flatten)]
    pub(crate) calibration: CalibrationArgs,
    /// A plan made by `llmpress plan --json`.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "What to make",
          conflicts_with_all = ["to", "recipe", "base", "rules", "pattern_file", "tied_embedding", "entropy_code", "target_bits", "target_ratio", "epochs", "seed", "max_shard_size", "calib", "ranking", "portable"])]
    pub(crate) plan: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) job: JobArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  llmpress restore OUT BACK
  llmpress restore OUT BACK --base BASE")]
#[command(next_help_heading = "What to make")]
pub(crate) struct RestoreArgs {
    /// The compressed checkpoint: llmpress or official DFloat11.
    #[arg(value_hint = ValueHint::DirPath)]
    pub(crate) dir: PathBuf,
    /// The directory to make.
    #[arg(value_hint = ValueHint::DirPath)]
    pub(crate) out: PathBuf,
    /// The checkpoint that it is stored as its difference from.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) base: Option<PathBuf>,
    /// Most bytes in one shard, such as 500M or 5GB.
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = parse_size)]
    pub(crate) max_shard_size: u64,
    #[command(flatten)]
    pub(crate) job: JobArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  llmpress export OUT FOR_VLLM --as compressed-tensors
  llmpress export OUT FOR_EXLLAMA --as gptq
  llmpress export OUT FOR_LLAMA_CPP --as gguf
  llmpress verify FOR_VLLM --against OUT")]
pub(crate) struct ExportArgs {
    /// The checkpoint: a quantised one of llmpress, for gguf and safetensors any.
    #[arg(value_hint = ValueHint::DirPath)]
    pub(crate) dir: PathBuf,
    /// The directory to make.
    #[arg(value_hint = ValueHint::DirPath)]
    pub(crate) out: PathBuf,
    /// The format: compressed-tensors or gptq, for codes; gguf, one file for llama.cpp, codes too where it can say them; safetensors,
    /// for plain numbers.
    #[arg(long = "as", value_name = "FORMAT", help_heading = "What to make")]
    pub(crate) format: ExportFormat,
    /// A report of `llmpress eval ppl --json` or `eval kld --json` whose figures the model card (README.md) is to have; may be given
    /// several times.
    #[arg(long = "report", value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Model card")]
    pub(crate) reports: Vec<PathBuf>,
    /// Print the command that uploads the result to this repository of the hub; nothing is sent.
    #[arg(long, value_name = "ORG/NAME", help_heading = "Model card")]
    pub(crate) push: Option<Id>,
    /// Most bytes in one shard, such as 500M or 5GB.
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = parse_size, help_heading = "What to make")]
    pub(crate) max_shard_size: u64,
    #[command(flatten)]
    pub(crate) job: JobArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  llmpress verify OUT
  llmpress verify OUT --against examples/tinylm
  llmpress verify OUT --against examples/tinylm --logits --text examples/tinylm/eval.txt")]
pub(crate) struct VerifyArgs {
    /// The checkpoint to check.
    #[arg(value_hint = ValueHint::DirPath)]
    pub(crate) dir: PathBuf,
    /// Compare every tensor with the one of this checkpoint, bit for bit.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, help_heading = "What to check")]
    pub(crate) against: Option<PathBuf>,
    /// The checkpoint that it is stored as its difference from.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, help_heading = "What to check")]
    pub(crate) base: Option<PathBuf>,
    /// Check the digests of the stored bytes only, without decoding.
    #[arg(long, conflicts_with = "against", help_heading = "What to check")]
    pub(crate) no_decode: bool,
    /// Also run both models on a text and compare their logits, then 32 greedy tokens, bit for bit.
    #[arg(long, requires = "against", requires = "text", conflicts_with = "base", help_heading = "Logits")]
    pub(crate) logits: bool,
    /// The text to run on.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, requires = "logits", help_heading = "Logits")]
    pub(crate) text: Option<PathBuf>,
    /// Tokens of a window of the text.
    #[arg(long, value_name = "TOKENS", default_value_t = 512, requires = "logits", help_heading = "Logits")]
    pub(crate) window: usize,
    /// Take the first so many windows only.
    #[arg(long, value_name = "N", requires = "logits", help_heading = "Logits")]
    pub(crate) limit: Option<usize>,
    /// Worker threads [default: one per processor].
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024), help_heading = "Where it runs")]
    pub(crate) jobs: Option<u16>,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  llmpress diff MODEL FINE_TUNED
  llmpress diff MODEL OUT --limit 5

The relative error is ||A - B|| / ||A||. Exit codes: 0 identical, 1 different or failed.")]
pub(crate) struct DiffArgs {
    /// The checkpoint to compare with: a directory of Hugging Face, llmpress or official DFloat11, or a GGUF file.
    #[arg(value_hint = ValueHint::DirPath)]
    pub(crate) a: PathBuf,
    /// The other one.
    #[arg(value_hint = ValueHint::DirPath)]
    pub(crate) b: PathBuf,
    /// Most tensors to list, the largest relative error first; --json lists all.
    #[arg(long, value_name = "N", default_value_t = 20, help_heading = "What to show")]
    pub(crate) limit: usize,
    /// Worker threads [default: one per processor].
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024), help_heading = "Job")]
    pub(crate) jobs: Option<u16>,
}

#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = "Examples:
  llmpress bench examples/tinylm
  llmpress bench MODEL --peer 'python3 docs/bench/zipnn_peer.py'
  llmpress bench kernels --tokens 1,16
  llmpress bench gpu REPORT"
)]
#[command(next_help_heading = "What to measure")]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    pub(crate) command: Option<BenchCommand>,
    /// The checkpoint's directory.
    #[arg(value_hint = ValueHint::DirPath, required = true)]
    pub(crate) dir: Option<PathBuf>,
    /// Measure on this much of the checkpoint.
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = parse_size)]
    pub(crate) sample: u64,
    /// Runs of each method; the median counts.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub(crate) runs: u16,
    /// A command that measures another compressor in the same run: it is given a file of BF16 bytes as
    /// its last argument and prints JSON lines {peer, ratio, compress_gbps, decompress_gbps}.
    #[arg(long, value_name = "COMMAND")]
    pub(crate) peer: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Measure the kernels of a GPU against cuBLAS and the GPU's own limits, with a cold cache.
    Kernels(BenchKernelsArgs),
    /// Check and measure everything on a GPU, in bounded time: kernels, models, speed, memory.
    Gpu(BenchGpuArgs),
    /// Prove every kernel of a GPU against its reference on the processor: a step of gpu.
    #[command(hide = true)]
    Proofs(BenchProofsArgs),
    /// Make a checkpoint with random weights: a step of gpu.
    #[command(hide = true)]
    RandomModel(RandomModelArgs),
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  llmpress bench gpu REPORT
  llmpress bench gpu REPORT --model examples/tinylm --budget 15m --layers 32
  llmpress bench gpu REPORT --only kernels-gate_up,speed-fixed12

Steps, the most important first, each with a limit of its own and what is left of the budget; one that fails does not
stop the others. report.json and report.md in OUTDIR are written anew after each step, and stay after Ctrl-C.

Exit codes: 0 every step that was asked for ran and what it checks holds, whether or not the goals of speed are reached;
1 otherwise.")]
pub(crate) struct BenchGpuArgs {
    /// Where the report goes, and what each step printed.
    #[arg(value_name = "OUTDIR", value_hint = ValueHint::DirPath)]
    pub(crate) out: PathBuf,
    /// A small checkpoint with its tokenizer, to compare GPU and processor on; one with random weights is made otherwise.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, help_heading = "What to run")]
    pub(crate) model: Option<PathBuf>,
    /// The text for it [default: its eval.txt, or words in no order].
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "What to run")]
    pub(crate) text: Option<PathBuf>,
    /// Time for everything, such as 90s, 7m or 1h. A longer one than the default lengthens the limits of the steps.
    #[arg(long, value_name = "TIME", default_value = "7m", value_parser = parse_time, help_heading = "Job")]
    pub(crate) budget: Duration,
    /// The GPU: cuda, or cuda:1 for the second, ...
    #[arg(long, default_value = "cuda", value_name = "DEVICE", value_parser = parse_device, help_heading = "Where it runs")]
    pub(crate) device: Device,
    /// Most layers of the model of 8B shapes; fewer where disk or GPU have no room.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=128).map(usize::from), help_heading = "What to run")]
    pub(crate) layers: usize,
    /// Run these steps and what they need only.
    #[arg(long, value_name = "STEP,...", value_delimiter = ',', value_parser = clap::builder::PossibleValuesParser::new(STEPS), help_heading = "What to run")]
    pub(crate) only: Vec<String>,
    /// Run nothing after this step.
    #[arg(long, value_name = "STEP", value_parser = clap::builder::PossibleValuesParser::new(STEPS), help_heading = "What to run")]
    pub(crate) stop_after: Option<String>,
    /// Where models lie that are made, and removed at the end: 6 GB for 8 layers [default: the system's folder for
    /// temporary files].
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, help_heading = "Job")]
    pub(crate) scratch: Option<PathBuf>,
    /// Replace the report that is there.
    #[arg(long, help_heading = "Job")]
    pub(crate) force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct BenchProofsArgs {
    /// The GPU: cuda, or cuda:1 for the second, ...
    #[arg(long, default_value = "cuda", value_name = "DEVICE", value_parser = parse_device, help_heading = "Where it runs")]
    pub(crate) device: Device,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "What to make")]
pub(crate) struct RandomModelArgs {
    /// The directory to make.
    #[arg(value_hint = ValueHint::DirPath)]
    pub(crate) dir: PathBuf,
    /// Its shapes.
    #[arg(long, value_enum)]
    pub(crate) like: Shapes,
    /// Layers, of llama3-8b.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=128).map(usize::from))]
    pub(crate) layers: usize,
}

/// Shapes of a model with random weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Shapes {
    /// Some MB, with a tokenizer.
    Small,
    /// The matrices of Llama 3 8B, without a tokenizer.
    #[value(name = "llama3-8b")]
    Llama3_8b,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  llmpress bench kernels
  llmpress bench kernels --model MODEL --tokens 1,8,64 --json
  llmpress bench kernels --device cpu --shape 4096x4096 --tokens 1,16

Without --model and --shape the matrices are those of Llama 3 8B. Exit code 1 where a result is wrong.")]
pub(crate) struct BenchKernelsArgs {
    /// Take the shapes of this checkpoint's matrices.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, conflicts_with = "shape", help_heading = "What to measure")]
    pub(crate) model: Option<PathBuf>,
    /// A matrix of N output and K input features; may be given several times.
    #[arg(long, value_name = "NxK", value_parser = parse_shape, help_heading = "What to measure")]
    pub(crate) shape: Vec<(usize, usize)>,
    /// Numbers of tokens.
    #[arg(long, value_name = "M,...", value_delimiter = ',', default_value = "1,8,16,32,64,128,256",
          value_parser = clap::value_parser!(u32).range(1..=65536).map(|n| n as usize), help_heading = "What to measure")]
    pub(crate) tokens: Vec<usize>,
    /// Replays of each kernel; the median counts.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=10000), help_heading = "How")]
    pub(crate) runs: u16,
    /// Bytes that the copies of a matrix take together at least: several times the cache.
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_size, help_heading = "How")]
    pub(crate) working_set: u64,
    /// The GPU: cuda, or cuda:1 for the second, ...; or cpu, for products of few bits beside BF16 on one thread.
    #[arg(long, default_value = "cuda", value_name = "DEVICE", value_parser = parse_device, help_heading = "Where it runs")]
    pub(crate) device: Device,
}

fn parse_shape(text: &str) -> Result<(usize, usize), String> {
    let sizes = text.split_once('x').and_then(|(n, k)| Some((n.parse().ok()?, k.parse().ok()?)));
    match sizes {
        Some((n, k)) if (1..=1 << 20).contains(&n) && (8..=1 << 20).contains(&k) && k % 8 == 0 => Ok((n, k)),
        _ => Err("must be two sizes such as 4096x14336, the second a multiple of 8".to_owned()),
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum EvalCommand {
    /// Perplexity on a text, with its standard error.
    Ppl(PerplexityArgs),
    /// KL divergence from a base model on a text: both run side by side, no logits are stored.
    Kld(KldArgs),
    /// Accuracy on a set of questions: choices, and texts to go on from.
    Tasks(TasksArgs),
}

/// How a text is evaluated.
#[derive(Debug, Args)]
pub(crate) struct ProtocolArgs {
    /// The text, UTF-8; encoded as a whole without special tokens.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Text")]
    pub(crate) text: PathBuf,
    /// Tokens of a window. All full windows are read; in each, every position but the first is scored.
    #[arg(long, value_name = "TOKENS", default_value_t = 512, help_heading = "Text")]
    pub(crate) window: usize,
    /// Slide the window by so many tokens and score only the new ones.
    #[arg(long, value_name = "TOKENS", help_heading = "Text")]
    pub(crate) stride: Option<usize>,
    /// Take the first so many windows only.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..).map(|n| n as usize), help_heading = "Text")]
    pub(crate) limit: Option<usize>,
    /// Put a BOS before every window where the tokenizer adds one by default, or never.
    #[arg(long, value_enum, default_value_t = BosChoice::Auto, help_heading = "Text")]
    pub(crate) bos: BosChoice,
    /// Windows that a GPU reads at once; the figures are the same to the bit [default: as many as keep it busy and fit].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=2048).map(usize::from), help_heading = "Where it runs")]
    pub(crate) batch: Option<usize>,
    /// Threads [default: one per processor].
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024), help_heading = "Where it runs")]
    pub(crate) jobs: Option<u16>,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
}

/// Where a model runs.
#[derive(Clone, Copy, Debug, Args)]
#[command(next_help_heading = "Where it runs")]
pub(crate) struct DeviceArgs {
    /// cpu, or cuda for the first GPU, cuda:1 for the second, ...
    #[arg(long, default_value = "cpu", value_name = "DEVICE", value_parser = parse_device)]
    pub(crate) device: Device,
    /// How weights lie in memory, the processor's or the GPU's: as they are stored, or decoded or encoded anew when the
    /// model is opened. Where the memory is there, bf16 is fastest from dfloat11 and planes on a processor.
    #[arg(long, value_enum, value_name = "ENCODING", default_value_t = WeightsChoice::Stored, alias = "gpu-weights")]
    pub(crate) weights: WeightsChoice,
}

/// A device by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Device {
    /// The processor.
    Cpu,
    /// A GPU by its number.
    Cuda(usize),
}

fn parse_device(text: &str) -> Result<Device, String> {
    match text.split_once(':') {
        None if text == "cpu" => Ok(Device::Cpu),
        None if text == "cuda" => Ok(Device::Cuda(0)),
        Some(("cuda", number)) if number.bytes().all(|b| b.is_ascii_digit()) => {
            number.parse().map(Device::Cuda).map_err(|e| e.to_string())
        }
        _ => Err("must be cpu, cuda or cuda:N".to_owned()),
    }
}

/// How weights lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum WeightsChoice {
    /// As they are stored; on a GPU dfloat11 and fixed12 only, everything else plain.
    Stored,
    /// Plain.
    Bf16,
    /// DFloat11, decoded when a token is read; of BF16 weights only.
    Dfloat11,
    /// fixed12, multiplied as it is; of BF16 weights only.
    Fixed12,
}

/// When a BOS precedes a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BosChoice {
    /// Where the tokenizer adds one by default.
    Auto,
    /// Never.
    Never,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  llmpress eval ppl examples/tinylm --text examples/tinylm/eval.txt
  llmpress eval ppl OUT --text wiki.txt --window 2048 --limit 20 --json")]
pub(crate) struct PerplexityArgs {
    /// The checkpoint, compressed or not.
    #[arg(value_hint = ValueHint::DirPath)]
    pub(crate) model: PathBuf,
    #[command(flatten)]
    pub(crate) protocol: ProtocolArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  llmpress eval kld OUT --base examples/tinylm --text examples/tinylm/eval.txt")]
pub(crate) struct KldArgs {
    /// The checkpoint, compressed or not.
    #[arg(value_hint = ValueHint::DirPath)]
    pub(crate) model: PathBuf,
    /// The checkpoint that it was made from.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, help_heading = "What to compare with")]
    pub(crate) base: PathBuf,
    #[command(flatten)]
    pub(crate) protocol: ProtocolArgs,
}

#[derive(Debug, Args)]
#[command(
    after_help = "A question is a JSON object, a line of the file. Of choices the likeliest is taken, counted from 0; of a target, whether
the model would go on so.
  {\"context\": \"...\", \"choices\": [\"...\", \"...\"], \"answer\": 0}
  {\"text\": \"...\", \"target\": \"...\"}
Accuracies and their standard errors are what lm-evaluation-harness calls acc, acc_norm and stderr.

Examples:
  llmpress eval tasks examples/tinylm --data questions.jsonl
  llmpress eval tasks OUT --base examples/tinylm --data questions.jsonl --json"
)]
pub(crate) struct TasksArgs {
    /// The checkpoint, compressed or not.
    #[arg(value_hint = ValueHint::DirPath)]
    pub(crate) model: PathBuf,
    /// The questions, a JSON object a line.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Questions")]
    pub(crate) data: PathBuf,
    /// Take the first so many questions only.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..).map(|n| n as usize), help_heading = "Questions")]
    pub(crate) limit: Option<usize>,
    /// Put a BOS before every context where the tokenizer adds one by default, or never.
    #[arg(long, value_enum, default_value_t = BosChoice::Auto, help_heading = "Questions")]
    pub(crate) bos: BosChoice,
    /// The checkpoint that it was made from: says which answers changed.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, help_heading = "What to compare with")]
    pub(crate) base: Option<PathBuf>,
    /// Write what every question came to into this file, a JSON object a line.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "What to compare with")]
    pub(crate) answers: Option<PathBuf>,
    /// Endings that a GPU reads at once; the figures are the same to the bit [default: as many as keep it busy and fit].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=2048).map(usize::from), help_heading = "Where it runs")]
    pub(crate) batch: Option<usize>,
    /// Threads [default: one per processor].
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024), help_heading = "Where it runs")]
    pub(crate) jobs: Option<u16>,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  llmpress generate examples/tinylm --prompt 'It is a truth universally acknowledged'
  llmpress generate MODEL --chat --prompt 'What is entropy coding?' --temperature 0.7 --seed 1
  llmpress generate MODEL --prompts PROMPTS.txt --batch 8 --device cuda")]
pub(crate) struct GenerateArgs {
    /// The checkpoint, compressed or not.
    #[arg(value_hint = ValueHint::DirPath)]
    pub(crate) model: PathBuf,
    /// The text to go on from; several times for several texts.
    #[arg(long, short, value_name = "TEXT", required_unless_present = "prompts", help_heading = "Prompt")]
    pub(crate) prompt: Vec<String>,
    /// A file with a text to go on from in each line; empty lines are left out. They come after those of --prompt.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Prompt")]
    pub(crate) prompts: Option<PathBuf>,
    /// Texts that are gone on from at once; each gets the tokens that it gets by itself [default: all, at most 16, as far as they
    /// fit].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=2048).map(usize::from), help_heading = "Prompt")]
    pub(crate) batch: Option<usize>,
    /// Wrap the prompt as the user's message in the model's chat template.
    #[arg(long, help_heading = "Prompt")]
    pub(crate) chat: bool,
    /// The system message of the chat.
    #[arg(long, value_name = "TEXT", requires = "chat", help_heading = "Prompt")]
    pub(crate) system: Option<String>,
    /// Most tokens to generate.
    #[arg(long, short = 'n', value_name = "N", default_value_t = 128,
          value_parser = clap::value_parser!(u32).range(1..).map(|n| n as usize), help_heading = "Text to make")]
    pub(crate) max_new_tokens: usize,
    /// 0 takes the likeliest token always; higher values draw more freely.
    #[arg(long, value_name = "T", default_value_t = 0.0, help_heading = "Text to make")]
    pub(crate) temperature: f32,
    /// Draw from the so many likeliest tokens only; 0 for all.
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Text to make")]
    pub(crate) top_k: usize,
    /// Draw from the likeliest tokens that reach this share of the probability together.
    #[arg(long, value_name = "P", default_value_t = 1.0, help_heading = "Text to make")]
    pub(crate) top_p: f32,
    /// Seed of the draws: the same seed gives the same text.
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Text to make")]
    pub(crate) seed: u64,
    /// Go on after an end-of-sequence token.
    #[arg(long, help_heading = "Text to make")]
    pub(crate) ignore_eos: bool,
    /// Threads [default: one per processor].
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024), help_heading = "Where it runs")]
    pub(crate) jobs: Option<u16>,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  llmpress speed MODEL OUT
  llmpress speed MODEL --peer 'python3 docs/bench/transformers_peer.py MODEL --dtype bfloat16'")]
pub(crate) struct SpeedArgs {
    /// The checkpoints, compressed or not.
    #[arg(value_hint = ValueHint::DirPath, required = true)]
    pub(crate) models: Vec<PathBuf>,
    /// Tokens of the prompt.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..).map(|n| n as usize), help_heading = "What to measure")]
    pub(crate) prompt_tokens: usize,
    /// Tokens generated after it.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..).map(|n| n as usize), help_heading = "What to measure")]
    pub(crate) new_tokens: usize,
    /// Rounds; each runs every model once.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..), help_heading = "What to measure")]
    pub(crate) runs: u16,
    /// A command to run beside them that prints a line of JSON with prefill_tokens_per_s and
    /// decode_tokens_per_s; --prompt-tokens, --new-tokens and --threads are appended.
    #[arg(long, value_name = "COMMAND", help_heading = "What to measure")]
    pub(crate) peer: Vec<String>,
    /// Threads [default: one per processor].
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024), help_heading = "Where it runs")]
    pub(crate) jobs: Option<u16>,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  llmpress completions bash > ~/.local/share/bash-completion/completions/llmpress
  llmpress completions zsh > ~/.zfunc/_llmpress
  llmpress completions fish > ~/.config/fish/completions/llmpress.fish")]
pub(crate) struct CompletionsArgs {
    /// bash, elvish, fish, powershell or zsh.
    pub(crate) shell: clap_complete::Shell,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  llmpress man ~/.local/share/man/man1")]
pub(crate) struct ManArgs {
    /// Where the pages go.
    #[arg(value_hint = ValueHint::DirPath)]
    pub(crate) dir: PathBuf,
}

/// Sizes: a number with K, M, G, T (powers of 1024, also KiB ...) or KB, MB, GB, TB (powers of 1000).
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let (base, power) = match unit.trim().to_ascii_uppercase().as_str() {
        "" | "B" => (1u64, 0),
        "K" | "KIB" => (1024, 1),
        "M" | "MIB" => (1024, 2),
        "G" | "GIB" => (1024, 3),
        "T" | "TIB" => (1024, 4),
        "KB" => (1000, 1),
        "MB" => (1000, 2),
        "GB" => (1000, 3),
        "TB" => (1000, 4),
        _ => return Err(format!("{unit:?} is no unit: use K, M, G, T or KB, MB, GB, TB")),
    };
    let number: u64 =
        number.parse().map_err(|_| "must be a whole number and a unit, such as 512M".to_owned())?;
    number.checked_mul(base.pow(power)).filter(|&n| n > 0).ok_or_else(|| "is zero or too large".to_owned())
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  llmpress doctor
  llmpress doctor --prove
  llmpress doctor --model MODEL --context 8192")]
#[command(next_help_heading = "What to say")]
pub(crate) struct DoctorArgs {
    /// Say what this model takes of a GPU's memory: weights in each form, cache, workspace.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) model: Option<PathBuf>,
    /// Tokens of the sequence that it has to hold.
    #[arg(long, value_name = "TOKENS", default_value_t = 4096, requires = "model")]
    pub(crate) context: usize,
    /// Compare every kernel of each GPU with its scalar reference over odd shapes: about a minute a GPU.
    #[arg(long)]
    pub(crate) prove: bool,
}

/// Times: a number of seconds, or one with s, m or h; a day at most.
fn parse_time(text: &str) -> Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let seconds = match unit {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => return Err(format!("{unit:?} is no unit: use s, m or h")),
    };
    let number: u64 =
        number.parse().map_err(|_| "must be a whole number and a unit, such as 7m".to_owned())?;
    let time = number.checked_mul(seconds).filter(|time| (1..=86_400).contains(time));
    time.map(Duration::from_secs).ok_or_else(|| "must be from 1s to 24h".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_ranking_of_everything_needs_no_amount() {
        assert!(parse_by("drop:joint,iterative").is_ok() && parse_by("finercut").is_err());
    }

    /// Every verb that people see, with the words that call it.
    fn verbs() -> Vec<(Vec<String>, clap::Command)> {
        fn below(command: &clap::Command, words: &[String], all: &mut Vec<(Vec<String>, clap::Command)>) {
            for verb in command.get_subcommands().filter(|c| !c.is_hide_set() && c.get_name() != "help") {
                let words = [words, &[verb.get_name().to_owned()]].concat();
                below(verb, &words, all);
                all.push((words, verb.clone()));
            }
        }
        let mut command = Cli::command();
        command.build();
        let mut all = Vec::new();
        below(&command, &["llmpress".to_owned()], &mut all);
        assert!(all.len() > 16);
        all
    }

    #[test]
    fn rules_end_where_their_target_begins() {
        for (text, tensors, to) in [
            ("a.*=raw", "a.*", "raw"),
            ("x=y=rtn:w8,g64", "x=y", "rtn:w8,g64"),
            ("v=gptq:w2,learn,steps=5,seed=1", "v", "gptq:w2,learn,steps=5,seed=1"),
        ] {
            let rule = parse_rule(text).unwrap();
            assert_eq!((rule.tensors.as_str(), rule.to), (tensors, to.parse().unwrap()), "{text}");
        }
        assert!(parse_rule("v=zip").unwrap_err().contains("zip"));
        assert!(parse_rule("v").unwrap_err().contains("TENSORS=TO"));
    }

    #[test]
    fn every_option_of_every_verb_stands_under_a_heading() {
        for (words, mut verb) in verbs() {
            for arg in verb.get_arguments().filter(|a| !a.is_positional()) {
                let heading = arg.get_help_heading();
                assert!(heading.is_some(), "{words:?}: {}", arg.get_id());
                let everywhere =
                    ["json", "quiet", "color", "help", "version"].contains(&arg.get_id().as_str());
                assert_eq!(everywhere, heading == Some("Output"), "{words:?}: {}", arg.get_id());
            }
            // What every verb has comes last.
            let help = verb.render_long_help().to_string();
            assert!(!help.contains("\nOptions:\n"), "{help}");
            let heading = |line: &&str| line.ends_with(':') && !line.starts_with(' ');
            let headings: Vec<&str> = help.lines().filter(heading).collect();
            let output = headings.iter().position(|h| *h == "Output:").unwrap();
            assert!(
                headings[output + 1..].iter().all(|h| ["Examples:", "Exit codes:"].contains(h)),
                "{headings:?}"
            );
        }
    }

    #[test]
    fn every_verb_has_an_example_that_works() {
        for (words, verb) in verbs() {
            let help = verb.get_after_help().map(ToString::to_string).unwrap_or_default();
            let (_, examples) =
                help.split_once("Examples:\n").unwrap_or_else(|| panic!("{words:?} has none"));
            let lines: Vec<&str> =
                examples.lines().take_while(|line| line.starts_with("  llmpress ")).collect();
            assert!(!lines.is_empty(), "{words:?}");
            let mut own = 0;
            for command in lines.iter().flat_map(|line| line.split(" && ")) {
                // What stands after a gap says what it is for; quoted words are one.
                let command = command.trim().split("   ").next().unwrap_or_default();
                let mut arguments: Vec<String> = Vec::new();
                for (i, part) in command.split('\'').enumerate() {
                    match i % 2 {
                        0 => arguments.extend(part.split_whitespace().map(str::to_owned)),
                        _ => arguments.push(part.to_owned()),
                    }
                }
                arguments.truncate(arguments.iter().position(|a| a == ">").unwrap_or(arguments.len()));
                let parsed = Cli::try_parse_from(&arguments);
                assert!(parsed.is_ok(), "{command}: {}", parsed.unwrap_err());
                own += usize::from(arguments.starts_with(&words));
            }
            assert!(own > 0, "{words:?}: {examples}");
        }
    }

    #[test]
    fn what_a_person_needs_first_comes_first() {
        for (verb, expected) in [
            ("convert", &["What to make:", "Pruning:", "DFloat11:", "Job:", "Output:"][..]),
            ("plan", &["What to make:", "Pruning:", "DFloat11:", "Job:", "What to show:", "Output:"]),
            ("rank", &["What to rank:", "Pruning:", "Result:", "Job:", "Output:"]),
            ("restore", &["What to make:", "Job:", "Output:"]),
            ("verify", &["What to check:", "Logits:", "Where it runs:", "Output:"]),
            ("generate", &["Prompt:", "Text to make:", "Where it runs:", "Output:"]),
        ] {
            let mut all = verbs();
            let found = all.iter_mut().find(|(words, _)| words[1..] == [verb.to_owned()]);
            let help = found.unwrap().1.render_long_help().to_string();
            let headings: Vec<&str> = help.lines().filter(|line| expected.contains(line)).collect();
            assert_eq!(headings, expected, "{help}");
        }
    }

    #[test]
    fn shapes_are_two_sizes() {
        assert_eq!(parse_shape("4096x14336"), Ok((4096, 14336)));
        for bad in ["", "4096", "4096x", "0x8", "8x0", "8x12", "-1x8", "8x8x8", "9999999x8"] {
            assert!(parse_shape(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn devices_have_names() {
        assert_eq!(parse_device("cpu"), Ok(Device::Cpu));
        assert_eq!(parse_device("cuda"), Ok(Device::Cuda(0)));
        assert_eq!(parse_device("cuda:3"), Ok(Device::Cuda(3)));
        for bad in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "cuda:+1"] {
            assert!(parse_device(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn times_have_units() {
        assert_eq!(parse_time("7m"), Ok(Duration::from_secs(420)));
        assert_eq!(parse_time("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_time("5"), Ok(Duration::from_secs(5)));
        assert_eq!(parse_time("24h"), Ok(Duration::from_secs(86_400)));
        for bad in ["", "m", "0", "25h", "1d", "1.5m", "-1s", "99999999999999999999s", "9999999999999999999h"]
        {
            assert!(parse_time(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_are_read_in_both_kinds_of_units() {
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("5GB"), Ok(5_000_000_000));
        assert_eq!(parse_size("7"), Ok(7));
        for bad in ["", "M", "-1", "1.5G", "0", "99999999999T", "5X"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}
