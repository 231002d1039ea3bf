//! Which stored tensor is the output head.
//!
//! ```text
//! none stored                          the embedding
//! stored, not said to be tied          it
//! stored, said to be tied              the embedding where both are equal, else what is stored, with a warning
//! ```

use llmpress_formats::{Checkpoint, Result};

/// Names of heads, by architecture.
pub(crate) const NAMES: [&str; 2] = ["lm_head.weight", "language_model.lm_head.weight"];
/// Bytes of both tensors that are compared at a time.
const PIECE_BYTES: u64 = 1 << 20;

/// The head's name, and what the user should know of it.
pub(crate) fn find(
    checkpoint: &Checkpoint,
    tied: Option<bool>,
    embedding: &str,
) -> Result<(String, Option<String>)> {
    let stored = NAMES.into_iter().find(|name| checkpoint.tensors().contains_key(*name));
    let known = stored.or(NAMES.into_iter().find(|name| checkpoint.tied().contains_key(*name)));
    Ok(match (tied, stored, known) {
        (Some(true), Some(name), _) if !are_equal(checkpoint, name, embedding)? => {
            let warning = format!(
                "config.json says tie_word_embeddings, but {name} is stored and is not {embedding}: what is stored is the head"
            );
            (name.to_owned(), Some(warning))
        }
        (Some(true), ..) | (None, _, None) => (embedding.to_owned(), None),
        (_, _, Some(name)) => (name.to_owned(), None),
        (Some(false), _, None) => (NAMES[0].to_owned(), None),
    })
}

/// Whether two tensors hold the same bytes.
fn are_equal(checkpoint: &Checkpoint, a: &str, b: &str) -> Result<bool> {
    let (of_a, of_b) = (checkpoint.tensor(a)?, checkpoint.tensor(b)?);
    if (of_a.dtype, &of_a.shape) != (of_b.dtype, &of_b.shape) {
        return Ok(false);
    }
    let digest = |name: &str| checkpoint.manifest()?.tensors.get(name).map(|entry| entry.blake3);
    if let (Some(a), Some(b)) = (digest(a), digest(b)) {
        return Ok(a == b);
    }
    let size = of_a.bytes;
    let (mut part_a, mut part_b) = (Vec::new(), Vec::new());
    for at in (0..size).step_by(PIECE_BYTES as usize) {
        let len = PIECE_BYTES.min(size - at) as usize;
        for (name, part) in [(a, &mut part_a), (b, &mut part_b)] {
            part.resize(len, 0);
            checkpoint.read(name, at, part)?;
        }
        if part_a != part_b {
            return Ok(false);
        }
    }
    Ok(true)
}
