//! What a change of weights does to a linear's outputs.

use llmpress_formats::{Error, Result};
use llmpress_kernels::cpu::{PANEL, multiply};
use rayon::prelude::*;

use crate::Moments;

/// Rows of a product.
const ROWS: usize = 64;

/// The mean square of what a matrix, `[rows, features]`, gives out, summed over its rows: trace(W H W^T). Of a difference
/// of weights it is their trace-weighted error. Where only the diagonal is known features count as uncorrelated.
///
/// # Errors
/// Not whole rows.
pub fn output_energy(weights: &[f32], moments: &Moments) -> Result<f64> {
    let n = moments.features();
    if n == 0 || !weights.len().is_multiple_of(n) {
        return Err(Error::Invalid(format!("{} weights are no rows of {n}", weights.len())));
    }
    let Some(full) = moments.full() else {
        let row = |row: &[f32]| -> f64 {
            row.iter().zip(moments.diagonal()).map(|(&w, h)| f64::from(w) * f64::from(w) * h).sum()
        };
        let rows: Vec<f64> = weights.par_chunks_exact(n).map(row).collect();
        return Ok(rows.iter().sum());
    };
    // By panels of columns of H; the sums of panels are added in their order.
    let sums: Vec<f64> = (0..n.div_ceil(PANEL))
        .into_par_iter()
        .with_max_len(1)
        .map(|block| {
            let columns = block * PANEL..(block * PANEL + PANEL).min(n);
            let width = columns.len();
            let panel: Vec<f32> =
                full.chunks_exact(n).flat_map(|row| &row[columns.clone()]).copied().collect();
            let mut products = [0.0f32; ROWS * PANEL];
            let mut sum = 0.0;
            for rows in weights.chunks(ROWS * n) {
                let products = &mut products[..rows.len() / n * width];
                multiply(rows, n, &panel, width, products);
                for (row, products) in rows.chunks_exact(n).zip(products.chunks_exact(width)) {
                    let terms = row[columns.clone()].iter().zip(products);
                    sum += terms.map(|(&w, &p)| f64::from(w) * f64::from(p)).sum::<f64>();
                }
            }
            sum
        })
        .collect();
    // Rounding can leave a tiny negative value.
    Ok(sums.iter().sum::<f64>().max(0.0))
}

#[cfg(test)]
mod tests {
    use llmpress_model::Panels;

    use super::*;
    use crate::Extent;

    #[test]
    fn the_energy_is_the_mean_square_of_the_outputs() {
        let (rows, features, tokens) = (70, 101, 130);
        let value = |i: usize| ((i * 7919) % 1013) as f32 / 500.0 - 1.0;
        let mut x = Panels::zeros(features, tokens);
        (0..tokens).for_each(|t| x.set_token(t, (0..features).map(|f| value(t * features + f))));
        let weights: Vec<f32> = (0..rows * features).map(|i| value(i + 77)).collect();
        let of = |extent| {
            let mut moments = Moments::new(features, extent).unwrap();
            moments.add(&x).unwrap();
            output_energy(&weights, &moments.close()).unwrap()
        };
        let mut exact = 0.0;
        for t in 0..tokens {
            for row in weights.chunks_exact(features) {
                let y: f64 = row.iter().zip(x.token(t)).map(|(&w, x)| f64::from(w) * f64::from(x)).sum();
                exact += y * y / tokens as f64;
            }
        }
        assert!((of(Extent::Full) / exact - 1.0).abs() < 1e-4, "{} {exact}", of(Extent::Full));
        let diagonal: f64 = (0..features)
            .map(|f| {
                let h: f64 = (0..tokens).map(|t| f64::from(x.get(f, t)).powi(2)).sum::<f64>() / tokens as f64;
                weights.iter().skip(f).step_by(features).map(|&w| f64::from(w).powi(2) * h).sum::<f64>()
            })
            .sum();
        assert!((of(Extent::Diagonal) / diagonal - 1.0).abs() < 1e-9);
        assert!(output_energy(&weights[1..], &Moments::new(features, Extent::Full).unwrap()).is_err());
    }
}
