//! Passes that train what a pass before has made 2:4, against the model that it was made from.
//!
//! ```text
//! "sparse24:sparsegpt,reconstruct + ast:steps=2000"
//!      view before both: the teacher      view between: where it begins      all of the text --> matrices 2:4, norms
//! ```

mod blockwise;
mod forecast;
mod record;
mod run;

use std::sync::Arc;

use llmpress_calibrate::Texts;
use llmpress_formats::Checkpoint;
use llmpress_learn::Decoder;
use llmpress_model::{Model, Tokenizer};
use llmpress_sparsify::ast::{self, Text};
pub use llmpress_sparsify::ast::{Ast, Evaluated};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{CalibrationRecord, Error, Result};

pub(crate) use forecast::{expected_bytes, forecast};
pub(crate) use record::{files as record_files, of_sub_layers};
pub(crate) use run::{Run, run};

/// A pass that has trained matrices that are 2:4.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trained {
    /// What was asked for.
    #[serde(serialize_with = "write", deserialize_with = "read")]
    pub to: Ast,
    /// The text that it was trained on: the windows that there are for steps to see.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<CalibrationRecord>,
}

fn write<S: Serializer>(ast: &Ast, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(ast)
}

fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Ast, D::Error> {
    String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
}

/// Whether a tensor is a norm's weights, which training changes and nothing else does.
pub(crate) fn is_norm(name: &str) -> bool {
    name.ends_with("norm.weight")
}

/// All of a text, cut as it is asked for.
///
/// # Errors
/// No text, or too short a one; a model that cannot be trained: before any other pass works for nothing.
pub(crate) fn text(source: Checkpoint, texts: &Texts, settings: &Ast) -> Result<Text> {
    if texts.files.is_empty() {
        return Err(Error::Invalid(format!("{settings} trains on a text: give one with --calib")));
    }
    let model = Model::open(Arc::new(source))?;
    if !settings.blockwise {
        ast::check(&model)
            .and_then(|()| Decoder::new(&model))
            .map_err(|e| Error::Invalid(format!("{settings}: {e}; `blockwise` trains the others")))?;
    }
    let ids = texts.ids(&Tokenizer::open(model.checkpoint().root())?, model.vocab_size())?;
    Ok(Text::new(ids, settings.window as usize, settings.batch as usize)?)
}

/// For the record.
pub(crate) fn record_of(text: &Text) -> CalibrationRecord {
    CalibrationRecord { windows: text.windows(), window: text.window(), digest: text.digest() }
}
