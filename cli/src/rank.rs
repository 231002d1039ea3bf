//! `llmpress rank`: the order in which sub-layers would be pruned, and why.

use llmpress_formats::write_atomic;
use llmpress_pipeline::{Saved, rank};
use llmpress_prune::{Kind, Method, Ranking, svg};

use crate::Outcome;
use crate::args::RankArgs;
use crate::progress::Bars;
use crate::report::{Output, table};

/// Most removals that are printed.
const SHOWN: usize = 40;

pub(crate) fn run(args: &RankArgs, output: Output) -> Outcome {
    let saved = args.out.as_deref().map(|path| Saved { path, resume: args.resume });
    let jobs = args.jobs.map(usize::from);
    let ranking = rank(&args.dir, &args.by, &args.calibration.text()?, jobs, saved, &Bars(output))?;
    // What is filled in the picture: all of a search, nothing of a whole ranking.
    let filled = match args.by.method {
        Method::FinerCut { .. } | Method::Drop { iterative: true, .. } => args.by.count(&ranking)?,
        _ => 0,
    };
    if let Some(path) = &args.out {
        ranking.write(path)?;
    }
    if let Some(path) = &args.svg {
        write_atomic(path, svg(&ranking, filled)?.as_bytes())?;
    }
    output.result(&ranking, || text(&ranking));
    Ok(())
}

fn text(ranking: &Ranking) -> String {
    let name = |kind| match kind {
        Kind::Attention => "attention",
        Kind::Mlp => "MLP",
        Kind::Block => "layer",
    };
    let mut lines = vec![["", "layer", "", "score"].map(str::to_owned).to_vec()];
    lines.extend(ranking.removed.iter().take(SHOWN).enumerate().map(|(i, s)| {
        vec![(i + 1).to_string(), s.layer.to_string(), name(s.kind).to_owned(), format!("{:.6}", s.score)]
    }));
    let more = ranking.removed.len().saturating_sub(SHOWN);
    let more = if more > 0 { format!("and {more} more\n") } else { String::new() };
    let on = match ranking.windows {
        0 => String::new(),
        windows => format!(" on {windows} windows of {} tokens", ranking.window),
    };
    format!("{}{on}: what goes first\n\n{}{more}", ranking.method, table(&lines))
}
