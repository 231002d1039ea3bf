//! Which matrices stay dense, or get what else there is, by what each of them costs the model.
//!
//! ```text
//! headers: the forms of each matrix, their bytes --> whether what is asked for can be had
//! data:    each matrix in each form --> distance of the logits --> one form of each, kept before the first block
//! ```

use std::collections::{BTreeMap, BTreeSet};

use llmpress_calibrate::{Calibration, Measured as Matrix, Probe, Room, Sensitivity, measure};
use llmpress_formats::encoding::sparse24::matrix;
use llmpress_formats::{Checkpoint, Error as FormatError, Tensor};
use llmpress_model::Model;
use llmpress_quantize::{Grid, Quantiser, Rung, Spec, expected_bits};
use llmpress_sparsify::{
    Form, Partly, Sparse, Sparsifier, add_sums, check_dense, check_ratio, choose, keep_dense, sum_preserving,
};
use serde::{Deserialize, Serialize};

use super::forecast::stored_bytes;
use crate::measuring::Measuring;
use crate::pass::Pass;
use crate::quantise::expected_sparse_bytes;
use crate::recipe::Compiled;
use crate::{Error, Method, Result};

/// What becomes of a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Becomes {
    /// It stays as it is.
    #[serde(rename = "dense")]
    Dense,
    /// Two in four, values plain.
    #[serde(rename = "2:4")]
    Sparse,
    /// All of it quantised by the pass that follows.
    #[serde(rename = "quantised")]
    Quantised,
    /// Two in four, and those quantised by the pass that follows.
    #[serde(rename = "2:4 quantised")]
    SparseQuantised,
}

/// A matrix that was measured, as a line of the record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Line {
    pub(crate) tensor: String,
    pub(crate) becomes: Becomes,
    /// The Jensen-Shannon divergence of the logits, in nats a token, with this matrix alone in another form.
    pub(crate) divergence: BTreeMap<Becomes, f64>,
}

/// What is to be settled matrix by matrix.
#[derive(Debug, Clone)]
pub(crate) struct Choices {
    how: Sparsifier,
    partly: Partly,
    /// How the pass that follows quantises, where each matrix may be quantised or not.
    spec: Option<Spec>,
    /// The matrices.
    free: BTreeSet<String>,
}

impl Choices {
    /// What a pass asks for of its tensors, and `later` passes; none where all are treated alike.
    pub(crate) fn of(
        how: &Sparsifier,
        tensors: &BTreeSet<String>,
        rules: &Compiled,
        later: &[Pass],
    ) -> Option<Self> {
        let partly = how.partly?;
        let (spec, free) = match partly {
            Partly::Dense(_) => (None, tensors.clone()),
            Partly::Ratio(_) => {
                let spec = later.iter().find_map(|pass| match pass {
                    Pass::Quantise(quantiser) => Some(quantiser.spec),
                    _ => None,
                });
                // What a rule names is stored as it says.
                (spec, tensors.iter().filter(|name| rules.rule(name).is_none()).cloned().collect())
            }
        };
        Some(Self { how: *how, partly, spec, free })
    }

    /// What tells two of them apart beside what the pass asks for and its tensors.
    pub(crate) fn identity(&self) -> String {
        let spec = self.spec.map(|spec| Quantiser::of(spec).to_string()).unwrap_or_default();
        format!("{spec} {}", self.free.iter().map(String::as_str).collect::<Vec<_>>().join(" "))
    }

    /// The forms of a matrix beside the dense one, in the order in which they are measured, and the bytes of each.
    fn forms(&self, tensor: &Tensor) -> Vec<(Becomes, u64)> {
        let mut forms = vec![(Becomes::Sparse, stored_bytes(tensor, &self.how, Method::Sparse24))];
        if let Some(spec) = &self.spec {
            let (rows, cols) = matrix(&tensor.shape).unwrap_or_default();
            forms.push((Becomes::Quantised, expected_bits(spec, rows, cols) / 8));
            forms.push((Becomes::SparseQuantised, expected_sparse_bytes(spec, tensor, self.how.slorb)));
        }
        forms
    }

    /// How many forms of each are measured.
    pub(crate) fn measured_forms(&self) -> u64 {
        if self.spec.is_some() { 3 } else { 1 }
    }

