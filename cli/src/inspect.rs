//! `llmpress inspect`: what is in a checkpoint.

use std::collections::BTreeMap;
use std::sync::Arc;

use llmpress_entropy::dfloat11::Histogram;
use llmpress_formats::{BaseEntry, Checkpoint, Dtype, Encoding, StoredSize, Transform, printable};
use llmpress_model::Model;
use serde::Serialize;

use crate::Outcome;
use crate::args::InspectArgs;
use crate::cache_size::CacheSize;
use crate::report::{Output, bytes, percent, table};

/// What stands for all widths together.
const ALL_WIDTHS: &str = "all";

#[derive(Debug, Serialize)]
struct Report {
    directory: String,
    kind: &'static str,
    architecture: Option<String>,
    model_type: Option<String>,
    parameters: u64,
    tensor_bytes: u64,
    stored_bytes: u64,
    shards: usize,
    by_dtype: BTreeMap<&'static str, Count>,
    by_encoding: BTreeMap<&'static str, EncodingCount>,
    /// What is quantised, by widths and groups.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    quantised: BTreeMap<String, QuantisedCount>,
    /// What is stored as two in four without loss, by how its values are.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    sparse: BTreeMap<String, QuantisedCount>,
    /// What was done to the weights beside storing them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    transforms: Vec<String>,
    /// How keys and values are held, where as codes.
    #[serde(skip_serializing_if = "Option::is_none")]
    cache: Option<CacheSize>,
    tied: BTreeMap<String, String>,
    /// The checkpoint that its tensors are stored by.
    #[serde(skip_serializing_if = "Option::is_none")]
    base: Option<BaseEntry>,
    /// Weights beside the checkpoint that are no part of it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    left_out: Vec<String>,
    /// Stored tensors that the model which the configuration describes does not use, where it runs here.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    unused: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tensors: Vec<Row>,
    #[serde(skip_serializing_if = "Option::is_none")]
    exponents: Option<Exponents>,
}

#[derive(Debug, Default, Serialize)]
struct Count {
    tensors: u64,
    bytes: u64,
}

#[derive(Debug, Default, Serialize)]
struct EncodingCount {
    units: u64,
    tensors: u64,
    bytes: u64,
    stored_bytes: u64,
}

/// Bits a weight count everything that is stored: codes, scales, zero points.
#[derive(Debug, Default, Serialize)]
struct QuantisedCount {
    tensors: u64,
    weights: u64,
    stored_bytes: u64,
    bits_per_weight: f64,
}

impl QuantisedCount {
    fn add(&mut self, weights: u64, stored_bytes: u64) {
        self.tensors += 1;
        self.weights += weights;
        self.stored_bytes += stored_bytes;
        self.bits_per_weight = bits_per_weight(self.stored_bytes, self.weights);
    }
}

fn bits_per_weight(stored_bytes: u64, weights: u64) -> f64 {
    stored_bytes as f64 * 8.0 / weights.max(1) as f64
}

#[derive(Debug, Serialize)]
struct Row {
    name: String,
    dtype: &'static str,
    shape: Vec<u64>,
    bytes: u64,
    encoding: &'static str,
    unit: String,
    /// Of a quantised tensor: widths and group size.
    #[serde(skip_serializing_if = "Option::is_none")]
    widths: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bits_per_weight: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    exponent_entropy_bits: Option<f64>,
}

/// Entropy of the exponents of all BF16 tensors.
#[derive(Debug, Serialize)]
struct Exponents {
    bf16_tensors: u64,
    entropy_bits: f64,
    /// Bits a weight that no coder of exponents alone can beat: entropy, sign and mantissa.
    limit_bits: f64,
    limit_share_of_bf16: f64,
}

pub(crate) fn run(args: &InspectArgs, output: Output) -> Outcome {
    let checkpoint = Arc::new(Checkpoint::open_dequantised(&args.dir)?);
    // Only where its architecture runs here.
    let model = Model::open(checkpoint.clone()).ok();
    let mut entropies = BTreeMap::new();
    let mut all = Histogram::new();
    if args.entropy {
        for (name, tensor) in checkpoint.tensors().iter().filter(|(_, t)| t.dtype == Dtype::BF16) {
            let mut histogram = Histogram::new();
            let mut words = vec![0u16; (1 << 20).min(tensor.bytes as usize / 2)];
            let mut at = 0;
            while at < tensor.bytes {
                let take = (tensor.bytes - at).min(words.len() as u64 * 2) as usize;
                checkpoint.read(name, at, words_as_bytes(&mut words[..take / 2]))?;
                histogram.add(&words[..take / 2]);
                at += take as u64;
            }
            entropies.insert(name.as_str(), histogram.entropy_bits());
            all.merge(&histogram);
        }
    }
    let report = report(&checkpoint, args, &entropies, &all, model.as_ref());
    output.result(&report, || text(&report));
    // The process ends: to free a million names one by one would take a fifth of its time.
    std::mem::forget(checkpoint);
    Ok(())
}

