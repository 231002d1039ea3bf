//! Trains a 2:4 model against its dense original and measures it on texts.
//!
//! ```sh
//! cargo run --release -p llmpress-sparsify --example ast -- MODEL --calib CALIB.txt --train TRAIN.txt --eval EVAL.txt \
//!     [--eval MORE.txt] [--state FILE] [--every STEPS] sparse24:sparsegpt,reconstruct ast:steps=600 [ast:...]
//! ```
//!
//! Runs share their start. Lines go to stdout; a state is kept at each evaluation. Windows of evaluation: the first 16 of 512
//! tokens of the first text while it trains, and all of every text at the end, no BOS. Calibration: the first 64 of 256 tokens.

use std::collections::BTreeMap;
use std::error::Error;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use llmpress_calibrate::{Calibration, Cut, Room};
use llmpress_formats::Checkpoint;
use llmpress_model::{Model, Tokenizer};
use llmpress_sparsify::ast::{Ast, Record, Start, Task, Text, Then, Watch, Window, measure, train};
use llmpress_sparsify::{FinishedBlock, Job, Residuals, Sink, Sparsifier, State, run};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (mut model, mut calib, mut text) = (PathBuf::new(), PathBuf::new(), PathBuf::new());
    let (mut evals, mut state, mut every) = (Vec::new(), None, 50);
    let (mut start, mut settings) = (None, Vec::new());
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or("a value is missing");
        match argument.as_str() {
            "--calib" => calib = value()?.into(),
            "--train" => text = value()?.into(),
            "--eval" => evals.push(PathBuf::from(value()?)),
            "--state" => state = Some(PathBuf::from(value()?)),
            "--every" => every = value()?.parse()?,
            _ if model.as_os_str().is_empty() => model = argument.into(),
            _ if Ast::names(&argument) => settings.push(argument.parse::<Ast>()?),
            _ => start = Some(argument.parse::<Sparsifier>()?),
        }
    }
    let tokenizer = Tokenizer::open(&model)?;
    let mut dense = Model::open(Arc::new(Checkpoint::open(&model)?))?;
    let read = |path: &Path| -> Result<Vec<u32>, Box<dyn Error>> {
        Ok(tokenizer.encode(&std::fs::read_to_string(path)?)?)
    };
    let started = Instant::now();
    let cut = Cut { windows: 64, length: 256, seed: None };
    let calibration = Calibration::new(&read(&calib)?, cut, None)?;
    let starts = one_shot(&mut dense, &calibration, start.ok_or("say how it starts")?)?;
    eprintln!("start: {:.1} s", started.elapsed().as_secs_f64());
    let ids = read(&text)?;
    let texts = evals.iter().map(|path| read(path)).collect::<Result<Vec<_>, _>>()?;
    let judge: Vec<Window<'_>> = texts.first().map(|ids| windows(ids).take(16).collect()).unwrap_or_default();
    for settings in settings {
        println!("{{\"run\": \"{settings}\"}}");
        let text = Text::new(ids.clone(), settings.window as usize, settings.batch as usize)?;
        eprintln!("{settings}: {} tokens in {} windows", text.tokens(), text.windows());
        let mut watch = Lines { started: Instant::now(), state: state.clone(), every, tokens: 0 };
        let task =
            Task { dense: &dense, starts: &starts, text: &text, settings, judge: &judge, evaluate: every };
        let file = state.as_ref().filter(|path| path.exists()).map(std::fs::File::open).transpose()?;
        let mut file = file.map(std::io::BufReader::new);
        let from = match (&mut file, &state) {
            (Some(file), Some(path)) => Some((file as &mut dyn std::io::Read, path.as_path())),
            _ => None,
        };
        let Some(outcome) = train(task, from, &mut watch)? else { continue };
        for (path, ids) in evals.iter().zip(&texts) {
            let found = measure(&dense, &outcome, &windows(ids).collect::<Vec<_>>())?;
            println!(
                "{{\"text\": \"{}\", \"perplexity\": {:.4}, \"dense\": {:.4}, \"divergence\": {:.5}}}",
                path.file_name().unwrap_or_default().to_string_lossy(),
                found.perplexity,
                found.dense,
                found.divergence
            );
        }
    }
    Ok(())
}

