//! Following a run of steps: what is told of it, and the state that it goes on from.
//!
//! ```text
//! passes/N/training.state    BLAKE3 of the record, its length, the record so far, the trainer's state; every few minutes
//! ```

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use llmpress_formats::Error as FormatError;
use llmpress_learn::{Evaluated, Then};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::progress::{Counted, Progress, Task, Watch};
use crate::{Error, Result};

/// Between two states.
const KEEP_EVERY: Duration = Duration::from_secs(180);
/// The longest record that is taken up.
const MOST_RECORD: u64 = 1 << 30;

/// A line of a record.
pub(crate) trait Line: Serialize + DeserializeOwned {
    /// What was measured, where it is no step.
    fn evaluated(&self) -> Option<&Evaluated>;
}

impl Line for llmpress_sparsify::ast::Record {
    fn evaluated(&self) -> Option<&Evaluated> {
        match self {
            Self::Evaluated(found) => Some(found),
            Self::Stepped(_) => None,
        }
    }
}

/// Records as lines.
pub(crate) fn lines(records: &[impl Serialize]) -> Result<Vec<u8>> {
    let mut lines = Vec::new();
    for record in records {
        serde_json::to_writer(&mut lines, record).map_err(|e| Error::Invalid(format!("a record: {e}")))?;
        lines.push(b'\n');
    }
    Ok(lines)
}

/// A state that an earlier run kept.
pub(crate) struct State<R> {
    /// Its record so far.
    pub(crate) records: Vec<R>,
    /// The trainer's part.
    pub(crate) rest: BufReader<File>,
}

impl<R: Line> State<R> {
    /// The state of a file, if it is there.
    pub(crate) fn open(path: &Path) -> Result<Option<Self>> {
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
pub(crate) struct Followed<'a, R> {
    path: PathBuf,
    /// All that was told.
    pub(crate) records: Vec<R>,
    watch: &'a dyn Watch,
    progress: Box<dyn Progress + 'a>,
    /// Tokens of a step.
    each: u64,
    last: Instant,
}

impl<'a, R: Line> Followed<'a, R> {
    /// Of so many steps of so many tokens each, after what an earlier run has told; `path` is for states.
    pub(crate) fn new(
        path: &Path,
        (verb, steps, each): (&'static str, u32, u64),
        records: Vec<R>,
        watch: &'a dyn Watch,
    ) -> Self {
        let tokens = each.saturating_mul(u64::from(steps));
        let progress = watch.begin(Task { verb, size: tokens, counted: Counted::Tokens });
        progress.start(tokens);
        Self { path: path.to_owned(), records, watch, progress, each, last: Instant::now() }
    }

    /// What a run that was stopped ends with.
    pub(crate) fn stopped() -> Error {
        Error::Invalid(
            "stopped: a state is kept, and the same command with --resume goes on from it".to_owned(),
        )
    }
}

impl<R: Line> llmpress_learn::Watch<R> for Followed<'_, R> {
    fn begin(&mut self, step: u32) {
        if step == 0 {
            // What there is a record of is another run's.
            self.records.clear();
        }
        self.progress.resumed(u64::from(step).saturating_mul(self.each));
    }

    fn tell(&mut self, record: R) -> llmpress_formats::Result<()> {
        match record.evaluated() {
            None => self.progress.advance(self.each),
            Some(found) => self.progress.evaluated(found),
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
        std::fs::rename(&part, &self.path).map_err(|e| FormatError::io(&self.path, "write", e))?;
        self.last = Instant::now();
        Ok(())
    }
}
