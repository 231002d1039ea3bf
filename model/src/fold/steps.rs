//! What one transformation does to the rows or the columns of one matrix, and how it is undone.

use std::ops::Range;
use std::sync::Arc;

use llmpress_kernels::cpu::{Hadamard, PANEL};
use rayon::prelude::*;

/// Columns of a matrix whose rows are turned at a time.
const COLUMNS: usize = 16 * PANEL;
/// Rows of a task.
const ROWS: usize = 64;

/// Into the weights, or out of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Fold,
    Undo,
}

/// One change of a matrix; of a bias or a norm as a matrix of one column.
#[derive(Clone, Debug)]
pub(super) enum Step {
    /// Rows `first ..` are divided by scales.
    DivideRows { first: usize, scales: Arc<[f32]> },
    /// Columns are multiplied by scales.
    TimesColumns { scales: Arc<[f32]> },
    /// `W = (I x R) W` on `count` rows from `first` on.
    TurnRows { first: usize, count: usize, by: Arc<Hadamard> },
    /// `W = W (I x R)^T`.
    TurnColumns { by: Arc<Hadamard> },
    /// Row i of those from `first` on is what row `order[i]` of them was.
    PermuteRows { first: usize, order: Arc<[u32]> },
    /// Column i is what column `order[i]` was.
    PermuteColumns { order: Arc<[u32]> },
    /// A norm whose weights, after `offset` is added, are divided by scales; they become 1 where a scale is 0.
    DivideNorm { scales: Arc<[f32]>, offset: f32 },
}

impl Step {
    /// Whether a row of the result depends on its own row alone.
    pub(super) fn by_rows(&self) -> bool {
        !matches!(self, Self::TurnRows { .. } | Self::PermuteRows { .. })
    }

    /// On all rows, on all threads.
    pub(super) fn run(&self, x: &mut [f32], cols: usize, way: Way) {
        if x.is_empty() || cols == 0 {
            return;
        }
        match self {
            Self::TurnRows { first, count, by } => {
                let rows = x.get_mut(first * cols..(first + count) * cols).unwrap_or_default();
                rows.chunks_exact_mut(by.size() * cols).for_each(|block| turn_rows(block, cols, by, way));
            }
            Self::PermuteRows { .. } => self.run_alone(x, cols, 0, way),
            _ => x.par_chunks_mut(ROWS * cols).enumerate().for_each(|(i, rows)| {
                self.run_alone(rows, cols, i * ROWS, way);
            }),
        }
    }

    /// On this thread alone. `x` has the rows from `top` on: all of them where this is not [`Self::by_rows`].
    pub(super) fn run_alone(&self, x: &mut [f32], cols: usize, top: usize, way: Way) {
        if x.is_empty() || cols == 0 {
            return;
        }
        match self {
            Self::DivideRows { first, scales } => {
                for (row, x) in x.chunks_exact_mut(cols).enumerate() {
                    let scale = (top + row).checked_sub(*first).and_then(|i| scales.get(i));
                    if let Some(s) = scale {
                        x.iter_mut().for_each(|x| *x = if way == Way::Fold { *x / s } else { *x * s });
                    }
                }
            }
            Self::TimesColumns { scales } => {
                for row in x.chunks_exact_mut(cols) {
                    for (x, s) in row.iter_mut().zip(&**scales) {
                        *x = match way {
                            Way::Fold => *x * s,
                            Way::Undo if *s == 0.0 => *x,
                            Way::Undo => *x / s,
                        };
                    }
                }
            }
            Self::TurnRows { first, count, by } => {
                let rows = x.get_mut(first * cols..(first + count) * cols).unwrap_or_default();
                for block in rows.chunks_exact_mut(by.size() * cols) {
                    for at in (0..cols).step_by(PANEL) {
                        let columns = at..(at + PANEL).min(cols);
                        let panel = turned(block, cols, columns.clone(), by, way);
                        put(block, cols, columns, &panel);
                    }
                }
            }
            Self::TurnColumns { by } => {
                x.chunks_exact_mut(by.size()).for_each(|block| turn(block, 1, by, way));
            }
            Self::PermuteRows { first, order } => {
                let rows = x.get_mut(first * cols..(first + order.len()) * cols).unwrap_or_default();
                let before = rows.to_vec();
                for (now, then) in moves(order, way) {
                    rows[now * cols..][..cols].copy_from_slice(&before[then * cols..][..cols]);
                }
            }
            Self::PermuteColumns { order } => {
                let mut before = vec![0.0; cols];
                for row in x.chunks_exact_mut(cols) {
                    before.copy_from_slice(row);
                    moves(order, way).for_each(|(now, then)| row[now] = before[then]);
                }
            }
            Self::DivideNorm { scales, offset } => {
                for (x, s) in x.iter_mut().zip(scales.iter().skip(top)) {
                    let n = *x + offset;
                    let changed = match way {
                        Way::Fold if *s == 0.0 => 1.0,
                        Way::Fold => n / s,
                        Way::Undo => n * s,
                    };
                    *x = changed - offset;
                }
            }
        }
    }

