//! Training: it gets nearer to the dense model, the same bytes however it is run, and says what is wrong.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::io::{Cursor, Write};
use std::path::Path;
use std::sync::Arc;

use llmpress_formats::{Checkpoint, Result};
use llmpress_model::Model;
use llmpress_sparsify::ast::{
    Ast, Evaluated, Outcome, Record, Start, Stepped, Task, Text, Then, Watch, measure, train,
};
use llmpress_sparsify::{FinishedBlock, Job, Residuals, Sink, Sparsifier, State, run};

fn open(family: &str) -> Model {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/golden").join(family);
    Model::open(Arc::new(Checkpoint::open(&dir).unwrap())).unwrap()
}

struct Starts(Vec<Start>);

impl Sink for Starts {
    fn block(&mut self, _: usize, finished: FinishedBlock, _: Option<&mut Residuals>) -> Result<()> {
        self.0.extend(finished.tensors.iter().map(Start::from));
        Ok(())
    }
}

fn starts(model: &mut Model, how: &str) -> Vec<Start> {
    let layers = 0..model.config().layers.len();
    let tensors = layers.flat_map(|layer| model.inputs_of(layer)).flat_map(|input| input.tensors);
    let how: Sparsifier = how.parse().unwrap();
    let hows: BTreeMap<String, Sparsifier> = tensors.map(|tensor| (tensor, how)).collect();
    let room = llmpress_calibrate::Room { memory: 1 << 24, file: "none".into() };
    let job = Job { hows: &hows, calibration: None, room: &room, hessians: 1 << 24 };
    let mut starts = Starts(Vec::new());
    run(model, job, State::default(), &mut starts).unwrap();
    starts.0
}

fn text(model: &Model, settings: &Ast) -> Text {
    let ids = (0..3000usize).map(|i| ((i * i * 7 + i * 3 + i / 11) % model.vocab_size()) as u32).collect();
    Text::new(ids, settings.window as usize, settings.batch as usize).unwrap()
}

/// Keeps the state of some step, and may stop there.
#[derive(Default)]
struct Log {
    steps: Vec<Stepped>,
    found: Vec<Evaluated>,
    keep_at: u32,
    stop: bool,
    state: Vec<u8>,
}

impl Watch<Record> for Log {
    fn tell(&mut self, record: Record) -> Result<()> {
        match record {
            Record::Stepped(step) => self.steps.push(step),
            Record::Evaluated(found) => self.found.push(found),
        }
        Ok(())
    }

    fn then(&mut self, step: u32) -> Then {
        match step == self.keep_at {
            true if self.stop => Then::Stop,
            true => Then::Keep,
            false => Then::Go,
        }
    }

    fn keep(&mut self, _: u32, write: &mut dyn FnMut(&mut dyn Write, &Path) -> Result<()>) -> Result<()> {
        self.state.clear();
        write(&mut self.state, Path::new("state"))
    }
}

fn go(
    model: &Model,
    starts: &[Start],
    settings: Ast,
    from: Option<&[u8]>,
    log: &mut Log,
) -> Result<Option<Outcome>> {
    let text = text(model, &settings);
    let judge = text.held();
    let task = Task { dense: model, starts, text: &text, settings, judge: &judge, evaluate: 0 };
    let mut from = from.map(Cursor::new);
    train(task, from.as_mut().map(|from| (from as &mut dyn std::io::Read, Path::new("state"))), log)
}

fn quick() -> Ast {
    "ast:steps=24,batch=2,window=33,every=4,lr=0.003,decay=0.01,slorb".parse().unwrap()
}

fn same(a: &Outcome, b: &Outcome) -> bool {
    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
    let matrices = a.matrices.iter().zip(&b.matrices).all(|(a, b)| {
        a.tensor == b.tensor
            && a.sparse.masks() == b.sparse.masks()
            && bits(a.sparse.values()) == bits(b.sparse.values())
            && a.sums.as_deref().map(bits) == b.sums.as_deref().map(bits)
    });
    matrices && a.norms == b.norms && a.matrices.len() == b.matrices.len()
}

#[test]
fn training_comes_nearer_to_the_dense_model_and_moves_all_that_it_trains() {
    for family in ["llama", "gemma3_text", "phi3", "granite", "olmo2", "gemma2"] {
        let mut model = open(family);
        let starts = starts(&mut model, "magnitude");
        let mut log = Log::default();
        let settings = Ast { kd: 1.0, steps: 40, ..quick() };
        let outcome = go(&model, &starts, settings, None, &mut log).unwrap().unwrap();
        let (first, last) = (log.found.first().unwrap(), log.found.last().unwrap());
        assert!(last.divergence < 0.9 * first.divergence, "{family}: {first:?} {last:?}");
        assert!(first.dense == last.dense && log.steps.len() == 40);
        assert!(log.steps.iter().any(|s| s.flips.is_some_and(|f| f > 0)), "{family}");
        assert!(log.steps[3].flips.is_some() && log.steps[4].flips.is_none());
        for (was, is) in starts.iter().zip(&outcome.matrices) {
            assert!(was.tensor == is.tensor && was.sparse != is.sparse, "{family} {}", was.tensor);
            assert!(is.sums.as_ref().is_some_and(|s| s.iter().any(|s| *s != 0.0)));
        }
        let normed = model.sub_layers().into_iter().filter(|site| model.norm_tensor(*site).is_some());
        assert_eq!(outcome.norms.len(), normed.count() + 1, "{family}");
        for norm in &outcome.norms {
            assert!(norm.values.iter().any(|w| *w != norm.values[0]), "{family} {}", norm.tensor);
        }
        // What is stored is what was judged.
        let text = text(&model, &quick());
        let again = measure(&model, &outcome, &text.held()).unwrap();
        assert_eq!((again.perplexity, again.divergence), (last.perplexity, last.divergence), "{family}");
    }
}

