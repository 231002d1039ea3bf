//! Weights that are decoded or encoded anew when a model is opened give the same bits.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;

use llmpress_formats::Checkpoint;
use llmpress_model::{Model, Skips, Unobserved, Weights};

fn bits(model: &Model, ids: &[u32]) -> Vec<u32> {
    let mut cache = model.cache(ids.len());
    let mut bits = Vec::new();
    // Many tokens at once, then one by one: products with one token run otherwise.
    let (head, tail) = ids.split_at(ids.len() - 3);
    for piece in std::iter::once(head).chain(tail.chunks(1)) {
        let hidden = model.hidden(piece, &mut cache, &Skips::new(), &mut Unobserved).unwrap();
        bits.extend(model.logits(&hidden).unwrap().data().iter().map(|x| x.to_bits()));
    }
    bits
}

#[test]
fn every_form_of_weights_gives_the_same_bits() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let golden = root.join("tests/golden");
    let cases = std::fs::read_dir(golden).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir());
    let mut seen = 0;
    for case in cases.chain([root.join("../examples/tinylm")]) {
        let open = || Model::open(Arc::new(Checkpoint::open(&case).unwrap())).unwrap();
        let stored = open();
        let ids: Vec<u32> = (0..20).map(|i| (i * 37 + 5) % stored.vocab_size() as u32).collect();
        let expected = bits(&stored, &ids);
        for weights in [Weights::Stored, Weights::Bf16, Weights::Fixed12, Weights::Dfloat11] {
            let mut model = open();
            model.load(weights).unwrap();
            assert!(bits(&model, &ids) == expected, "{}: {weights:?}", case.display());
            // Experts that are stored the other way round are turned for every token.
            let experts = stored.config().blueprint.experts.as_ref();
            let turned = experts.and_then(|e| e.stacked.as_ref()).is_some_and(|stacked| stacked.transposed);
            let decoded = weights == Weights::Dfloat11 || turned && weights == Weights::Stored;
            assert_eq!(model.decoded_bytes() > 0, decoded, "{}: {weights:?}", case.display());
        }
        seen += 1;
    }
    assert!(seen > 20);
}
