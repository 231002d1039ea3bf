//! Second moments of activations: the Hessian of a linear's squared error (Frantar and Alistarh, "Optimal Brain
//! Compression", section 3: H = 2 X X^T).
//!
//! ```text
//! X: features x tokens, window by window      H = X X^T / tokens: features x features, or its diagonal alone
//!
//! sum[i, j] += x_i . x_j of one run of tokens     in F32: tokens of a run in their order, then runs in theirs
//! ```
//!
//! Every element is the work of one task, so the bits do not depend on the number of threads.

use llmpress_formats::{Error, Result};
use llmpress_kernels::cpu::{PANEL, multiply};
use llmpress_model::Panels;
use rayon::prelude::*;

/// Tokens that are added up before they are added to the sum: rounding errors of single precision stay small.
pub(crate) const RUN_TOKENS: usize = 480;

/// Which second moments are gathered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Each feature with itself.
    Diagonal,
    /// Each feature with each.
    Full,
}

/// The second moments of what a linear multiplies.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments {
    features: usize,
    tokens: usize,
    diagonal: Vec<f64>,
    /// Sums of [features, features]: the blocks above the diagonal until they are closed.
    full: Option<Vec<f32>>,
    closed: bool,
    rows: Vec<f32>,
    panels: Vec<f32>,
}

impl Moments {
    /// None yet, of so many features.
    ///
    /// # Errors
    /// More features than memory can be asked for.
    pub fn new(features: usize, extent: Extent) -> Result<Self> {
        let full = match extent {
            Extent::Diagonal => None,
            Extent::Full => Some(Self::square(features)?),
        };
        let diagonal = vec![0.0; features];
        Ok(Self { features, tokens: 0, diagonal, full, closed: false, rows: vec![], panels: vec![] })
    }

    /// Zeros, one for each pair of features.
    pub(crate) fn square(features: usize) -> Result<Vec<f32>> {
        let count = features.checked_mul(features).filter(|n| n.checked_mul(4).is_some());
        let mut sums = Vec::new();
        match count.map(|n| sums.try_reserve_exact(n)) {
            Some(Ok(())) => sums.resize(count.unwrap_or(0), 0.0),
            _ => {
                return Err(Error::Limit(format!(
                    "a Hessian of {features} x {features} does not fit into memory"
                )));
            }
        }
        Ok(sums)
    }

    /// Bytes that the moments of so many features take.
    pub fn bytes(features: usize, extent: Extent) -> u64 {
        let features = features as u64;
        match extent {
            Extent::Diagonal => features.saturating_mul(8),
            Extent::Full => features.saturating_mul(features).saturating_mul(4).saturating_add(8 * features),
        }
    }

    /// Adds a window's activations, `features` of each token.
    ///
    /// # Errors
    /// A value that is infinite or not a number, or so large that its square is; other features.
    pub fn add(&mut self, x: &Panels) -> Result<()> {
        if x.features() != self.features || self.closed {
            return Err(Error::Invalid(format!(
                "{} features do not go with moments of {}",
                x.features(),
                self.features
            )));
        }
        let (features, tokens) = (self.features, x.tokens());
        if tokens == 0 {
            return Ok(());
        }
        token_rows(x, &mut self.rows);
        for (sum, row) in self.diagonal.iter_mut().zip(self.rows.chunks_exact(tokens)) {
            *sum += row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>();
        }
        if let Some(feature) = self.diagonal.iter().position(|d| *d > f64::from(f32::MAX) || !d.is_finite()) {
            return Err(Error::Invalid(format!(
                "feature {feature} holds NaN, infinite or far too large values"
            )));
        }
        if let Some(sums) = &mut self.full {
            for first in (0..tokens).step_by(RUN_TOKENS) {
                let run = first..(first + RUN_TOKENS).min(tokens);
                add_run(sums, [&self.rows; 2], &mut self.panels, (features, tokens), run, Blocks::Above);
            }
        }
        self.tokens += tokens;
        Ok(())
    }

    /// Divides by the tokens and fills what mirrors the blocks above the diagonal.
    #[must_use]
    pub fn close(mut self) -> Self {
        if self.closed {
            return self;
        }
        (self.rows, self.panels, self.closed) = (Vec::new(), Vec::new(), true);
        let tokens = self.tokens.max(1) as f64;
        self.diagonal.iter_mut().for_each(|d| *d /= tokens);
        let n = self.features;
        if let Some(sums) = &mut self.full {
            let factor = (1.0 / tokens) as f32;
            sums.par_iter_mut().for_each(|s| *s *= factor);
            // By blocks: a column of a large matrix touches a cache line an element.
            for top in (0..n).step_by(PANEL) {
                let (above, below) = sums.split_at_mut(((top + PANEL).min(n)) * n);
                let bottom = (top + PANEL).min(n);
                below.par_chunks_exact_mut(n).enumerate().for_each(|(i, row)| {
                    for j in top..bottom {
                        row[j] = above[j * n + bottom + i];
                    }
                });
            }
        }
        self
    }

    /// Features.
    pub fn features(&self) -> usize {
        self.features
    }

    /// Tokens seen.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Means of squares of each feature, once closed.
    pub fn diagonal(&self) -> &[f64] {
        &self.diagonal
    }

