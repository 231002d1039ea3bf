//! What the calls of each step say, held against what must be.

use serde::Deserialize;
use serde_json::Value;

use super::call::Done;
use super::findings::{Card, Findings, KernelProof, ModelSpeed};
use super::known::Known;
use crate::{KernelReport, SpeedRow};

/// How near the processor's perplexity the GPU's must be: inputs of products are rounded to BF16 there.
const NEAR: f64 = 5e-3;
/// Proofs whose faults are named in a check; all are in the report.
const NAMED_FAULTS: usize = 5;

/// The outputs of the calls that can be read; what cannot is a failed check.
fn values<'a, T: serde::de::DeserializeOwned>(
    calls: impl Iterator<Item = &'a Done>,
    found: &mut Findings,
) -> Vec<(&'a str, T)> {
    let mut values = Vec::new();
    for call in calls {
        match call.value() {
            Ok(value) => values.push((call.name(), value)),
            // The call's own fault says why.
            Err(_) if call.report.fault.is_some() => (),
            Err(why) => found.check(format!("{} readable", call.name()), false, why),
        }
    }
    values
}

/// `doctor`, then `nvidia-smi`: which GPU there is, and that every kernel loads.
pub(super) fn doctor(calls: &[Done], ordinal: usize) -> Findings {
    let mut found = Findings::default();
    let reports: Vec<(&str, Value)> = values(calls.iter().filter(|c| !c.optional), &mut found);
    // Without its answer the other steps find out by themselves.
    let Some((_, report)) = reports.first() else { return found };
    let empty = Vec::new();
    let gpus = report["gpus"].as_array().unwrap_or(&empty);
    let Some(gpu) = gpus.iter().find(|gpu| gpu["ordinal"].as_u64() == Some(ordinal as u64)) else {
        let why = match report["no_gpu"].as_str() {
            Some(why) => why.to_owned(),
            None => format!("there is no GPU {ordinal}: the driver finds {}", gpus.len()),
        };
        found.check("a GPU to run on", false, why.clone());
        found.no_gpu = Some(why);
        return found;
    };
    let text = |key: &str| gpu[key].as_str().unwrap_or("unknown").to_owned();
    let card = Card {
        name: text("name"),
        compute_capability: text("compute_capability"),
        multiprocessors: gpu["multiprocessors"].as_u64().unwrap_or(0),
        memory_bytes: gpu["memory_bytes"].as_u64().unwrap_or(0),
        driver_cuda: text("driver_cuda"),
        kernels_loaded_s: gpu["kernels_loaded_s"].as_f64(),
        nvidia_smi: calls
            .iter()
            .find(|c| c.optional && c.report.fault.is_none())
            .map(Done::text)
            .filter(|text| !text.is_empty()),
    };
    found.check("a GPU to run on", true, card.name.clone());
    let loaded = card.kernels_loaded_s.map(|s| format!("in {s:.1} s"));
    let fault = gpu["fault"].as_str().map(str::to_owned);
    found.check(
        "every kernel loading",
        fault.is_none(),
        fault.or(loaded).unwrap_or_else(|| "doctor does not say".to_owned()),
    );
    found.card = Some(card);
    found
}

/// Every kernel against its reference on the processor: a line of JSON a proof, also of a run that was cut short.
pub(super) fn proofs(calls: &[Done], _: &Known) -> Findings {
    let proofs = calls.iter().flat_map(Done::lines::<KernelProof>).collect();
    let mut found = Findings { proofs, ..Findings::default() };
    let faults: Vec<String> = found
        .proofs
        .iter()
        .filter_map(|p| Some(format!("{} {}: {}", p.kernel, p.shape, p.fault.as_ref()?)))
        .collect();
    let count = found.proofs.len();
    let named = faults.iter().take(NAMED_FAULTS).map(String::as_str).collect::<Vec<_>>().join("; ");
    let what = "every kernel equal to its reference on the processor";
    if faults.is_empty() {
        // Where it hangs or crashes, the next one is at fault.
        let last = found.proofs.last().filter(|_| calls.iter().any(|call| call.report.fault.is_some()));
        let last = last.map(|p| format!(", the last {} {}", p.kernel, p.shape)).unwrap_or_default();
        found.check(what, count > 0, format!("{count} proofs hold{last}"));
    } else {
        found.check(what, false, format!("{} of {count} proofs fail: {named}", faults.len()));
    }
    found
}

/// Nothing but that the calls end well.
pub(super) fn ends(_: &[Done], _: &Known) -> Findings {
    Findings::default()
}

#[derive(Deserialize)]
struct PerplexityLine {
    perplexity: f64,
}

/// Perplexities: of the encodings equal bit for bit, and near the processor's.
pub(super) fn perplexity(calls: &[Done], _: &Known) -> Findings {
    let mut found = Findings::default();
    let values: Vec<(&str, PerplexityLine)> = values(calls.iter(), &mut found);
    let of_gpu: Vec<(&str, f64)> =
        values.iter().filter(|(name, _)| *name != "cpu").map(|(name, v)| (*name, v.perplexity)).collect();
    let list = |values: &[(&str, f64)]| {
        values.iter().map(|(name, v)| format!("{name} {v}")).collect::<Vec<_>>().join(", ")
    };
    if let Some((_, first)) = of_gpu.first() {
        let same = of_gpu.iter().all(|(_, v)| v.to_bits() == first.to_bits());
        found.check("all encodings' perplexity the same number, bit for bit", same, list(&of_gpu));
        if let Some((_, cpu)) = values.iter().find(|(name, _)| *name == "cpu") {
            let off = first / cpu.perplexity - 1.0;
            found.check(
                format!("the GPU's perplexity within {NEAR} of the processor's"),
                off.abs() <= NEAR,
                format!("{first:.6} and {:.6}: {off:+.2e}", cpu.perplexity),
            );
        }
    }
    found
}