#[test]
fn a_run_that_was_stopped_ends_with_the_bytes_of_one_that_was_not() {
    let mut model = open("llama");
    let starts = starts(&mut model, "magnitude");
    let mut whole = Log { keep_at: 10, ..Log::default() };
    let outcome = go(&model, &starts, quick(), None, &mut whole).unwrap().unwrap();
    let mut stopped = Log { keep_at: 10, stop: true, ..Log::default() };
    assert!(go(&model, &starts, quick(), None, &mut stopped).unwrap().is_none());
    assert!(stopped.state == whole.state && stopped.steps.len() == 10);
    let mut rest = Log::default();
    let resumed = go(&model, &starts, quick(), Some(&stopped.state), &mut rest).unwrap().unwrap();
    assert!(same(&resumed, &outcome) && rest.steps == whole.steps[10..]);
    assert_eq!(rest.found.last(), whole.found.last());
    // A state of another run is none of this one.
    let other = Ast { seed: 1, ..quick() };
    let mut fresh = Log::default();
    go(&model, &starts, other, Some(&stopped.state), &mut fresh).unwrap().unwrap();
    assert_eq!(fresh.steps.len(), 24);
    // What was cut off or changed is refused.
    let mut spoilt = stopped.state.clone();
    *spoilt.get_mut(5000).unwrap() ^= 1;
    for bytes in [&spoilt[..], &stopped.state[..stopped.state.len() - 1], &stopped.state[..30], b"AST0....."]
    {
        let error = go(&model, &starts, quick(), Some(bytes), &mut Log::default()).unwrap_err().to_string();
        assert!(error.contains("state"), "{error}");
    }
}

#[test]
fn the_bytes_are_the_same_on_any_number_of_threads() {
    let mut model = open("llama");
    let starts = starts(&mut model, "magnitude");
    let settings = Ast { steps: 6, ..quick() };
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut log = Log { keep_at: 6, ..Log::default() };
            go(&model, &starts, settings, None, &mut log).unwrap().unwrap();
            (log.state, log.steps, log.found)
        })
    };
    assert!(on(1) == on(3));
}

#[test]
fn fixed_masks_stay_and_dropped_weights_decay() {
    let mut model = open("llama");
    let starts = starts(&mut model, "magnitude");
    let mut log = Log::default();
    let fixed: Ast = "ast:steps=12,batch=2,window=33,lr=0.003,fixed,static,kd=0".parse().unwrap();
    let outcome = go(&model, &starts, fixed, None, &mut log).unwrap().unwrap();
    for (was, is) in starts.iter().zip(&outcome.matrices) {
        assert!(was.sparse.masks() == is.sparse.masks() && was.sparse != is.sparse && is.sums.is_none());
    }
    assert!(log.steps.iter().all(|s| s.flips.is_none() && s.divergence.is_none()));
    assert!(log.steps.iter().all(|s| s.lambda > 0.0 && s.lambda == log.steps[0].lambda));
    assert!(log.steps.last().unwrap().likelihood < log.steps[0].likelihood);
}

#[test]
fn a_loss_that_is_no_number_names_its_step_and_what_it_takes() {
    let mut model = open("llama");
    let mut starts = starts(&mut model, "magnitude");
    let values = starts[2].sparse.masks().len() * 4;
    let cols = starts[2].sparse.cols();
    let masks = starts[2].sparse.masks().to_vec();
    starts[2].sparse = llmpress_sparsify::Sparse::new(&vec![f32::NAN; values], masks, cols).unwrap();
    let error = go(&model, &starts, quick(), None, &mut Log::default()).unwrap_err().to_string();
    assert!(error.contains("step 1") && error.contains("lr="), "{error}");
    let mut experts = open("mixtral");
    let error =
        go(&experts, &self::starts(&mut open("llama"), "magnitude"), quick(), None, &mut Log::default());
    assert!(error.unwrap_err().to_string().contains("experts"));
    let none =
        go(&open("llama"), &self::starts(&mut experts, "magnitude"), quick(), None, &mut Log::default());
    assert!(none.is_err());
}
