//! Measures ways to make a model 2:4 against each other: perplexity and KL divergence on a text, bits a weight, seconds.
//!
//! ```sh
//! cargo run --release -p llmpress-sparsify --example ladder -- \
//!     MODEL --calib CALIB.txt --eval EVAL.txt magnitude wanda sparsegpt sparsegpt,reconstruct sparsegpt,reconstruct,slorb ...
//! ```
//!
//! Windows of evaluation: the first 16 of 512 tokens, no BOS. Calibration: the first 64 of 256 tokens (`--windows`,
//! `--length`). `--layers` prints each tensor's report and what reconstruction came to as well.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use llmpress_calibrate::{Calibration, Cut, Room};
use llmpress_formats::Checkpoint;
use llmpress_model::{Model, Skips, Tokenizer};
use llmpress_sparsify::{Finished, FinishedBlock, Job, Lesson, Residuals, Sink, Sparsifier, State, run};
use llmpress_validation::{Protocol, kl_divergence};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (mut model, mut calib, mut eval) = (PathBuf::new(), PathBuf::new(), PathBuf::new());
    let (mut windows, mut length, mut layers, mut settings) = (64, 256, false, Vec::new());
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or("a value is missing");
        match argument.as_str() {
            "--calib" => calib = value()?.into(),
            "--eval" => eval = value()?.into(),
            "--windows" => windows = value()?.parse()?,
            "--length" => length = value()?.parse()?,
            "--layers" => layers = true,
            _ if model.as_os_str().is_empty() => model = argument.into(),
            setting => settings.push(setting.parse::<Sparsifier>()?),
        }
    }
    let tokenizer = Tokenizer::open(&model)?;
    let checkpoint = Arc::new(Checkpoint::open(&model)?);
    let base = Model::open(checkpoint.clone())?;
    let mut model = Model::open(checkpoint)?;
    let cut = Cut { windows, length, seed: None };
    // The first windows alone: as the prototype and the peers were calibrated, without a BOS.
    let ids = tokenizer.encode(&std::fs::read_to_string(&calib)?)?;
    let calibration = Calibration::new(&ids, cut, None)?;
    let ids = tokenizer.encode(&std::fs::read_to_string(&eval)?)?;
    let protocol = Protocol { window: 512, stride: None, limit: Some(16), bos: None };
    println!(
        "| setting | bits | ppl | base | KL | relative error | seconds |\n|---|---|---|---|---|---|---|"
    );
    for setting in settings {
        let tensors: Vec<String> = (0..model.config().layers.len())
            .flat_map(|layer| model.inputs_of(layer))
            .flat_map(|input| input.tensors)
            .collect();
        let hows: BTreeMap<String, Sparsifier> = tensors.into_iter().map(|t| (t, setting)).collect();
        let file = std::env::temp_dir().join(format!("ladder-streams-{}", std::process::id()));
        let room = Room { memory: 1 << 30, file };
        let started = Instant::now();
        let job = Job { hows: &hows, calibration: Some(&calibration), room: &room, hessians: 1 << 30 };
        let mut kept = Kept { finished: Vec::new(), layers };
        run(&mut model, job, State::default(), &mut kept)?;
        let seconds = started.elapsed().as_secs_f64();
        let (mut bits, mut weights, mut error) = (0.0, 0.0, 0.0);
        for done in &kept.finished {
            model.replace(&done.tensor, done.product())?;
            let count = (done.sparse.rows() * done.sparse.cols()) as f64;
            bits += done.report.bits_per_weight * count;
            weights += count;
            error += done.report.relative_error;
            if layers {
                println!("{:?}", done.report);
            }
        }
        let kl = kl_divergence(&base, &model, &Skips::new(), &ids, protocol, None, &mut |_| ())?;
        println!(
            "| {setting} | {:.3} | {:.3} | {:.3} | {:.4} | {:.5} | {seconds:.1} |",
            bits / weights,
            kl.perplexity,
            kl.base_perplexity,
            kl.kl.mean,
            error / kept.finished.len() as f64
        );
        for done in &kept.finished {
            model.restore(&done.tensor)?;
        }
    }
    Ok(())
}

struct Kept {
    finished: Vec<Finished>,
    layers: bool,
}

impl Sink for Kept {
    fn learned(&mut self, lesson: &Lesson) {
        if self.layers {
            println!("{lesson:?}");
        }
    }

    fn block(
        &mut self,
        _block: usize,
        finished: FinishedBlock,
        _residuals: Option<&mut Residuals>,
    ) -> llmpress_formats::Result<()> {
        for dense in &finished.dense {
            println!("{}: {}", dense.tensor, dense.why);
        }
        self.finished.extend(finished.tensors);
        Ok(())
    }
}
