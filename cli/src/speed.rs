//! `llmpress speed`: how fast models run, beside each other.

use llmpress_validation::{Rate, SpeedOptions, SpeedRow, speed};
use serde::Serialize;

use crate::Outcome;
use crate::args::SpeedArgs;
use crate::models::{gpu_memory, in_pool, open_model};
use crate::report::{Output, bytes, table};

/// A row, and what lies in the GPU's memory: of the whole command, so of all models that it measures.
#[derive(Serialize)]
struct Row {
    #[serde(flatten)]
    row: SpeedRow,
    /// Once all models are loaded.
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu_bytes: Option<usize>,
    /// The most there were.
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu_peak_bytes: Option<usize>,
}

pub(crate) fn run(args: &SpeedArgs, output: Output) -> Outcome {
    in_pool(args.jobs, || measure(args, output))
}

fn measure(args: &SpeedArgs, output: Output) -> Outcome {
    let models =
        args.models.iter().map(|dir| open_model(dir, args.device, output)).collect::<Result<Vec<_>, _>>()?;
    let named: Vec<_> =
        args.models.iter().zip(&models).map(|(dir, model)| (dir.display().to_string(), &**model)).collect();
    let loaded = gpu_memory();
    let options = SpeedOptions {
        prompt_tokens: args.prompt_tokens,
        new_tokens: args.new_tokens,
        runs: usize::from(args.runs),
        peers: args.peer.clone(),
    };
    let rows = speed(&named, &options, &mut |line| output.progress(line))?;
    let memory = loaded.zip(gpu_memory()).map(|((now, _), (_, peak))| (now, peak));
    let of = |row| Row { row, gpu_bytes: memory.map(|m| m.0), gpu_peak_bytes: memory.map(|m| m.1) };
    let rows: Vec<Row> = rows.into_iter().map(of).collect();
    output.result(&rows, || {
        let rate = |r: &Rate| format!("{:.1} ({:.1}-{:.1})", r.median, r.min, r.max);
        let mut lines =
            vec![["", "prefill tokens/s", "decode tokens/s", "first token"].map(str::to_owned).to_vec()];
        lines.extend(rows.iter().map(|Row { row, .. }| {
            vec![
                row.name.clone(),
                rate(&row.prefill_tokens_per_s),
                rate(&row.decode_tokens_per_s),
                format!("{:.3} s", row.time_to_first_token_s),
            ]
        }));
        let memory = memory.map(|(now, peak)| {
            format!(
                "\nGPU memory: {} with the models loaded, {} at most\n",
                bytes(now as u64),
                bytes(peak as u64)
            )
        });
        format!(
            "prompt of {} tokens, {} more one at a time, {} threads, {} rounds: median (range)\n\n{}{}",
            args.prompt_tokens,
            args.new_tokens,
            rayon::current_num_threads(),
            args.runs,
            table(&lines),
            memory.unwrap_or_default()
        )
    });
    Ok(())
}
