//! Measures pruning.
//!
//! ```text
//! cargo bench -p llmpress-prune -- search MODEL CALIB [windows] [removals]   cached prefixes against whole passes
//! cargo bench -p llmpress-prune -- table MODEL RANKINGS WINDOWS TEXT...      what each ranking in a directory costs
//! cargo bench -p llmpress-prune -- distances MODEL RANKINGS COUNT TEXT       how far each leaves the logits, by every distance
//! ```

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use llmpress_calibrate::{Calibration, Cut};
use llmpress_formats::Checkpoint;
use llmpress_model::{Model, Panels, Skips, Tokenizer, Unobserved};
use llmpress_prune::{
    DistanceKind, FinerCut, Ranking, Scored, Search, distances, finercut, last_ranking, random_ranking,
};
use rayon::prelude::*;

/// Tokens of a window of evaluation.
const WINDOW: usize = 512;
/// Shares of the sub-layers that are removed.
const SHARES: [f64; 5] = [5.0, 10.0, 20.0, 25.0, 30.0];
/// Seeds of the random baseline.
const SEEDS: u64 = 5;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["search", model, calib, ref rest @ ..] => search(model, calib, rest),
        ["table", model, rankings, windows, ref texts @ ..] => {
            table(model, rankings, windows.parse().unwrap(), texts)
        }
        ["distances", model, rankings, count, text] => {
            all_distances(model, rankings, count.parse().unwrap(), text);
        }
        // `cargo bench` of the whole workspace runs this on what the repository has.
        _ => {
            let tinylm = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/tinylm");
            search(tinylm, &format!("{tinylm}/eval.txt"), &["2", "4"]);
        }
    }
}

fn open(dir: &str) -> (Model, Tokenizer) {
    let checkpoint = Checkpoint::open(Path::new(dir)).unwrap();
    (Model::open(Arc::new(checkpoint)).unwrap(), Tokenizer::open(Path::new(dir)).unwrap())
}

/// The same search in both ways, in turn.
fn search(dir: &str, calib: &str, rest: &[&str]) {
    let (model, tokenizer) = open(dir);
    let ids = tokenizer.encode(&std::fs::read_to_string(calib).unwrap()).unwrap();
    let number = |i: usize, default: usize| rest.get(i).map_or(default, |n| n.parse().unwrap());
    let calibration =
        Calibration::new(&ids, Cut { windows: number(0, 2), length: 256, seed: None }, None).unwrap();
    let run = |search| {
        let options = FinerCut { distance: DistanceKind::Angular, protect: 0.4, count: number(1, 4), search };
        let start = Instant::now();
        let ranking = finercut(&model, &options, &calibration, None, &mut || (), &mut |_| Ok(())).unwrap();
        (start.elapsed().as_secs_f64(), ranking)
    };
    let mut ratios = Vec::new();
    for round in 1..=3 {
        let ((plain, a), (cached, b)) = (run(Search::Plain), run(Search::CachedPrefixes));
        assert_eq!(a, b, "both find the same");
        println!(
            "round {round}: whole passes {plain:.2} s, cached prefixes {cached:.2} s: {:.1} %",
            cached / plain * 100.0
        );
        ratios.push(cached / plain);
    }
    ratios.sort_by(f64::total_cmp);
    println!("median {:.1} % of the time", ratios[1] * 100.0);
}

/// A text's windows with what the whole model says of them.
struct Text {
    windows: Vec<Vec<u32>>,
    /// Natural logarithms of the whole model's probabilities, vocabulary x tokens.
    base: Vec<Panels>,
}

/// Mean negative log-probability and divergence from the whole model, nats a token.
#[derive(Clone, Copy, Default)]
struct Cost {
    nll: f64,
    kl: f64,
}

