//! Families that calibrated passes do not go through layer by layer.

use llmpress_formats::{Error, Result};
use llmpress_model::Model;

/// Refuses a model whose matrices are stored in another way than passes write them.
///
/// # Errors
/// [`Error::Unsupported`]: by the family's name.
pub fn check_layout(model: &Model) -> Result<()> {
    refuse(model, false)
}

/// Refuses, besides, a model whose sub-layers do not run one after the other.
///
/// # Errors
/// [`Error::Unsupported`]: by the family's name.
pub fn check(model: &Model) -> Result<()> {
    refuse(model, true)
}

fn refuse(model: &Model, in_turn: bool) -> Result<()> {
    let blueprint = model.config().blueprint;
    let what = if blueprint.parallel && in_turn {
        "run attention and MLP of a layer side by side: passes that go by a text take them one after the other. Take a method \
         that goes by the weights alone (rtn, grid, magnitude), or prune"
    } else if blueprint.transposed {
        "store their matrices as [inputs, outputs], which passes do not change yet. Lossless methods and pruning work"
    } else {
        return Ok(());
    };
    let root = model.checkpoint().root();
    Err(Error::unsupported(root, None, format!("{} models {what}", blueprint.name)))
}