fn words_as_bytes(words: &mut [u16]) -> &mut [u8] {
    bytemuck::cast_slice_mut(words)
}

fn report(
    checkpoint: &Checkpoint,
    args: &InspectArgs,
    entropies: &BTreeMap<&str, f64>,
    all: &Histogram,
    model: Option<&Model>,
) -> Report {
    let unused = model.map(|model| model.unused().to_vec()).unwrap_or_default();
    let cache = model.and_then(|model| Some((model.cache_bits()?, model.cache_bytes_per_token())));
    let config = checkpoint.config();
    let mut by_dtype: BTreeMap<&'static str, Count> = BTreeMap::new();
    let by_encoding: BTreeMap<&'static str, EncodingCount> = checkpoint
        .stored_sizes()
        .into_iter()
        .map(|(encoding, StoredSize { units, tensors, bytes, stored_bytes })| {
            (encoding, EncodingCount { units, tensors, bytes, stored_bytes })
        })
        .collect();
    let has_units = args.tensors || by_encoding.keys().any(|encoding| *encoding != "raw");
    let (mut parameters, mut tensor_bytes) = (0, 0);
    let mut tensors = Vec::new();
    let mut quantised: BTreeMap<String, QuantisedCount> = BTreeMap::new();
    let mut sparse: BTreeMap<String, QuantisedCount> = BTreeMap::new();
    for (name, t) in checkpoint.tensors() {
        let weights = t.shape.iter().product::<u64>();
        parameters += weights;
        // Of a million plain tensors nobody asks for units, which would have to be made.
        let unit = if has_units { checkpoint.units().get(&t.unit) } else { None };
        let widths = unit.and_then(|unit| Some((unit.encoding().widths()?, unit.stored_bytes())));
        let quantises = |encoding: &Encoding| {
            encoding.is_lossy() || matches!(encoding, Encoding::Scaled(_) | Encoding::Ggml(_))
        };
        let is_quantised = unit.is_some_and(|unit| quantises(unit.encoding()));
        if let Some((widths, stored_bytes)) = &widths {
            let sorts = if is_quantised { &mut quantised } else { &mut sparse };
            for key in [widths.as_str(), ALL_WIDTHS] {
                sorts.entry(key.to_owned()).or_default().add(weights, *stored_bytes);
            }
        }
        tensor_bytes += t.bytes;
        let count = by_dtype.entry(t.dtype.name()).or_default();
        count.tensors += 1;
        count.bytes += t.bytes;
        if args.tensors {
            let own = checkpoint.units().get(name).filter(|u| matches!(u.encoding(), Encoding::Same { .. }));
            let encoding = own.or(unit).map_or("", |u| u.encoding().name());
            tensors.push(Row {
                name: name.clone(),
                dtype: t.dtype.name(),
                shape: t.shape.clone(),
                bytes: t.bytes,
                encoding,
                unit: t.unit.clone(),
                bits_per_weight: widths.as_ref().map(|(_, stored)| bits_per_weight(*stored, weights)),
                widths: widths.map(|(widths, _)| widths),
                exponent_entropy_bits: entropies.get(name.as_str()).copied(),
            });
        }
    }
    let limit = all.entropy_bits() + 8.0;
    Report {
        directory: checkpoint.root().display().to_string(),
        kind: checkpoint.kind().name(),
        architecture: config.and_then(|c| c.architecture()).map(str::to_owned),
        model_type: config.and_then(|c| c.model_type()).map(str::to_owned),
        parameters,
        tensor_bytes,
        stored_bytes: by_encoding.values().map(|c| c.stored_bytes).sum(),
        shards: checkpoint.directory().shards().len(),
        by_dtype,
        by_encoding,
        quantised,
        sparse,
        transforms: Transform::summary(checkpoint.transforms()),
        cache: cache.map(CacheSize::new),
        tied: checkpoint.tied().clone(),
        base: checkpoint.manifest().and_then(|manifest| manifest.base.clone()),
        left_out: checkpoint.directory().left_out().to_vec(),
        unused,
        tensors,
        exponents: args.entropy.then(|| Exponents {
            bf16_tensors: entropies.len() as u64,
            entropy_bits: all.entropy_bits(),
            limit_bits: limit,
            limit_share_of_bf16: limit / 16.0,
        }),
    }
}

