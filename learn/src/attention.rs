//! Self-attention with its derivatives.
//!
//! ```text
//! forward:   q, k, v = W x      [norm] [rope] [q scaled] [quantised]      P = softmax([cap] K q)      heads = V P      y = W_o heads
//! backward:  dW_o = dy heads^T      d heads = W_o^T dy      dP = V^T d heads      dS = P (dP - sum P dP)
//!            dq = K^T dS      dK = dS q^T      dV = P d heads^T      back through rope and norm      dW = d x^T
//! ```
//!
//! Scores are made again on the way back, a head and a panel of queries at a time: what is kept grows with the window, not
//! with its square. The quantising of queries, keys and values lets derivatives pass as they are.

use std::ops::Range;

use llmpress_kernels::cpu::{multiply, quantize_columns, rms_norm, softmax};
use llmpress_model::{HeadRounding, Panels, RopeConfig, Rotation, soft_cap};
use rayon::prelude::*;

use crate::linear::{Back, ByFeature, ByToken, Room, add_gradient, back};
use crate::maps::{self, Maps};
use crate::net::{Given, Gradients, Part, all_norms_back, norm, round};
use crate::norm::norm_back;

/// Attention without its weights.
#[derive(Clone, Debug)]
pub(crate) struct Attention {
    /// Query, key, value.
    pub(crate) projections: [Part; 3],
    pub(crate) output: Part,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) qk_norm: Option<[Vec<f32>; 2]>,
    /// Whether these norm all heads of a token together.
    pub(crate) whole_norms: bool,
    pub(crate) eps: f32,
    pub(crate) window: usize,
    pub(crate) rope: RopeConfig,
    pub(crate) scale: f32,
    /// What scores are capped to.
    pub(crate) cap: Option<f32>,
    /// Of query, key and value.
    pub(crate) rounding: [Option<HeadRounding>; 3],
}

/// What the way back needs.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    /// Query, key and value, as projected; and as heads take them.
    projected: [Panels; 3],
    taken: [Panels; 3],
    /// With what it is of.
    rotation: Option<(RopeConfig, usize, Rotation)>,
    /// Keys and values of each head: `[tokens, head_dim]`, and `[head_dim, tokens]`.
    by_token: [Vec<f32>; 2],
    by_feature: [ByFeature; 2],
    heads: Panels,
    d_heads: Panels,
}

/// Derivatives of one head.
struct Head {
    /// Panel after panel.
    query: Vec<f32>,
    /// `[tokens, head_dim]`.
    key: Vec<f32>,
    value: Vec<f32>,
}

impl Attention {
    /// As [`crate::mlp::Mlp::forward`].
    pub(crate) fn forward(
        &self,
        given: Given<'_>,
        x: &Panels,
        bits: Option<u8>,
        kept: &mut Kept,
        y: &mut Panels,
    ) -> bool {
        let tokens = x.tokens();
        let mut sound = self.take(given, x, 0..3, kept);
        let d = self.head_dim;
        for at in [0, 1] {
            kept.by_feature[at].take(&kept.taken[at + 1]);
            token_rows(&kept.taken[at + 1], d, &mut kept.by_token[at]);
        }
        kept.heads.resize(self.heads * d, tokens);
        let (keys, values, query) = (&kept.by_token[0], &kept.by_feature[1], &kept.taken[0]);
        let widths: Vec<usize> = (0..query.count()).map(|panel| query.width(panel)).collect();
        let tasks: Vec<_> = kept
            .heads
            .panels_mut()
            .enumerate()
            .flat_map(|(panel, data)| {
                data.chunks_exact_mut(d * widths[panel])
                    .enumerate()
                    .map(move |(head, out)| (panel, head, out))
            })
            .collect();
        tasks.into_par_iter().with_max_len(1).for_each(|(panel, head, out)| {
            let kv = head / (self.heads / self.kv_heads);
            let (mut scores, oldest) = (Vec::new(), self.oldest(query.range(panel).start));
            self.scores(&keys[kv * tokens * d..], query, head, panel, &mut scores);
            // Values of a head by feature: rows of all tokens, of which those that are seen.
            multiply(&values.rows(kv * d..(kv + 1) * d)[oldest..], tokens, &scores, widths[panel], out);
        });
        sound &= round(&mut kept.heads, bits);
        self.output.product(given.matrices, None, &kept.heads, y);
        sound
    }

