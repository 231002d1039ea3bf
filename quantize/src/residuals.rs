//! What a job carries from block to block.

use std::io::{Read, Write};
use std::path::Path;

use llmpress_calibrate::{Calibration, Room, Streams};
use llmpress_formats::Result;
use llmpress_model::Model;

use crate::Job;

/// The residual streams of the model as it is quantised so far, and, where error feedback makes up for what it has lost or
/// anything is learned, those of the original one.
#[derive(Debug)]
pub struct Residuals {
    pub(crate) now: Streams,
    pub(crate) original: Option<Streams>,
}

impl Residuals {
    pub(crate) fn embed(model: &Model, calibration: &Calibration, job: &Job<'_>, both: bool) -> Result<Self> {
        let now = Streams::embed(model, calibration, &of_job(job, both, false))?;
        let original =
            both.then(|| Streams::embed(model, calibration, &of_job(job, both, true))).transpose()?;
        Ok(Self { now, original })
    }

    /// Writes all streams, as [`Streams::save`] does. `path` is for errors.
    ///
    /// # Errors
    /// A file that cannot be read or written.
    pub fn save(&mut self, to: &mut dyn Write, path: &Path) -> Result<()> {
        self.now.save(to, path)?;
        self.original.as_mut().map_or(Ok(()), |original| original.save(to, path))
    }

    /// Reads what [`Self::save`] wrote in the same job. `path` is for errors.
    ///
    /// # Errors
    /// A file that cannot be read, or is too short.
    pub fn load(model: &Model, job: &Job<'_>, from: &mut dyn Read, path: &Path) -> Result<Option<Self>> {
        let Some(calibration) = job.calibration else { return Ok(None) };
        let both = job.keeps_both(model);
        let now = Streams::load(model, calibration, &of_job(job, both, false), from, path)?;
        let original = match both {
            true => Some(Streams::load(model, calibration, &of_job(job, both, true), from, path)?),
            false => None,
        };
        Ok(Some(Self { now, original }))
    }
}

/// The room of one of two streams.
fn of_job(job: &Job<'_>, both: bool, second: bool) -> Room {
    if !both {
        return job.room.clone();
    }
    share(job.room, job.streams(), if second { "original" } else { "now" })
}

/// The room of one of so many streams that are there at a time.
pub(crate) fn share(room: &Room, streams: u64, name: &str) -> Room {
    let mut file = room.file.clone();
    file.as_mut_os_string().push(".");
    file.as_mut_os_string().push(name);
    Room { memory: room.memory / streams, file }
}
