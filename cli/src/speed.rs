//! `llmpress speed`: how fast models run, beside each other.

use llmpress_validation::{Rate, SpeedOptions, speed};

use crate::Outcome;
use crate::args::SpeedArgs;
use crate::models::{in_pool, open_model};
use crate::report::{Output, table};

pub(crate) fn run(args: &SpeedArgs, output: Output) -> Outcome {
    in_pool(args.jobs, || measure(args, output))
}

fn measure(args: &SpeedArgs, output: Output) -> Outcome {
    let models =
        args.models.iter().map(|dir| open_model(dir, args.device, output)).collect::<Result<Vec<_>, _>>()?;
    let named: Vec<_> =
        args.models.iter().zip(&models).map(|(dir, model)| (dir.display().to_string(), &**model)).collect();
    let options = SpeedOptions {
        prompt_tokens: args.prompt_tokens,
        new_tokens: args.new_tokens,
        runs: usize::from(args.runs),
        peers: args.peer.clone(),
    };
    let rows = speed(&named, &options, &mut |line| output.progress(line))?;
    output.result(&rows, || {
        let rate = |r: &Rate| format!("{:.1} ({:.1}-{:.1})", r.median, r.min, r.max);
        let mut lines =
            vec![["", "prefill tokens/s", "decode tokens/s", "first token"].map(str::to_owned).to_vec()];
        lines.extend(rows.iter().map(|row| {
            vec![
                row.name.clone(),
                rate(&row.prefill_tokens_per_s),
                rate(&row.decode_tokens_per_s),
                format!("{:.3} s", row.time_to_first_token_s),
            ]
        }));
        format!(
            "prompt of {} tokens, {} more one at a time, {} threads, {} rounds: median (range)\n\n{}",
            args.prompt_tokens,
            args.new_tokens,
            rayon::current_num_threads(),
            args.runs,
            table(&lines)
        )
    });
    Ok(())
}