    /// What heads take of query (0), key (1) and value (2), of those that are wanted. False where one cannot be quantised.
    fn take(&self, given: Given<'_>, x: &Panels, wanted: Range<usize>, kept: &mut Kept) -> bool {
        let tokens = x.tokens();
        let is_of = |(rope, of, _): &(RopeConfig, usize, Rotation)| *rope == self.rope && *of == tokens;
        if !kept.rotation.as_ref().is_some_and(is_of) {
            kept.rotation = None;
        }
        let make = || (self.rope.clone(), tokens, Rotation::new(&self.rope, 0, tokens, tokens));
        let (_, _, rotation) = kept.rotation.get_or_insert_with(make);
        let mut sound = true;
        for (at, part) in self.projections.iter().enumerate().filter(|(at, _)| wanted.contains(at)) {
            let bias = given.value_bias.filter(|_| at == 2);
            part.product(given.matrices, bias, x, &mut kept.projected[at]);
            kept.taken[at].clone_from(&kept.projected[at]);
            sound &= self.prepare(at, rotation, &kept.projected[at], &mut kept.taken[at]);
        }
        sound
    }

    /// What it weighs in `x`, which is normed.
    pub(crate) fn maps(&self, given: Given<'_>, x: &Panels, kept: &mut Kept, maps: &mut Maps) -> bool {
        let sound = self.take(given, x, 0..2, kept);
        maps.query.clone_from(&kept.taken[0]);
        token_rows(&kept.taken[1], self.head_dim, &mut maps.keys);
        sound
    }

    /// The mean divergence over heads and tokens.
    pub(crate) fn divergence(&self, kept: &Kept, maps: &Maps) -> f64 {
        let (d, query) = (self.head_dim, &kept.taken[0]);
        let tokens = query.tokens();
        if maps.query.tokens() != tokens || maps.query.features() != query.features() {
            return f64::NAN;
        }
        let of_head = |head: usize| -> f64 {
            let kv = head / (self.heads / self.kv_heads);
            let part = kv * tokens * d..(kv + 1) * tokens * d;
            let (mut scores, mut wanted, mut sum) = (Vec::new(), Vec::new(), 0.0);
            for panel in 0..query.count() {
                self.scores(&kept.by_token[0][part.clone()], query, head, panel, &mut scores);
                self.scores(&maps.keys[part.clone()], &maps.query, head, panel, &mut wanted);
                sum += maps::divergence(&wanted, &scores);
            }
            sum
        };
        let sums: Vec<f64> = (0..self.heads).into_par_iter().with_max_len(1).map(of_head).collect();
        sums.iter().sum::<f64>() / (self.heads * tokens).max(1) as f64
    }

    /// As [`crate::mlp::Mlp::backward`].
    pub(crate) fn backward(
        &self,
        given: Given<'_>,
        x: &ByToken,
        (dy, maps, dx): (&Panels, &[(&Maps, f32)], Option<&mut Panels>),
        (kept, room): (&mut Kept, &mut Room),
        gradients: &mut Gradients,
    ) {
        let matrix = |part: &Part, at| Back {
            weights: part.of(given.matrices),
            cols: part.cols,
            turned: given.turned_part(at),
        };
        let (d, tokens) = (self.head_dim, dy.tokens());
        room.by_token.take(&kept.heads);
        room.by_feature.take(dy);
        add_gradient(&room.by_feature, &room.by_token, self.output.of_mut(&mut gradients.matrices));
        matrix(&self.output, 3).product(dy, room, &mut kept.d_heads);
        let heads: Vec<Head> = (0..self.heads)
            .into_par_iter()
            .with_max_len(1)
            .map(|head| self.head_back(kept, maps, head))
            .collect();
        let group = self.heads / self.kv_heads;
        let mut derivatives = [Panels::zeros(self.heads * d, tokens), Panels::default(), Panels::default()];
        for panel in 0..dy.count() {
            let (range, width) = (dy.range(panel), dy.width(panel));
            let to = derivatives[0].panel_mut(panel).chunks_exact_mut(d * width);
            for (to, head) in to.zip(&heads) {
                to.copy_from_slice(&head.query[d * range.start..d * range.end]);
            }
        }
        for (at, of) in [(1, (|head| &head.key) as fn(&Head) -> &Vec<f32>), (2, |head| &head.value)] {
            // In the order of heads, whatever thread made them.
            let sums: Vec<Vec<f32>> = heads
                .par_chunks(group)
                .map(|group| {
                    let mut sum = vec![0.0; tokens * d];
                    for head in group {
                        sum.iter_mut().zip(of(head)).for_each(|(sum, x)| *sum += x);
                    }
                    sum
                })
                .collect();
            derivatives[at].resize(self.kv_heads * d, tokens);
            for token in 0..tokens {
                let all = sums.iter().flat_map(|sum| &sum[token * d..(token + 1) * d]);
                derivatives[at].set_token(token, all.copied());
            }
        }
        for (at, derivative) in derivatives.iter_mut().enumerate() {
            if let Some((_, _, rotation)) = &kept.rotation {
                self.prepare_back(at, rotation, &kept.projected[at], derivative);
            }
            room.by_feature.take(derivative);
            if at == 2 {
                room.by_feature.add_sums(&mut gradients.value_bias);
            }
            add_gradient(&room.by_feature, x, self.projections[at].of_mut(&mut gradients.matrices));
        }
        if let Some(dx) = dx {
            let parts = self.projections.iter().zip(&derivatives).enumerate();
            back(parts.map(|(at, (part, d))| (matrix(part, at), d)), room, dx);
        }
    }

