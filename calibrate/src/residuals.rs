//! What a pass carries from block to block.

use std::io::{Read, Write};
use std::path::Path;

use llmpress_formats::Result;
use llmpress_model::Model;

use crate::{Calibration, Room, Streams};

/// The residual streams of the model as it is changed so far, and, where it is to give out what the original one does, those
/// of that.
#[derive(Debug)]
pub struct Residuals {
    /// Of the model as it is changed so far.
    pub now: Streams,
    /// Of the original one.
    pub original: Option<Streams>,
}

impl Residuals {
    /// The embeddings of all windows. `streams` are those that may be there at a time: 1, and there are none of the original;
    /// 2 or more, and each has its share of `room`.
    ///
    /// # Errors
    /// Those of [`Streams::embed`].
    pub fn embed(model: &Model, calibration: &Calibration, room: &Room, streams: u64) -> Result<Self> {
        let [now, original] = rooms(room, streams);
        let now = Streams::embed(model, calibration, &now)?;
        let original = (streams > 1).then(|| Streams::embed(model, calibration, &original)).transpose()?;
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

    /// Reads what [`Self::save`] wrote for the same calibration, model and number of streams. `path` is for errors.
    ///
    /// # Errors
    /// A file that cannot be read, or is too short.
    pub fn load(
        model: &Model,
        calibration: &Calibration,
        (room, streams): (&Room, u64),
        from: &mut dyn Read,
        path: &Path,
    ) -> Result<Self> {
        let [now, original] = rooms(room, streams);
        let now = Streams::load(model, calibration, &now, from, path)?;
        let original = match streams {
            0 | 1 => None,
            _ => Some(Streams::load(model, calibration, &original, from, path)?),
        };
        Ok(Self { now, original })
    }
}

/// The rooms of both streams.
fn rooms(room: &Room, streams: u64) -> [Room; 2] {
    match streams {
        0 | 1 => [room.clone(), room.clone()],
        _ => ["now", "original"].map(|name| room.share(streams, name)),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::Arc;

    use llmpress_formats::Checkpoint;
    use llmpress_model::{Panels, SubLayer};

    use super::*;
    use crate::Cut;

    #[test]
    fn streams_of_both_models_are_read_back_as_they_were_saved() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/golden/llama");
        let model = Model::open(Arc::new(Checkpoint::open(&dir).unwrap())).unwrap();
        let ids: Vec<u32> = (0..24).collect();
        let calibration = Calibration::new(&ids, Cut { windows: 3, length: 8, seed: None }, None).unwrap();
        let dir = tempfile::tempdir().unwrap();
        for room in [
            Room { memory: u64::MAX, file: PathBuf::from("never written") },
            Room { memory: 0, file: dir.path().join("streams") },
        ] {
            for streams in [1, 2, 4] {
                let mut residuals = Residuals::embed(&model, &calibration, &room, streams).unwrap();
                assert_eq!(residuals.original.is_some(), streams > 1);
                if let Some(original) = &mut residuals.original {
                    original.advance(&model, SubLayer::Mlp(0), &mut || ()).unwrap();
                }
                let mut bytes = Vec::new();
                residuals.save(&mut bytes, Path::new("saved")).unwrap();
                let windows = |residuals: &mut Residuals| {
                    let Residuals { now, original } = residuals;
                    let (mut all, mut window) = (Vec::new(), Panels::default());
                    for streams in std::iter::once(now).chain(original) {
                        for at in 0..3 {
                            streams.get(at, &mut window).unwrap();
                            all.push(window.clone());
                        }
                    }
                    all
                };
                let was = windows(&mut residuals);
                drop(residuals);
                let mut from = &bytes[..];
                let path = Path::new("saved");
                let mut back =
                    Residuals::load(&model, &calibration, (&room, streams), &mut from, path).unwrap();
                assert!(from.is_empty() && windows(&mut back) == was);
                let mut short = &bytes[..bytes.len() - 1];
                assert!(Residuals::load(&model, &calibration, (&room, streams), &mut short, path).is_err());
            }
        }
    }
}
