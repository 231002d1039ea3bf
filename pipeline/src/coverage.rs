//! What a method leaves as it was: DFloat11 holds the linears of repeated blocks, and some models keep most of their
//! weights elsewhere, such as all experts of a layer in one tensor of three dimensions.

use llmpress_formats::{Checkpoint, Dtype};

use crate::{Method, Plan};

/// The least share of all bytes that is worth a word.
const LEAST_SHARE: f64 = 0.01;

/// BF16 weights of repeated blocks that a plan for DFloat11 keeps raw.
#[derive(Debug, Clone, PartialEq)]
pub struct Uncovered {
    /// Their bytes.
    pub bytes: u64,
    /// Bytes of all tensors.
    pub of: u64,
    /// How many tensors they are.
    pub tensors: usize,
    /// One of them.
    pub example: String,
    /// Its shape.
    pub shape: Vec<u64>,
}

impl Uncovered {
    /// What a plan leaves, if it asks for DFloat11 and that is much.
    pub fn of(checkpoint: &Checkpoint, plan: &Plan) -> Option<Self> {
        if plan.recipe.to != Method::Dfloat11 {
            return None;
        }
        let raw = plan.units().filter(|unit| unit.method == Method::Raw).flat_map(|unit| &unit.tensors);
        let left = raw.filter_map(|name| Some((name, checkpoint.tensors().get(name)?)));
        // A tied embedding and the norms are left on purpose.
        let left: Vec<_> = left
            .filter(|(name, t)| t.dtype == Dtype::BF16 && t.shape.len() > 1 && is_in_a_block(name))
            .collect();
        let (example, largest) = left.iter().max_by_key(|(_, t)| t.bytes)?;
        let uncovered = Self {
            bytes: left.iter().map(|(_, t)| t.bytes).sum(),
            of: plan.source_bytes,
            tensors: left.len(),
            example: (*example).clone(),
            shape: largest.shape.clone(),
        };
        (uncovered.bytes as f64 > LEAST_SHARE * uncovered.of as f64).then_some(uncovered)
    }

    /// The share of all bytes that stays as it was.
    pub fn share(&self) -> f64 {
        self.bytes as f64 / self.of.max(1) as f64
    }
}

impl std::fmt::Display for Uncovered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "dfloat11 leaves {:.1} % of the bytes as they are: {} BF16 tensors such as {} {:?} are no linears that its \
             format holds; fixed12 and planes take them, all with --to, or these by a rule of a recipe",
            self.share() * 100.0,
            self.tensors,
            self.example,
            self.shape
        )
    }
}

fn is_in_a_block(name: &str) -> bool {
    name.split('.').any(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()))
}