fn log_probabilities(model: &Model, window: &[u32], skips: &Skips) -> Panels {
    let mut cache = model.cache(window.len());
    let hidden = model.hidden(window, &mut cache, skips, &mut Unobserved).unwrap();
    let mut logits = model.logits(&hidden).unwrap();
    let widths: Vec<usize> = (0..logits.count()).map(|panel| logits.width(panel)).collect();
    let panels: Vec<(usize, &mut [f32])> = logits.panels_mut().enumerate().collect();
    panels.into_par_iter().for_each(|(panel, data)| {
        let width = widths[panel];
        for token in 0..width {
            let column = || (token..data.len()).step_by(width);
            let max = column().fold(f32::NEG_INFINITY, |max, i| max.max(data[i]));
            let sum: f64 = column().map(|i| f64::from((data[i] - max).exp())).sum();
            let normaliser = (f64::from(max) + sum.ln()) as f32;
            (token..data.len()).step_by(width).for_each(|i| data[i] -= normaliser);
        }
    });
    logits
}

impl Text {
    fn new(model: &Model, tokenizer: &Tokenizer, path: &str, windows: usize) -> Self {
        let ids = tokenizer.encode(&std::fs::read_to_string(path).unwrap()).unwrap();
        let windows: Vec<Vec<u32>> = ids.chunks_exact(WINDOW).take(windows).map(<[u32]>::to_vec).collect();
        let base = windows.iter().map(|window| log_probabilities(model, window, &Skips::new())).collect();
        Self { windows, base }
    }

    fn cost(&self, model: &Model, skips: &Skips) -> Cost {
        let mut cost = Cost::default();
        let mut scored = 0;
        for (window, base) in self.windows.iter().zip(&self.base) {
            let found = log_probabilities(model, window, skips);
            let tokens: Vec<usize> = (0..window.len() - 1).collect();
            let of_tokens: Vec<Cost> = tokens
                .into_par_iter()
                .map(|token| {
                    let pairs = base.token(token).zip(found.token(token));
                    let kl = pairs.map(|(p, q)| f64::from(p).exp() * (f64::from(p) - f64::from(q))).sum();
                    Cost { nll: -f64::from(found.get(window[token + 1] as usize, token)), kl }
                })
                .collect();
            for one in &of_tokens {
                cost.nll += one.nll;
                cost.kl += one.kl;
            }
            scored += of_tokens.len();
        }
        Cost { nll: cost.nll / scored as f64, kl: cost.kl / scored as f64 }
    }
}

fn read_rankings(model: &Model, dir: &str) -> Vec<Ranking> {
    let mut paths: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|e| e == "json"));
    paths.sort();
    let rankings: Vec<Ranking> = paths.iter().map(|path| Ranking::read(path).unwrap()).collect();
    rankings.iter().for_each(|ranking| ranking.check(model).unwrap());
    rankings
}

/// The distances between the logits of the whole model and of what rankings leave after `count` sub-layers, over ten windows of
/// calibration; and how much of the logits is the same for every token of the vocabulary, which no probability depends on.
fn all_distances(dir: &str, rankings: &str, count: usize, text: &str) {
    let (model, tokenizer) = open(dir);
    let ids = tokenizer.encode(&std::fs::read_to_string(text).unwrap()).unwrap();
    let calibration = Calibration::new(&ids, Cut { windows: 10, length: 256, seed: None }, None).unwrap();
    let logits = |window: &[u32], skips: &Skips| {
        let mut cache = model.cache(window.len());
        model.logits(&model.hidden(window, &mut cache, skips, &mut Unobserved).unwrap()).unwrap()
    };
    let whole: Vec<Panels> =
        calibration.windows().iter().map(|window| logits(window, &Skips::new())).collect();
    let (mut of_means, mut squares) = (0.0, 0.0);
    for panels in &whole {
        for token in 0..panels.tokens() {
            let sum: f64 = panels.token(token).map(f64::from).sum();
            of_means += sum * sum / panels.features() as f64;
            squares += panels.token(token).map(|x| f64::from(x).powi(2)).sum::<f64>();
        }
    }
    println!("share of the squared norm of logits that is their mean: {:.1} %", of_means / squares * 100.0);
    println!("| ranking | removed | angular | euclidean | js |\n|---|---|---|---|---|");
    for ranking in read_rankings(&model, rankings) {
        let mut skips = Skips::new();
        for entry in &ranking.removed {
            if skips.len() < count {
                skips.extend(entry.sub_layers());
            }
        }
        let pairs: Vec<_> =
            calibration.windows().iter().zip(&whole).map(|(window, a)| (a, logits(window, &skips))).collect();
        let values = DistanceKind::ALL.map(|kind| {
            let each = pairs.iter().flat_map(|(a, b)| distances(kind, a, b));
            let sum: f64 = each.sum();
            if kind == DistanceKind::Euclidean { sum.sqrt() } else { sum / calibration.tokens() as f64 }
        });
        let [angular, euclidean, js] = values;
        println!("| {} | {} | {angular:.3} | {euclidean:.0} | {js:.3} |", ranking.method, skips.len());
    }
}

