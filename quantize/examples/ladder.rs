//! Measures rungs against each other on a model: perplexity and KL divergence on a text, bits a weight, seconds.
//!
//! ```sh
//! cargo run --release -p llmpress-quantize --example ladder -- \
//!     MODEL --calib CALIB.txt --eval EVAL.txt rtn:w4 grid:w3,g128 gptq:w2,g64 gptq:w4a4,rotate ...
//! ```
//!
//! Windows of evaluation: the first 16 of 512 tokens, no BOS. Calibration: the first 64 of 256 tokens (`--windows`,
//! `--length`); where the whole model is learned, `--learn-windows` of `--learn-text` for that instead. `--layers` prints each tensor's
//! relative error and what learning came to as well.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use llmpress_calibrate::{Calibration, Cut, Room};
use llmpress_formats::{Checkpoint, Transform};
use llmpress_learn::Watch;
use llmpress_model::{Model, Skips, Tokenizer};
use llmpress_quantize::{
    Finished, FinishedBlock, Job, Learned, Lesson, Measured, Quantiser, Record, Residuals, Sink, Spec, State,
    WholeTask, assign_widths, learn_whole, run,
};
use llmpress_validation::{Protocol, kl_divergence};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (mut model, mut calib, mut eval) = (PathBuf::new(), PathBuf::new(), PathBuf::new());
    let (mut learn_text, mut learn_windows) = (PathBuf::new(), 0);
    let (mut windows, mut length, mut layers, mut settings) = (64, 256, false, Vec::new());
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or("a value is missing");
        match argument.as_str() {
            "--calib" => calib = value()?.into(),
            "--eval" => eval = value()?.into(),
            "--windows" => windows = value()?.parse()?,
            "--length" => length = value()?.parse()?,
            "--learn-text" => learn_text = value()?.into(),
            "--learn-windows" => learn_windows = value()?.parse()?,
            "--layers" => layers = true,
            setting if setting.contains(':') => settings.push(setting.to_owned()),
            _ => model = argument.into(),
        }
    }
    let tokenizer = Tokenizer::open(&model)?;
    let checkpoint = Arc::new(Checkpoint::open(&model)?);
    let base = Model::open(checkpoint.clone())?;
    let mut model = Model::open(checkpoint)?;
    let cut = Cut { windows, length, seed: None };
    // The first windows alone: as the prototype and the peers were calibrated, without a BOS.
    let text = std::fs::read_to_string(&calib)?;
    let ids = tokenizer.encode(&text)?;
    let calibration = Calibration::new(&ids, cut, None)?;
    let whole_calibration = match learn_windows {
        0 => calibration.clone(),
        windows => {
            let text = std::fs::read_to_string(&learn_text)?;
            Calibration::new(&tokenizer.encode(&text)?, Cut { windows, length, seed: None }, None)?
        }
    };
    let text = std::fs::read_to_string(&eval)?;
    let ids = tokenizer.encode(&text)?;
    let protocol = Protocol { window: 512, stride: None, limit: Some(16), bos: None };
    println!(
        "| setting | bits | ppl | base | KL | relative error | seconds |\n|---|---|---|---|---|---|---|"
    );
    for setting in settings {
        let Quantiser { spec, with, mean } = setting.parse()?;
        let tensors: Vec<String> = (0..model.config().layers.len())
            .flat_map(|layer| model.inputs_of(layer))
            .flat_map(|input| input.tensors)
            .collect();
        let mut specs: BTreeMap<String, Spec> = tensors.iter().map(|t| (t.clone(), spec)).collect();
        let room = Room { memory: 1 << 30, file: std::env::temp_dir().join("ladder-streams") };
        let started = Instant::now();
        if let Some(mean) = mean {
            specs = assign_widths(&mut model, &specs, mean, &calibration, &room, &mut Unwatched)?;
            let mut counts: BTreeMap<u8, usize> = BTreeMap::new();
            specs.values().for_each(|spec| *counts.entry(spec.abq.bits).or_default() += 1);
            eprintln!("{setting}: matrices by width: {counts:?}");
        }
        let transforms = with.of(&model, Some(&calibration))?;
        let job = Job {
            specs: &specs,
            transforms: &transforms,
            calibration: Some(&calibration),
            room: &room,
            hessians: 1 << 30,
        };
        let mut kept = Kept(Vec::new(), Vec::new(), layers);
        run(&mut model, job, State::default(), &mut kept)?;
        let seconds = started.elapsed().as_secs_f64();
        let learned = std::mem::take(&mut kept.1);
        model.transform(learned.into_iter().chain(transforms).collect())?;
        (0..model.config().layers.len()).try_for_each(|layer| model.fold_layer(layer))?;
        let whole = specs.values().any(|spec| spec.whole().is_some());
        let (mut bits, mut weights, mut error) = (0.0, 0.0, 0.0);
        for done in &kept.0 {
            let (rows, cols) = (done.unit.rows(), done.unit.cols());
            let mut values = vec![0.0; rows * cols];
            for (row, values) in values.chunks_exact_mut(cols).enumerate() {
                done.unit.decode_row(row, values)?;
            }
            model.replace_quantised(&done.tensor, values, spec.abq.activation_bits)?;
            let count = (rows * cols) as f64;
            bits += done.unit.bits_per_weight() * count;
            weights += count;
            error += done.report.relative_error;
            if layers {
                println!("{:?}", done.report);
            }
        }
        let mut seconds = seconds;
        if whole {
            let started = Instant::now();
            learn_whole_model(&base, &mut model, &specs, &kept, &whole_calibration)?;
            seconds += started.elapsed().as_secs_f64();
        }
        let kl = kl_divergence(&base, &model, &Skips::new(), &ids, protocol, None, &mut |_| ())?;
        println!(
            "| {setting} | {:.3} | {:.3} | {:.3} | {:.4} | {:.5} | {seconds:.1} |",
            bits / weights,
            kl.perplexity,
            kl.base_perplexity,
            kl.kl.mean,
            error / kept.0.len() as f64
        );
        (0..model.config().layers.len()).try_for_each(|layer| model.unfold_layer(layer))?;
        model.transform(Vec::new())?;
    }
    Ok(())
}