/// Logits and greedy tokens of the conversions against the plain model's.
pub(super) fn logits(calls: &[Done], _: &Known) -> Findings {
    let mut found = Findings::default();
    let values: Vec<(&str, Value)> = values(calls.iter(), &mut found);
    for (name, report) in &values {
        let logits = &report["logits"];
        let count = logits["logits"].as_u64().unwrap_or(0);
        let differing = logits["differing"].as_u64();
        let held = count > 0 && differing == Some(0) && logits["first_generated"].is_null();
        let what = match differing {
            Some(differing) => format!(
                "{differing} of {count} differ, {} greedy tokens{}",
                logits["generated"],
                if logits["first_generated"].is_null() { " equal" } else { ", not all equal" }
            ),
            None => "no logits were compared".to_owned(),
        };
        found.check(format!("{name}'s logits those of plain BF16, bit for bit"), held, what);
    }
    found
}

#[derive(Deserialize)]
struct Text {
    tokens: Vec<u32>,
}

/// Texts: each way of drawing gives the same tokens from every encoding. The processor may choose others where two are
/// nearly as likely: how far it agrees is said, not judged.
pub(super) fn texts(calls: &[Done], _: &Known) -> Findings {
    let mut found = Findings::default();
    let values: Vec<(&str, Text)> = values(calls.iter(), &mut found);
    for way in ["greedy", "drawn"] {
        let of_gpu: Vec<(&str, &[u32])> = values
            .iter()
            .filter_map(|(name, text)| Some((name.strip_suffix(way)?.trim_end(), &*text.tokens)))
            .filter(|(weights, _)| *weights != "cpu")
            .collect();
        let Some((_, first)) = of_gpu.first() else { continue };
        let other: Vec<&str> = of_gpu.iter().filter(|(_, t)| t != first).map(|(name, _)| *name).collect();
        let said = if other.is_empty() {
            format!("{} tokens, {} encodings", first.len(), of_gpu.len())
        } else {
            format!("{} differ from {}", other.join(", "), of_gpu[0].0)
        };
        found.check(
            format!("{way} text of every encoding the same"),
            other.is_empty() && !first.is_empty(),
            said,
        );
        let cpu =
            values.iter().find(|(name, _)| name.strip_suffix(way).is_some_and(|w| w.trim_end() == "cpu"));
        if let Some((_, cpu)) = cpu {
            let same = cpu.tokens.iter().zip(*first).take_while(|(a, b)| a == b).count();
            found.check(
                format!("{way} text beside the processor's"),
                true,
                format!("{same} of {} tokens before the first other choice", cpu.tokens.len()),
            );
        }
    }
    found
}

/// `bench kernels`: the rows, the limits measured with them, and that every result is right.
pub(super) fn kernels(calls: &[Done], _: &Known) -> Findings {
    let mut found = Findings::default();
    let values: Vec<(&str, KernelReport)> = values(calls.iter(), &mut found);
    for (_, report) in values {
        let wrong: Vec<String> = report
            .rows
            .iter()
            .filter(|row| !row.correct)
            .map(|row| format!("{} on {} x {}, {} tokens", row.kernel, row.n, row.k, row.m))
            .collect();
        let said = if wrong.is_empty() { format!("{} rows", report.rows.len()) } else { wrong.join("; ") };
        found.check("every product and decode right", wrong.is_empty() && !report.rows.is_empty(), said);
        found.ceilings = Some(report.ceilings);
        found.no_cublas = report.no_cublas;
        found.kernels.extend(report.rows);
    }
    found
}

#[derive(Deserialize)]
struct Made {
    layers: u64,
    bytes: u64,
}

/// The model of 8B shapes.
pub(super) fn made(calls: &[Done], _: &Known) -> Findings {
    let mut found = Findings::default();
    let values: Vec<(&str, Made)> = values(calls.iter(), &mut found);
    for (_, Made { layers, bytes }) in values {
        found.layers = Some(layers);
        found.check("a model made", layers > 0, format!("{layers} layers, {:.1} GB", bytes as f64 / 1e9));
    }
    found
}

#[derive(Deserialize)]
struct SpeedLine {
    #[serde(flatten)]
    row: SpeedRow,
    gpu_bytes: Option<u64>,
    gpu_peak_bytes: Option<u64>,
}

/// `speed` of a model: calls are named by the weights.
pub(super) fn speeds(calls: &[Done], known: &Known) -> Findings {
    let mut found = Findings::default();
    let values: Vec<(&str, Vec<SpeedLine>)> = values(calls.iter(), &mut found);
    for (weights, rows) in values {
        found.check(
            format!("{weights} measured"),
            !rows.is_empty(),
            rows.iter()
                .map(|line| format!("{:.1} tokens/s of decode", line.row.decode_tokens_per_s.median))
                .collect::<String>(),
        );
        found.speeds.extend(rows.into_iter().map(|line| ModelSpeed {
            weights: weights.to_owned(),
            layers: known.layers.unwrap_or(0),
            prefill_tokens_per_s: line.row.prefill_tokens_per_s,
            decode_tokens_per_s: line.row.decode_tokens_per_s,
            time_to_first_token_s: line.row.time_to_first_token_s,
            gpu_bytes: line.gpu_bytes,
            gpu_peak_bytes: line.gpu_peak_bytes,
        }));
    }
    found
}