/// Perplexity, divergence and size for shares of every ranking in a directory, and of the baselines.
fn table(dir: &str, rankings: &str, windows: usize, texts: &[&str]) {
    let (model, tokenizer) = open(dir);
    let checkpoint = || Checkpoint::open(Path::new(dir)).unwrap();
    let whole: u64 = checkpoint().tensors().values().map(|t| t.bytes).sum();
    let texts: Vec<Text> = texts.iter().map(|path| Text::new(&model, &tokenizer, path, windows)).collect();
    let row = |name: &str, removed: usize, size: f64, costs: &[Cost]| {
        let costs: Vec<String> = costs.iter().map(|c| format!("{:.2} | {:.3}", c.nll.exp(), c.kl)).collect();
        println!("| {name} | {removed} | {size:.1} % | {} |", costs.join(" | "));
    };
    let dense: Vec<Cost> = texts.iter().map(|text| text.cost(&model, &Skips::new())).collect();
    row("nothing", 0, 100.0, &dense);
    let mut all: Vec<(String, Vec<Ranking>)> = read_rankings(&model, rankings)
        .into_iter()
        .map(|ranking| (ranking.method.clone(), vec![ranking]))
        .collect();
    all.push(("drop:last".to_owned(), vec![last_ranking(&model)]));
    all.push((
        format!("drop:random, mean of {SEEDS} seeds"),
        (0..SEEDS).map(|s| random_ranking(&model, s)).collect(),
    ));
    for (name, rankings) in all {
        for share in SHARES {
            let wanted = (share / 100.0 * model.sub_layers().len() as f64).round() as usize;
            // Layers come in twos: an odd number lies between two rows.
            let pairs =
                rankings.iter().all(|ranking| ranking.removed.iter().all(|s| s.sub_layers().len() == 2));
            let counts = if pairs && wanted % 2 == 1 { vec![wanted - 1, wanted + 1] } else { vec![wanted] };
            for count in counts {
                let entries = if pairs { count / 2 } else { count };
                if rankings.iter().any(|ranking| ranking.removed.len() < entries) {
                    continue;
                }
                let mut sum = vec![Cost::default(); texts.len()];
                let mut size = 0.0;
                for ranking in &rankings {
                    let removal = ranking.removal(entries, false).unwrap();
                    let skips: Skips =
                        ranking.removed[..entries].iter().flat_map(Scored::sub_layers).collect();
                    let edit = removal.edit(&checkpoint()).unwrap();
                    let edited = checkpoint().edited(&edit).unwrap();
                    let bytes = edited.tensors().values().map(|t| t.bytes).sum::<u64>();
                    size += bytes as f64 / whole as f64 * 100.0;
                    for (sum, text) in sum.iter_mut().zip(&texts) {
                        let cost = text.cost(&model, &skips);
                        sum.nll += cost.nll;
                        sum.kl += cost.kl;
                    }
                }
                let n = rankings.len() as f64;
                let mean: Vec<Cost> = sum.iter().map(|c| Cost { nll: c.nll / n, kl: c.kl / n }).collect();
                row(&name, count, size / n, &mean);
            }
        }
    }
}
