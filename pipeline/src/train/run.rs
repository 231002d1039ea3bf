//! Running a pass that trains: the crate `sparsify` computes, a stage keeps.
//!
//! ```text
//! passes/N/training.state    BLAKE3 of the record, its length, the record so far, the trainer's state; every few minutes
//! ```

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use llmpress_formats::encoding::PackedUnit;
use llmpress_formats::encoding::abq::Floats;
use llmpress_formats::{Checkpoint, Error as FormatError};
use llmpress_model::Model;
use llmpress_sparsify::ast::{self, Ast, Outcome, Record, Start, Text, Then};

use super::blockwise;
use super::record::lines;
use crate::blocks::{Blocks, Made};
use crate::progress::{Counted, Progress, Task, Watch};
use crate::{Error, Result};

/// Between two states.
const KEEP_EVERY: Duration = Duration::from_secs(180);
/// Evaluations of a run, beside that of its start.
const EVALUATIONS: u32 = 20;
/// The longest record that is taken up.
const MOST_RECORD: u64 = 1 << 30;

/// What is to be trained.
pub(crate) struct Run<'a> {
    /// Before it was made 2:4.
    pub(crate) dense: Arc<Checkpoint>,
    /// As it begins.
    pub(crate) before: &'a Checkpoint,
    pub(crate) text: &'a Text,
    pub(crate) settings: Ast,
    /// Bytes of memory that the job may take.
    pub(crate) memory: Option<u64>,
}

/// Trains, from the state that is there, and keeps what comes of it.
pub(crate) fn run(job: &Run<'_>, blocks: &mut Blocks, watch: &dyn Watch) -> Result<()> {
    if job.settings.blockwise {
        return blockwise::run(job, blocks, watch);
    }
    if blocks.count() > 0 {
        return Ok(());
    }
    let model = Model::open(job.dense.clone())?;
    let starts = job.before.tensors().keys().map(|name| Start::read(job.before, name));
    let starts: Vec<Start> =
        starts.filter_map(|start| start.transpose()).collect::<llmpress_formats::Result<_>>()?;
    if starts.is_empty() {
        return Err(Error::Invalid(format!(
            "{}: nothing is 2:4 by then, so there is nothing to train",
            job.settings
        )));
    }
    let path = blocks.state();
    let mut state = State::open(&path)?;
    let tokens = (job.settings.tokens() as u64).saturating_mul(u64::from(job.settings.steps));
    let progress = watch.begin(Task { verb: "train", size: tokens, counted: Counted::Tokens });
    progress.start(tokens);
    let records = state.as_mut().map(|state| std::mem::take(&mut state.records)).unwrap_or_default();
    let judge = job.text.held();
    let mut kept = Kept {
        path: &path,
        records,
        watch,
        progress,
        each: job.settings.tokens() as u64,
        last: Instant::now(),
    };
    let task = ast::Task {
        dense: &model,
        starts: &starts,
        text: job.text,
        settings: job.settings,
        judge: &judge,
        evaluate: job.settings.steps.div_ceil(EVALUATIONS),
    };
    let from = state.as_mut().map(|state| (&mut state.rest as &mut dyn Read, path.as_path()));
    let Some(outcome) = ast::train(task, from, &mut kept)? else {
        return Err(Error::Invalid(
            "stopped: a state is kept, and the same command with --resume goes on from it".to_owned(),
        ));
    };
    let records = kept.records;
    blocks.write((&made(&model, outcome)?, &[]), &records, None)?;
    // Of no more use; what is left of it does no harm.
    let _ = std::fs::remove_file(&path);
    Ok(())
}

/// Finished tensors: matrices, and norms as they are.
fn made(model: &Model, outcome: Outcome) -> Result<Vec<Made>> {
    let mut made = Vec::new();
    for matrix in &outcome.matrices {
        made.push(Made { name: matrix.tensor.clone(), unit: matrix.unit()?, instead: None });
    }
    for norm in outcome.norms {
        let dtype = model.checkpoint().tensor(&norm.tensor)?.dtype;
        let unit = PackedUnit::Raw(Floats::round(dtype, &norm.values)?);
        made.push(Made { name: norm.tensor, unit, instead: None });
    }
    Ok(made)
}

/// A state that an earlier run kept.
struct State {
    records: Vec<Record>,
    rest: BufReader<File>,
}

impl State {
    fn open(path: &Path) -> Result<Option<Self>> {
        if !path.exists() {
            return Ok(None);
        }
        let io = |e| FormatError::io(path, "read", e);
        let bad =
            || FormatError::corrupt(path, None, "is not what was written: delete it to train from the start");
        let mut rest = BufReader::new(File::open(path).map_err(io)?);
        let mut head = [0u8; 40];
        rest.read_exact(&mut head).map_err(io)?;
        let (digest, length) = head.split_at(32);
        let length = u64::from_le_bytes(length.try_into().map_err(|_| bad())?);
        if length > MOST_RECORD {
            return Err(bad().into());
        }
        let mut bytes = Vec::new();
        (&mut rest).take(length).read_to_end(&mut bytes).map_err(io)?;
        if blake3::hash(&bytes).as_bytes() != digest {
            return Err(bad().into());
        }
        let records = bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        let records = records.map(|line| serde_json::from_slice(line).map_err(|_| bad()));
        Ok(Some(Self { records: records.collect::<Result<_, _>>()?, rest }))
    }
}

/// Follows a run.
struct Kept<'a> {
    path: &'a Path,
    records: Vec<Record>,
    watch: &'a dyn Watch,
    progress: Box<dyn Progress + 'a>,
    /// Tokens of a step.
    each: u64,
    last: Instant,
}

impl ast::Watch for Kept<'_> {
    fn begin(&mut self, step: u32) {
        if step == 0 {
            // What there is a record of is another run's.
            self.records.clear();
        }
        self.progress.resumed(u64::from(step).saturating_mul(self.each));
    }

    fn tell(&mut self, record: Record) -> llmpress_formats::Result<()> {
        match &record {
            Record::Stepped(_) => self.progress.advance(self.each),
            Record::Evaluated(found) => self.progress.evaluated(found),
        }
        self.records.push(record);
        Ok(())
    }

    fn then(&mut self, _step: u32) -> Then {
        match self.watch.is_stopped() {
            true => Then::Stop,
            false if self.last.elapsed() >= KEEP_EVERY => Then::Keep,
            false => Then::Go,
        }
    }

    fn keep(
        &mut self,
        _step: u32,
        write: &mut dyn FnMut(&mut dyn Write, &Path) -> llmpress_formats::Result<()>,
    ) -> llmpress_formats::Result<()> {
        let part = self.path.with_extension("tmp");
        let io = |e| FormatError::io(&part, "write", e);
        let record = lines(&self.records).map_err(|e| FormatError::Invalid(e.to_string()))?;
        let mut file = BufWriter::new(File::create(&part).map_err(io)?);
        file.write_all(blake3::hash(&record).as_bytes()).map_err(io)?;
        file.write_all(&(record.len() as u64).to_le_bytes()).map_err(io)?;
        file.write_all(&record).map_err(io)?;
        write(&mut file, &part)?;
        file.flush().map_err(io)?;
        file.get_ref().sync_all().map_err(io)?;
        std::fs::rename(&part, self.path).map_err(|e| FormatError::io(self.path, "write", e))?;
        self.last = Instant::now();
        Ok(())
    }
}