    /// The weights of each of them.
    pub(crate) fn weights<'a>(&'a self, view: &Checkpoint) -> Result<BTreeMap<&'a str, u64>> {
        let of = |name: &'a String| Ok((name.as_str(), view.tensor(name)?.shape.iter().product::<u64>()));
        self.free.iter().map(of).collect()
    }

    /// Bytes that a tensor takes on average, of whose forms one is chosen: by what is asked for. None of others.
    pub(crate) fn expected_bytes(&self, name: &str, tensor: &Tensor, sparse: u64, dense: u64) -> Option<u64> {
        if !self.free.contains(name) {
            return None;
        }
        Some(match self.partly {
            Partly::Ratio(share) => share.of(tensor.bytes),
            Partly::Dense(share) => sparse.saturating_add(share.of(dense.saturating_sub(sparse))),
        })
    }

    /// Refuses from headers what cannot be had.
    ///
    /// # Errors
    /// [`Error::Invalid`], with the nearest that can be.
    pub(crate) fn check(&self, view: &Checkpoint) -> Result<()> {
        if self.free.is_empty() {
            return Err(Error::Invalid(format!(
                "{}: rules name every matrix: {} has nothing to choose",
                self.how, self.partly
            )));
        }
        match self.partly {
            Partly::Dense(share) => {
                let sizes: Vec<u64> = self.weights(view)?.into_values().collect();
                Ok(check_dense(&sizes, share)?)
            }
            Partly::Ratio(share) => {
                let (mut least, mut all) = (0u64, 0u64);
                for name in &self.free {
                    let tensor = view.tensor(name)?;
                    let forms = self.forms(tensor).into_iter().map(|(_, bytes)| bytes);
                    least = least.saturating_add(forms.min().unwrap_or(0));
                    all = all.saturating_add(tensor.bytes);
                }
                Ok(check_ratio(least, all, share)?)
            }
        }
    }

    /// Measures every matrix, and chooses its form.
    pub(crate) fn settle(
        &self,
        model: &mut Model,
        calibration: &Calibration,
        room: &Room,
        measuring: Measuring<'_>,
    ) -> llmpress_formats::Result<Vec<Line>> {
        let mut forms = Forms { choices: self, measuring };
        let wanted = |tensor: &str| self.free.contains(tensor);
        let found = measure(model, &wanted, calibration, room, &mut forms)?;
        let chosen = self.choose(model.checkpoint(), &found)?;
        let mut lines = Vec::with_capacity(found.len());
        for (found, becomes) in found.into_iter().zip(chosen) {
            let forms = self.forms(model.checkpoint().tensor(&found.tensor)?);
            let divergence = forms.iter().map(|(form, _)| *form).zip(found.distances).collect();
            lines.push(Line { tensor: found.tensor, becomes, divergence });
        }
        Ok(lines)
    }

    fn choose(&self, view: &Checkpoint, found: &[Sensitivity]) -> llmpress_formats::Result<Vec<Becomes>> {
        let share = match self.partly {
            Partly::Dense(share) => {
                let kept = keep_dense(found, share)?;
                return Ok(kept
                    .into_iter()
                    .map(|d| if d { Becomes::Dense } else { Becomes::Sparse })
                    .collect());
            }
            Partly::Ratio(share) => share,
        };
        let (mut all, mut becomes, mut forms) = (0u64, Vec::new(), Vec::new());
        for matrix in found {
            let tensor = view.tensor(&matrix.tensor)?;
            all = all.saturating_add(tensor.bytes);
            let others = self.forms(tensor);
            let mut costs = vec![Form { cost: tensor.bytes, measured: None }];
            costs.extend(
                others.iter().enumerate().map(|(at, (_, cost))| Form { cost: *cost, measured: Some(at) }),
            );
            forms.push(costs);
            becomes.push([Becomes::Dense].into_iter().chain(others.into_iter().map(|(form, _)| form)));
        }
        let chosen = choose(found, &forms, share.of(all));
        let chosen = chosen
            .ok_or_else(|| FormatError::Invalid(format!("{}: not even the cheapest forms fit", self.how)))?;
        // Every matrix has all forms.
        Ok(becomes.into_iter().zip(chosen).map(|(mut of, at)| of.nth(at).unwrap_or(Becomes::Dense)).collect())
    }
}

/// Puts a matrix into each of its forms.
struct Forms<'a> {
    choices: &'a Choices,
    measuring: Measuring<'a>,
}

impl Probe for Forms<'_> {
    fn form(&mut self, matrix: Matrix<'_>, number: usize) -> llmpress_formats::Result<Option<Vec<f32>>> {
        let (how, cols) = (&self.choices.how, matrix.moments.features());
        let h: Vec<f32> = matrix.moments.diagonal().iter().map(|&h| h as f32).collect();
        let h = (matrix.moments.tokens() > 0).then_some(h);
        let with_sums = |sparse: &Sparse| {
            let mut dense = sparse.dense();
            if how.slorb {
                let sums = sum_preserving(matrix.weights, &dense, cols);
                add_sums(&sums, cols, &mut dense);
            }
            dense
        };
        match (number, self.choices.spec) {
            (0, _) => Ok(Some(with_sums(&how.measured(matrix.weights, matrix.moments)?))),
            (1, Some(spec)) => on_grid(matrix.weights, cols, spec, h.as_deref()).map(Some),
            (2, Some(spec)) => {
                let sparse = how.measured(matrix.weights, matrix.moments)?;
                let kept_h = match h {
                    Some(h) => {
                        let rows = std::iter::repeat_n(h, sparse.rows()).flatten().collect::<Vec<f32>>();
                        Some(Sparse::new(&rows, sparse.masks().to_vec(), cols)?.values().to_vec())
                    }
                    None => None,
                };
                let values = on_grid(sparse.values(), cols / 2, spec, kept_h.as_deref())?;
                Ok(Some(with_sums(&sparse.with_values(values)?)))
            }
            _ => Ok(None),
        }
    }

    fn start(&mut self, weights: u64) {
        self.measuring.start(weights);
    }

    fn step(&mut self, weights: u64) {
        self.measuring.step(weights);
    }
}

/// Rows of `cols` weights on the grids of a setting, each rounded to the nearest code.
fn on_grid(
    weights: &[f32],
    cols: usize,
    spec: Spec,
    h: Option<&[f32]>,
) -> llmpress_formats::Result<Vec<f32>> {
    let grid = match spec.rung {
        Rung::Rtn => Grid::min_max(weights, cols, spec)?,
        Rung::Grid | Rung::Gptq => {
            Grid::search(weights, cols, Spec { rung: Rung::Grid, learn: None, ..spec }, h)?
        }
    };
    Ok(grid.values(&grid.nearest(weights)))
}