/// Windows of 512 tokens of which all but the first are scored, as `eval` cuts them.
fn windows(ids: &[u32]) -> impl Iterator<Item = Window<'_>> {
    ids.chunks_exact(512).map(|window| Window { ids: &window[..511], labels: &window[1..] })
}

fn one_shot(
    model: &mut Model,
    calibration: &Calibration,
    how: Sparsifier,
) -> Result<Vec<Start>, Box<dyn Error>> {
    let layers = 0..model.config().layers.len();
    let inputs = layers.flat_map(|layer| model.inputs_of(layer)).collect::<Vec<_>>();
    let tensors = inputs.into_iter().flat_map(|input| input.tensors);
    let hows: BTreeMap<String, Sparsifier> = tensors.map(|tensor| (tensor, how)).collect();
    let file = std::env::temp_dir().join(format!("ast-streams-{}", std::process::id()));
    let room = Room { memory: 1 << 30, file };
    let job = Job { hows: &hows, calibration: Some(calibration), room: &room, hessians: 1 << 30 };
    let mut starts = Starts(Vec::new());
    run(model, job, State::default(), &mut starts)?;
    Ok(starts.0)
}

struct Starts(Vec<Start>);

impl Sink for Starts {
    fn block(
        &mut self,
        _block: usize,
        finished: FinishedBlock,
        _residuals: Option<&mut Residuals>,
    ) -> llmpress_formats::Result<()> {
        self.0.extend(finished.tensors.iter().map(Start::from));
        Ok(())
    }
}

struct Lines {
    started: Instant,
    state: Option<PathBuf>,
    every: u32,
    tokens: u64,
}

impl Watch<Record> for Lines {
    fn tell(&mut self, record: Record) -> llmpress_formats::Result<()> {
        let seconds = self.started.elapsed().as_secs_f64();
        match record {
            Record::Stepped(step) => {
                self.tokens = step.tokens;
                if step.step % 10 == 0 {
                    println!(
                        "{{\"step\": {}, \"loss\": {:.4}, \"kl2\": {:.4}, \"nll\": {:.4}, \"gradient\": {:.3}, \"flips\": {}, \
                         \"seconds\": {seconds:.1}}}",
                        step.step,
                        step.loss,
                        step.divergence.unwrap_or_default(),
                        step.likelihood,
                        step.gradient,
                        step.flips.unwrap_or_default(),
                    );
                }
            }
            Record::Evaluated(found) => println!(
                "{{\"step\": {}, \"perplexity\": {:.4}, \"dense\": {:.4}, \"divergence\": {:.5}, \"tokens\": {}, \"seconds\": \
                 {seconds:.1}}}",
                found.step, found.perplexity, found.dense, found.divergence, self.tokens
            ),
        }
        Ok(())
    }

    fn then(&mut self, step: u32) -> Then {
        let is_due = self.state.is_some() && self.every > 0 && step.is_multiple_of(self.every);
        if is_due { Then::Keep } else { Then::Go }
    }

    fn keep(
        &mut self,
        _step: u32,
        write: &mut dyn FnMut(&mut dyn Write, &Path) -> llmpress_formats::Result<()>,
    ) -> llmpress_formats::Result<()> {
        let Some(path) = &self.state else { return Ok(()) };
        let io = |e| llmpress_formats::Error::io(path, "write", e);
        let part = path.with_extension("tmp");
        let mut file = std::io::BufWriter::new(std::fs::File::create(&part).map_err(io)?);
        write(&mut file, &part)?;
        file.flush().map_err(io)?;
        std::fs::rename(&part, path).map_err(io)
    }
}