    /// From what was projected to what heads take: of query (0), key (1) or value (2).
    fn prepare(&self, at: usize, rotation: &Rotation, from: &Panels, x: &mut Panels) -> bool {
        let d = self.head_dim;
        let weights = self.qk_norm.as_ref().and_then(|norms| norms.get(at));
        if let Some(weights) = weights.filter(|_| self.whole_norms) {
            norm(from, weights, self.eps, x);
        }
        let weights = weights.filter(|_| !self.whole_norms);
        let widths: Vec<usize> = (0..x.count()).map(|panel| x.width(panel)).collect();
        let panels: Vec<_> = x.panels_mut().enumerate().collect();
        let one = |(panel, data): (usize, &mut [f32])| {
            let width = widths[panel];
            let heads = data.chunks_exact_mut(d * width).zip(from.panel(panel).chunks_exact(d * width));
            let mut sound = true;
            for (head, from) in heads {
                if let Some(weights) = weights {
                    rms_norm(from, weights, self.eps, width, head);
                }
                if at < 2 {
                    rotation.turn(panel, width, head);
                }
                if at == 0 && self.scale != 1.0 {
                    head.iter_mut().for_each(|q| *q *= self.scale);
                }
                if let Some(HeadRounding { bits, group }) = self.rounding[at] {
                    let groups = head.chunks_mut(group.min(d) * width);
                    sound &= groups.fold(true, |sound, x| sound & quantize_columns(x, width, bits));
                }
            }
            sound
        };
        panels.into_par_iter().map(one).reduce(|| true, |a, b| a & b)
    }

    /// Its derivative, in place.
    fn prepare_back(&self, at: usize, rotation: &Rotation, from: &Panels, x: &mut Panels) {
        if at == 2 {
            return;
        }
        let d = self.head_dim;
        let weights = self.qk_norm.as_ref().and_then(|norms| norms.get(at));
        let of_heads = weights.filter(|_| !self.whole_norms);
        let widths: Vec<usize> = (0..x.count()).map(|panel| x.width(panel)).collect();
        let panels: Vec<_> = x.panels_mut().enumerate().collect();
        panels.into_par_iter().for_each(|(panel, data)| {
            let width = widths[panel];
            let heads = data.chunks_exact_mut(d * width).zip(from.panel(panel).chunks_exact(d * width));
            for (head, from) in heads {
                if at == 0 && self.scale != 1.0 {
                    head.iter_mut().for_each(|q| *q *= self.scale);
                }
                rotation.transposed(panel, width, head);
                if let Some(weights) = of_heads {
                    norm_back(from, weights, self.eps, width, head);
                }
            }
        });
        if let Some(weights) = weights.filter(|_| self.whole_norms) {
            all_norms_back(from, weights, self.eps, x);
        }
    }

    /// The first token that those of a panel, which begins at `start`, may see.
    fn oldest(&self, start: usize) -> usize {
        (start + 1).saturating_sub(self.window)
    }

    /// What a head's queries of a panel take of each token from the oldest on: `[tokens seen, width]`. `keys` are
    /// `[tokens, head_dim]`.
    fn scores(&self, keys: &[f32], query: &Panels, head: usize, panel: usize, scores: &mut Vec<f32>) {
        self.scores_and_slopes(keys, query, head, panel, (scores, None));
    }

    /// The same, and the slopes of the cap, where there is one: of what is capped by what it is of.
    fn scores_and_slopes(
        &self,
        keys: &[f32],
        query: &Panels,
        head: usize,
        panel: usize,
        (scores, slopes): (&mut Vec<f32>, Option<&mut Vec<f32>>),
    ) {
        let (d, width, range) = (self.head_dim, query.width(panel), query.range(panel));
        let oldest = self.oldest(range.start);
        scores.resize((range.end - oldest) * width, 0.0);
        let query = &query.panel(panel)[head * d * width..][..d * width];
        multiply(&keys[oldest * d..range.end * d], d, query, width, scores);
        if let Some(cap) = self.cap {
            scores.iter_mut().for_each(|score| *score = soft_cap(*score, cap));
            if let Some(slopes) = slopes {
                slopes.clear();
                slopes.extend(scores.iter().map(|score| 1.0 - (score / cap) * (score / cap)));
            }
        }
        for (row, scores) in scores.chunks_exact_mut(width).enumerate() {
            let seen = oldest + row;
            if seen > range.start || range.end - 1 - seen >= self.window {
                for (position, score) in range.clone().zip(scores) {
                    if seen > position || position - seen >= self.window {
                        *score = f32::NEG_INFINITY;
                    }
                }
            }
        }
        softmax(scores, width);
    }