fn text(report: &Report) -> String {
    let mut text = format!(
        "{}: {} checkpoint, {}\n{} parameters in {} shards, {} of tensors, {} stored ({})\n\n",
        report.directory,
        report.kind,
        report.architecture.as_deref().or(report.model_type.as_deref()).unwrap_or("no architecture named"),
        report.parameters,
        report.shards,
        bytes(report.tensor_bytes),
        bytes(report.stored_bytes),
        percent(report.stored_bytes, report.tensor_bytes),
    );
    if !report.transforms.is_empty() {
        text.push_str(&format!("transformed: {}\n", report.transforms.join(", ")));
        text.push_str(&report.cache.as_ref().map(CacheSize::text).unwrap_or_default());
        text.push('\n');
    }
    let head = |names: &[&str]| vec![names.iter().map(|n| (*n).to_owned()).collect::<Vec<String>>()];
    if !report.tensors.is_empty() {
        let mut rows =
            head(&["tensor", "dtype", "shape", "size", "encoding", "bits a weight", "exponent bits"]);
        for row in &report.tensors {
            let entropy = row.exponent_entropy_bits.map(|e| format!("{e:.3}")).unwrap_or_default();
            rows.push(vec![
                row.name.clone(),
                row.dtype.to_owned(),
                format!("{:?}", row.shape),
                bytes(row.bytes),
                row.widths.as_ref().map_or(row.encoding.to_owned(), |w| format!("{}:{w}", row.encoding)),
                row.bits_per_weight.map(|bits| format!("{bits:.3}")).unwrap_or_default(),
                entropy,
            ]);
        }
        text.push_str(&table(&rows));
        text.push('\n');
    }
    let mut rows = head(&["dtype", "tensors", "size"]);
    for (dtype, count) in &report.by_dtype {
        rows.push(vec![(*dtype).to_owned(), count.tensors.to_string(), bytes(count.bytes)]);
    }
    text.push_str(&table(&rows));
    text.push('\n');
    let mut rows = head(&["encoding", "units", "tensors", "size", "stored", "share"]);
    for (encoding, count) in &report.by_encoding {
        rows.push(vec![
            (*encoding).to_owned(),
            count.units.to_string(),
            count.tensors.to_string(),
            bytes(count.bytes),
            bytes(count.stored_bytes),
            percent(count.stored_bytes, count.bytes),
        ]);
    }
    text.push_str(&table(&rows));
    for (sort, counts) in [("quantised", &report.quantised), ("sparse", &report.sparse)] {
        if counts.is_empty() {
            continue;
        }
        let mut rows = head(&[sort, "tensors", "weights", "stored", "bits a weight"]);
        let (all, kinds): (Vec<_>, Vec<_>) = counts.iter().partition(|(widths, _)| *widths == ALL_WIDTHS);
        // One kind is all there is.
        let shown = if kinds.len() > 1 { kinds.into_iter().chain(all).collect() } else { kinds };
        for (widths, count) in shown {
            rows.push(vec![
                widths.clone(),
                count.tensors.to_string(),
                count.weights.to_string(),
                bytes(count.stored_bytes),
                format!("{:.3}", count.bits_per_weight),
            ]);
        }
        text.push('\n');
        text.push_str(&table(&rows));
    }
    if let Some(base) = &report.base {
        text.push_str(&format!(
            "\ndelta: its difference from {} (BLAKE3 of its tensors {}), which restore and verify take as --base\n",
            printable(&base.name),
            base.blake3
        ));
    }
    for (name, target) in &report.tied {
        text.push_str(&format!("\n{} is tied to {}\n", printable(name), printable(target)));
    }
    if !report.left_out.is_empty() {
        text.push_str(&format!("\nno part of it: {}\n", printable(&report.left_out.join(", "))));
    }
    if !report.unused.is_empty() {
        text.push_str(&format!("\nnot used by the model: {} tensors\n", report.unused.len()));
        for name in &report.unused {
            text.push_str(&format!("  {name}\n"));
        }
    }
    if let Some(e) = &report.exponents {
        text.push_str(&format!(
            "\nexponents of {} BF16 tensors: {:.3} bits of entropy; no coder of exponents alone gets below {:.2} bits a weight ({:.1} % of BF16)\n",
            e.bf16_tensors,
            e.entropy_bits,
            e.limit_bits,
            e.limit_share_of_bf16 * 100.0
        ));
    }
    text
}