/// Learns the whole model, and puts what came of it in its place.
fn learn_whole_model(
    base: &Model,
    model: &mut Model,
    specs: &BTreeMap<String, Spec>,
    kept: &Kept,
    calibration: &Calibration,
) -> Result<(), Box<dyn Error>> {
    let missing = |tensor: &str| llmpress_formats::Error::Invalid(format!("{tensor} is not there"));
    let unit = |tensor: &str| {
        let done = kept.0.iter().find(|done| done.tensor == tensor).and_then(|done| done.unit.abq());
        done.cloned().ok_or_else(|| missing(tensor))
    };
    let task = WholeTask { dense: base, start: &*model, specs, unit: &unit, calibration };
    let Some(found) = learn_whole(task, None, &mut Told(kept.2))? else { return Ok(()) };
    let Learned { before, after, taken } = found.learned;
    eprintln!("whole model: {before:.5} -> {after:.5?}, taken: {taken} {:?}", found.unlearned);
    for (tensor, unit) in found.units {
        let mut values = vec![0.0; unit.rows() * unit.cols()];
        for (row, values) in values.chunks_exact_mut(unit.cols()).enumerate() {
            unit.decode_row(row, values)?;
        }
        let bits = specs.get(&tensor).and_then(|spec| spec.abq.activation_bits);
        model.replace_quantised(&tensor, values, bits)?;
    }
    Ok(())
}

/// Prints evaluations, and steps where they are wanted.
struct Told(bool);

impl Watch<Record> for Told {
    fn tell(&mut self, record: Record) -> llmpress_formats::Result<()> {
        match record {
            Record::Evaluated(found) => eprintln!("{found:?}"),
            Record::Stepped(step) if self.0 => eprintln!("{step:?}"),
            Record::Stepped(_) => {}
        }
        Ok(())
    }
}

struct Kept(Vec<Finished>, Vec<Transform>, bool);

impl Sink for Kept {
    fn learned(&mut self, lesson: &Lesson) {
        if self.2 {
            let Learned { before, after, taken } = lesson.learned;
            println!("{} {}: {before:.5} -> {after:.5?}, taken: {taken}", lesson.what.name(), lesson.layer);
        }
    }

    fn block(
        &mut self,
        _block: usize,
        finished: FinishedBlock,
        _residuals: Option<&mut Residuals>,
    ) -> llmpress_formats::Result<()> {
        self.0.extend(finished.tensors);
        self.1.extend(finished.transforms);
        Ok(())
    }
}

/// Nobody watches.
struct Unwatched;

impl Measured for Unwatched {
    fn start(&mut self, _weights: u64) {}
    fn step(&mut self, _weights: u64) {}
}