    fn head_back(&self, kept: &Kept, maps: &[(&Maps, f32)], head: usize) -> Head {
        let (d, query) = (self.head_dim, &kept.taken[0]);
        let tokens = query.tokens();
        let kv = head / (self.heads / self.kv_heads);
        let part = kv * tokens * d..(kv + 1) * tokens * d;
        let (keys, values) = (&kept.by_token[0][part.clone()], &kept.by_token[1][part.clone()]);
        let key_rows = kept.by_feature[0].rows(kv * d..(kv + 1) * d);
        let mut found =
            Head { query: vec![0.0; tokens * d], key: vec![0.0; tokens * d], value: vec![0.0; tokens * d] };
        let (mut scores, mut wanted, mut slopes) = (Vec::new(), Vec::new(), Vec::new());
        let (mut by_scores, mut products) = (Vec::new(), Vec::new());
        for panel in 0..query.count() {
            let (range, width) = (query.range(panel), query.width(panel));
            let oldest = self.oldest(range.start);
            let seen = range.end - oldest;
            self.scores_and_slopes(keys, query, head, panel, (&mut scores, Some(&mut slopes)));
            let of_panel = head * d * width..(head + 1) * d * width;
            let d_out = &kept.d_heads.panel(panel)[of_panel.clone()];
            by_scores.resize(seen * width, 0.0);
            multiply(&values[oldest * d..range.end * d], d, d_out, width, &mut by_scores);
            products.resize(seen * d, 0.0);
            add_outer(&scores, d_out, width, &mut products, &mut found.value[oldest * d..range.end * d]);
            softmax_back(&scores, &mut by_scores, width);
            for (maps, share) in maps {
                self.scores(&maps.keys[part.clone()], &maps.query, head, panel, &mut wanted);
                let share = share / (self.heads * tokens) as f32;
                maps::divergence_back(&wanted, &scores, share, &mut by_scores);
            }
            // None where nothing is capped.
            by_scores.iter_mut().zip(&slopes).for_each(|(d, slope)| *d *= slope);
            multiply(
                &key_rows[oldest..],
                tokens,
                &by_scores,
                width,
                &mut found.query[d * range.start..d * range.end],
            );
            let of_query = &query.panel(panel)[of_panel];
            add_outer(&by_scores, of_query, width, &mut products, &mut found.key[oldest * d..range.end * d]);
        }
        found
    }
}

/// `out += a x^T` for `a` of rows of `width` and `x` of as many features as `out` has columns.
fn add_outer(a: &[f32], x: &[f32], width: usize, products: &mut [f32], out: &mut [f32]) {
    let d = x.len() / width;
    let mut columns = vec![0.0; x.len()];
    for (feature, row) in x.chunks_exact(width).enumerate() {
        columns[feature..].iter_mut().step_by(d).zip(row).for_each(|(to, x)| *to = *x);
    }
    multiply(a, width, &columns, d, products);
    out.iter_mut().zip(products).for_each(|(out, x)| *out += *x);
}

/// From the derivative by each column's softmax `p` to that by what it was taken of, in place.
fn softmax_back(p: &[f32], d: &mut [f32], width: usize) {
    let mut sums = [0.0f32; llmpress_kernels::cpu::PANEL];
    for (p, d) in p.chunks_exact(width).zip(d.chunks_exact(width)) {
        sums.iter_mut().zip(p.iter().zip(d)).for_each(|(sum, (p, d))| *sum += p * d);
    }
    for (p, d) in p.chunks_exact(width).zip(d.chunks_exact_mut(width)) {
        d.iter_mut().zip(p).zip(&sums).for_each(|((d, p), sum)| *d = p * (*d - sum));
    }
}

/// Heads of `d` features one after the other, each `[tokens, d]`.
fn token_rows(x: &Panels, d: usize, out: &mut Vec<f32>) {
    let tokens = x.tokens();
    out.resize(x.features() * tokens, 0.0);
    out.par_chunks_exact_mut((tokens * d).max(1)).enumerate().for_each(|(head, out)| {
        for panel in 0..x.count() {
            let (range, width) = (x.range(panel), x.width(panel));
            let out = &mut out[range.start * d..range.end * d];
            let rows = x.panel(panel)[head * d * width..].chunks_exact(width).take(d);
            for (feature, row) in rows.enumerate() {
                out[feature..].iter_mut().step_by(d).zip(row).for_each(|(to, x)| *to = *x);
            }
        }
    });
}