    /// `H = A H A^T`, where the inputs are A times what they were; false where A does not say what they become.
    pub(super) fn turn_moments(&self, h: &mut [f32], n: usize) -> bool {
        match self {
            Self::TimesColumns { scales } => {
                if scales.contains(&0.0) {
                    return false;
                }
                for (row, s) in h.chunks_exact_mut(n.max(1)).zip(&**scales) {
                    row.iter_mut().zip(&**scales).for_each(|(h, t)| *h = *h / s / t);
                }
            }
            Self::TurnColumns { by } => {
                // A is block-diagonal: columns of each run of rows, then every row.
                for rows in h.chunks_exact_mut((by.size() * n).max(1)) {
                    turn_rows(rows, n, by, Way::Fold);
                }
                h.par_chunks_exact_mut(n.max(1)).for_each(|row| {
                    row.chunks_exact_mut(by.size()).for_each(|block| by.forward(block, 1));
                });
            }
            Self::PermuteColumns { order } => {
                let before = h.to_vec();
                for (row, then) in h.chunks_exact_mut(n.max(1)).zip(&**order) {
                    let before = &before[*then as usize * n..][..n];
                    row.iter_mut().zip(&**order).for_each(|(h, column)| *h = before[*column as usize]);
                }
            }
            // Rows of a matrix are no inputs.
            Self::DivideRows { .. }
            | Self::TurnRows { .. }
            | Self::PermuteRows { .. }
            | Self::DivideNorm { .. } => {}
        }
        true
    }
}

/// What goes where: a place, and the one that it is filled from. An order was checked to name each place once.
fn moves(order: &[u32], way: Way) -> impl Iterator<Item = (usize, usize)> {
    order.iter().enumerate().map(move |(place, from)| match way {
        Way::Fold => (place, *from as usize),
        Way::Undo => (*from as usize, place),
    })
}

fn turn(x: &mut [f32], width: usize, by: &Hadamard, way: Way) {
    match way {
        Way::Fold => by.forward(x, width),
        Way::Undo => by.back(x, width),
    }
}

/// Some columns of a matrix of `by.size()` rows, turned: a panel.
fn turned(x: &[f32], cols: usize, columns: Range<usize>, by: &Hadamard, way: Way) -> Vec<f32> {
    let width = columns.len();
    let mut panel: Vec<f32> = x.chunks_exact(cols).flat_map(|row| &row[columns.clone()]).copied().collect();
    turn(&mut panel, width, by, way);
    panel
}

fn put(x: &mut [f32], cols: usize, columns: Range<usize>, panel: &[f32]) {
    for (row, from) in x.chunks_exact_mut(cols).zip(panel.chunks_exact(columns.len())) {
        row[columns.clone()].copy_from_slice(from);
    }
}

/// Turns the columns of a matrix of `by.size()` rows, some side by side on all threads.
fn turn_rows(x: &mut [f32], cols: usize, by: &Hadamard, way: Way) {
    for first in (0..cols).step_by(COLUMNS) {
        let last = (first + COLUMNS).min(cols);
        let tiles: Vec<Range<usize>> =
            (first..last).step_by(PANEL).map(|at| at..(at + PANEL).min(last)).collect();
        let from = &*x;
        let panels: Vec<Vec<f32>> =
            tiles.par_iter().map(|tile| turned(from, cols, tile.clone(), by, way)).collect();
        tiles.into_iter().zip(&panels).for_each(|(tile, panel)| put(x, cols, tile, panel));
    }
}
