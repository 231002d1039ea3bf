//! Models whose weights are codes: run as those of the values that the codes stand for.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;

use crate::finished::{self, owned};
use llmpress_formats::encoding::abq::{Abq, Floats, Packed, Zero};
use llmpress_formats::{Checkpoint, Dtype, Encoding};
use llmpress_model::{Cache, Error, Model, Skips, Unobserved, Weights};

/// Round to nearest between the least and the greatest weight of each group.
fn quantise(weights: &[f32], cols: usize, abq: Abq) -> Packed<'static> {
    let (mut codes, mut scales, mut offsets) = (Vec::new(), Vec::new(), Vec::new());
    let top = (abq.levels() - 1) as f32;
    for group in weights.chunks(cols).flat_map(|row| row.chunks(abq.group_columns(cols))) {
        let least = group.iter().copied().fold(f32::INFINITY, f32::min);
        let greatest = group.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let scale = ((greatest - least) / top).max(1e-6);
        scales.push(scale);
        offsets.push(least);
        codes.extend(group.iter().map(|w| ((w - least) / scale).round().clamp(0.0, top) as u8));
    }
    let floats = |values: &[f32]| Floats::round(Dtype::F32, values).unwrap();
    Packed::from_codes(abq, cols, &codes, floats(&scales), Zero::Real(floats(&offsets))).unwrap()
}

/// tinylm with the linears of its blocks quantised.
fn view(dir: &Path, abq: Abq, scale_of: impl Fn(&str) -> f32) -> Checkpoint {
    finished::view(dir, |name, weights, cols| {
        let weights: Vec<f32> = weights.iter().map(|w| w * scale_of(name)).collect();
        (Encoding::Abq(abq), owned(quantise(&weights, cols, abq).components()))
    })
}

/// The logits after each token, one token after the other.
fn logits(model: &Model, ids: &[u32], cache: &mut Cache) -> Result<Vec<Vec<f32>>, Error> {
    let hidden = model.hidden(ids, cache, &Skips::new(), &mut Unobserved)?;
    let logits = model.logits(&hidden)?;
    Ok((0..ids.len()).map(|token| logits.token(token).collect()).collect())
}

/// The largest difference by the largest logit.
fn distance(a: &[f32], b: &[f32]) -> f32 {
    let largest = a.iter().fold(0f32, |most, x| most.max(x.abs()));
    a.iter().zip(b).fold(0f32, |most, (a, b)| most.max((a - b).abs())) / largest
}

#[test]
fn codes_give_the_logits_of_the_values_that_they_stand_for() {
    let ids: Vec<u32> = (0..70).map(|i| (i * 37 + 11) % 1000).collect();
    for abq in [
        Abq { group_size: Some(96), ..Abq::new(8) },
        Abq { balanced: true, ..Abq::new(2) },
        Abq { activation_bits: Some(8), group_size: Some(128), ..Abq::new(5) },
        Abq { activation_bits: Some(6), ..Abq::new(8) },
    ] {
        let dir = tempfile::tempdir().unwrap();
        let checkpoint = Arc::new(view(dir.path(), abq, |_| 1.0));
        let model = Model::open(checkpoint.clone()).unwrap();
        let from_codes = logits(&model, &ids, &mut model.cache(ids.len())).unwrap();
        // The same values as plain weights, in BF16: what is lost is their last bits. What they multiply is quantised alike.
        let mut plain = Model::open(checkpoint).unwrap();
        plain.load(Weights::Bf16).unwrap();
        let from_values = logits(&plain, &ids, &mut plain.cache(ids.len())).unwrap();
        let far = distance(&from_codes.concat(), &from_values.concat());
        let most = match abq.activation_bits {
            None => 0.02,
            Some(8) => 0.05,
            // An input that rounds to another of 64 codes moves much.
            Some(_) => 0.2,
        };
        assert!(far > 0.0 && far < most, "{abq:?}: {far}");
        // One token at a time as all at once.
        let mut cache = model.cache(ids.len());
        for (token, id) in ids[..5].iter().enumerate() {
            let one = logits(&model, &[*id], &mut cache).unwrap();
            // Where the last bits of an input differ, it may round to another code.
            let most = if abq.activation_bits.is_some() { most } else { 1e-4 };
            let far = distance(&from_codes[token], &one[0]);
            assert!(far < most, "{abq:?}: {far}");
        }
    }
}

#[test]
fn what_cannot_be_quantised_names_the_linear() {
    let dir = tempfile::tempdir().unwrap();
    let abq = Abq { activation_bits: Some(8), ..Abq::new(8) };
    // So large an up_proj that what down_proj of its layer multiplies is infinite.
    let checkpoint = Arc::new(view(dir.path(), abq, |name| {
        if name.contains("layers.3.mlp.up_proj") || name.contains("layers.3.mlp.gate_proj") {
            1e30
        } else {
            1.0
        }
    }));
    for weights in [Weights::Stored, Weights::Bf16] {
        let mut model = Model::open(checkpoint.clone()).unwrap();
        model.load(weights).unwrap();
        let error = logits(&model, &[1, 2, 3, 4], &mut model.cache(4)).unwrap_err().to_string();
        assert!(error.contains("model.layers.3.mlp.down_proj.weight"), "{error}");
        assert!(error.contains("NaN or infinite") && error.contains("8 bits"), "{error}");
    }
}