    /// Means of products, `[features, features]`, once closed; none where only the diagonal was asked for.
    pub fn full(&self) -> Option<&[f32]> {
        self.full.as_deref().filter(|_| self.closed)
    }
}

/// Token after token of each feature.
pub(crate) fn token_rows(x: &Panels, rows: &mut Vec<f32>) {
    let tokens = x.tokens();
    rows.resize(x.features() * tokens, 0.0);
    rows.par_chunks_mut((PANEL * tokens).max(1)).enumerate().for_each(|(block, rows)| {
        for panel in 0..x.count() {
            let (range, width) = (x.range(panel), x.width(panel));
            let from = x.panel(panel)[block * PANEL * width..].chunks_exact(width);
            for (row, from) in rows.chunks_exact_mut(tokens).zip(from) {
                row[range.clone()].copy_from_slice(from);
            }
        }
    });
}

/// Which blocks of a sum are made.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Blocks {
    /// Those on and above the diagonal.
    Above,
    /// All of them.
    All,
}

/// `sums += A B^T` over a run of tokens, in blocks of `PANEL` features; `rows` are A and B.
pub(crate) fn add_run(
    sums: &mut [f32],
    rows: [&[f32]; 2],
    panels: &mut Vec<f32>,
    (features, tokens): (usize, usize),
    run: std::ops::Range<usize>,
    blocks: Blocks,
) {
    let length = run.len();
    let [a, b] = rows;
    // B^T in panels of features: panel[token * width + feature].
    panels.resize(features * length, 0.0);
    panels.par_chunks_mut(PANEL * length).enumerate().for_each(|(block, panel)| {
        let width = panel.len() / length;
        for feature in 0..width {
            let row = &b[(block * PANEL + feature) * tokens..][run.clone()];
            for (to, x) in panel[feature..].iter_mut().step_by(width).zip(row) {
                *to = *x;
            }
        }
    });
    let panels = &*panels;
    sums.par_chunks_mut(PANEL * features).enumerate().with_max_len(1).for_each(|(block, sums)| {
        let height = sums.len() / features;
        let a = &a[block * PANEL * tokens + run.start..];
        let mut products = [0.0f32; PANEL * PANEL];
        let first = if blocks == Blocks::Above { block } else { 0 };
        for (at, panel) in panels.chunks(PANEL * length).enumerate().skip(first) {
            let width = panel.len() / length;
            let products = &mut products[..height * width];
            multiply(a, tokens, panel, width, products);
            for (sums, products) in sums.chunks_exact_mut(features).zip(products.chunks_exact(width)) {
                let sums = &mut sums[at * PANEL..at * PANEL + width];
                sums.iter_mut().zip(products).for_each(|(sum, p)| *sum += p);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn activations(features: usize, tokens: usize, seed: usize) -> Panels {
        let mut x = Panels::zeros(features, tokens);
        for token in 0..tokens {
            let of = |f: usize| ((f * 37 + token * 101 + seed * 13 + f * token) % 97) as f32 / 17.0 - 2.5;
            x.set_token(token, (0..features).map(of));
        }
        x
    }

    #[test]
    fn moments_are_the_products_of_features_over_all_tokens() {
        for (features, lengths) in [(1, [1, 1]), (47, [3, 50]), (100, [49, 200]), (130, [1000, 1])] {
            let windows = [activations(features, lengths[0], 1), activations(features, lengths[1], 2)];
            let mut moments = Moments::new(features, Extent::Full).unwrap();
            windows.iter().for_each(|x| moments.add(x).unwrap());
            let moments = moments.close();
            let tokens = lengths[0] + lengths[1];
            assert_eq!((moments.tokens(), moments.features()), (tokens, features));
            for i in 0..features {
                for j in 0..features {
                    let exact: f64 = windows
                        .iter()
                        .flat_map(|x| (0..x.tokens()).map(move |t| (x.get(i, t), x.get(j, t))))
                        .map(|(a, b)| f64::from(a) * f64::from(b))
                        .sum::<f64>()
                        / tokens as f64;
                    let found = moments.full().unwrap()[i * features + j];
                    assert!((f64::from(found) - exact).abs() < 1e-4, "{i} {j}: {found} {exact}");
                    if i == j {
                        assert!((moments.diagonal()[i] - exact).abs() < 1e-9);
                    }
                }
            }
        }
    }

    #[test]
    fn moments_are_the_same_bits_on_any_number_of_threads() {
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut moments = Moments::new(203, Extent::Full).unwrap();
                (0..3).for_each(|i| moments.add(&activations(203, 97 + i, i)).unwrap());
                moments.close()
            })
        };
        let one = on(1);
        assert!(one == on(2) && one == on(7));
    }

    #[test]
    fn what_is_not_finite_is_refused() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30] {
            let mut x = activations(20, 5, 0);
            x.set(7, 3, bad);
            let error = Moments::new(20, Extent::Diagonal).unwrap().add(&x).unwrap_err().to_string();
            assert!(error.contains("feature 7"), "{error}");
        }
        assert!(Moments::new(3, Extent::Full).unwrap().add(&activations(4, 1, 0)).is_err());
        assert!(matches!(Moments::new(usize::MAX / 2, Extent::Full), Err(Error::Limit(_))));
    }
}
