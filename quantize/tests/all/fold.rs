//! Rotations and scales that a model gets: of every architecture, and what they leave.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use crate::support::{goldens, logits, open, single, worst};
use llmpress_calibrate::{Calibration, Cut};
use llmpress_formats::{Error, RotationSite, Transform};
use llmpress_model::{Model, Observer, Panels, Skips};
use llmpress_quantize::{Rotate, Smooth, rotations, smoothing};

/// What a logit may differ by, as a share of the largest one.
const TOLERANCE: f32 = 1e-4;

fn fold(model: &mut Model, list: Vec<Transform>) {
    model.transform(list).unwrap();
    (0..model.config().layers.len()).for_each(|layer| model.fold_layer(layer).unwrap());
}

fn calibration(ids: &[u32]) -> Calibration {
    let length = ids.len() / 2;
    Calibration::new(ids, Cut { windows: 2, length, seed: None }, None).unwrap()
}

fn of_family(model: &Model) -> Rotate {
    let residual = rotations(model, "r1".parse().unwrap(), 1).is_ok();
    Rotate { residual, ..Rotate::ALL }
}

/// Whether a family takes no transformation at all, by its name.
fn refuses_all(model: &Model) -> bool {
    let ids: Vec<u32> = (0..40).map(|i| i * 7 % model.vocab_size() as u32).collect();
    match smoothing(model, &calibration(&ids), Smooth::ALL) {
        Ok(_) => false,
        Err(error) => {
            assert!(matches!(error, Error::Unsupported { .. }), "{error}");
            assert!(
                error.to_string().contains(&format!("{} models", model.config().blueprint.name)),
                "{error}"
            );
            assert!(rotations(model, "r2".parse().unwrap(), 1).is_err());
            assert_eq!(model.config().blueprint.name, "GPT-2");
            true
        }
    }
}

#[test]
fn rotations_and_scales_leave_the_logits_of_every_architecture() {
    let mut runs = 0;
    for golden in goldens() {
        let dir = tempfile::tempdir().unwrap();
        let ids = single(&golden, dir.path());
        let plain = open(dir.path());
        let expected = logits(&plain, &ids);
        if refuses_all(&plain) {
            continue;
        }
        let rotate = of_family(&plain);
        let smooth = Smooth { norms: !rotate.residual, value: true, up: true };
        let scales = smoothing(&plain, &calibration(&ids), smooth).unwrap();
        let turned = rotations(&plain, rotate, 7).unwrap();
        let all = smoothing(&plain, &calibration(&ids), Smooth::ALL).unwrap();
        for (name, list) in [
            ("rotated", turned.clone()),
            ("smoothed", all),
            ("smoothed, then rotated", [scales, turned].concat()),
        ] {
            let mut model = open(dir.path());
            fold(&mut model, list);
            let off = worst(&logits(&model, &ids), &expected);
            assert!(off <= TOLERANCE, "{} {name}: {off}", golden.display());
            // And its own weights again.
            model.transform(Vec::new()).unwrap();
            (0..model.config().layers.len()).for_each(|layer| model.unfold_layer(layer).unwrap());
            assert!(logits(&model, &ids) == expected, "{} {name}: unfolded", golden.display());
            runs += 1;
        }
    }
    assert!(runs >= 60);
}

#[test]
fn what_is_smooth_needs_no_scales() {
    for golden in goldens() {
        let dir = tempfile::tempdir().unwrap();
        let ids = single(&golden, dir.path());
        let mut model = open(dir.path());
        if refuses_all(&model) {
            continue;
        }
        let scales = |model: &Model| -> Vec<f32> {
            let list = smoothing(model, &calibration(&ids), Smooth::ALL).unwrap();
            let values = list.iter().map(|t| match t {
                Transform::Scale { scales, .. } => scales.values(),
                other => panic!("{other:?}"),
            });
            values.flatten().collect()
        };
        let before = scales(&model);
        assert!(before.iter().any(|s| (s - 1.0).abs() > 0.2), "{}", golden.display());
        let list = smoothing(&model, &calibration(&ids), Smooth::ALL).unwrap();
        fold(&mut model, list);
        let after = scales(&model);
        assert_eq!(before.len(), after.len());
        // On the whole: the scales of one site also move what the next is judged by.
        let far =
            |all: &[f32]| all.iter().map(|s| f64::from((s - 1.0).abs())).sum::<f64>() / all.len() as f64;
        assert!(far(&after) < 0.1 * far(&before), "{}: {} {}", golden.display(), far(&after), far(&before));
    }
}

#[test]
fn norms_of_sixteen_bits_stay_exact_under_scales() {
    let golden = goldens().into_iter().find(|dir| dir.ends_with("llama")).unwrap();
    let mut model = open(&golden);
    let ids: Vec<u32> = (0..40).map(|i| i * 7 % model.vocab_size() as u32).collect();
    let before: Vec<Vec<f32>> = model.norms(0).iter().map(|n| n.unwrap().to_vec()).collect();
    let expected = logits(&model, &ids);
    let list =
        smoothing(&model, &calibration(&ids), Smooth { norms: true, value: false, up: false }).unwrap();
    fold(&mut model, list.clone());
    for (index, norm) in model.norms(0).into_iter().enumerate() {
        let Transform::Scale { scales, .. } = &list[index] else { panic!() };
        for ((after, s), before) in norm.unwrap().iter().zip(scales.values()).zip(&before[index]) {
            assert_eq!(after.to_bits() & 0xffff, 0, "is stored in BF16");
            assert!((after * s - before).abs() <= 1e-6 * before.abs(), "{after} {s} {before}");
        }
    }
    assert!(worst(&logits(&model, &ids), &expected) <= TOLERANCE);
}

#[test]
fn families_that_norm_their_outputs_refuse_r1_and_take_the_others() {
    let golden = goldens().into_iter().find(|dir| dir.ends_with("gemma3_text")).unwrap();
    let model = open(&golden);
    let error = rotations(&model, Rotate::ALL, 1).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    assert!(
        error.to_string().contains("rotation of residual") && error.to_string().contains("Gemma 3"),
        "{error}"
    );
    let list = rotations(&model, "r2r4".parse().unwrap(), 1).unwrap();
    assert_eq!(list.len(), 2);
}

#[test]
fn models_of_dense_layers_and_experts_get_a_rotation_of_either_size() {
    let golden = goldens().into_iter().find(|dir| dir.ends_with("qwen3_moe")).unwrap();
    let list = rotations(&open(&golden), "r4".parse().unwrap(), 1).unwrap();
    let sizes: Vec<u32> = list
        .iter()
        .map(|t| match t {
            Transform::Rotation { site: RotationSite::Down, rotation } => rotation.size,
            other => panic!("{other:?}"),
        })
        .collect();
    assert!(sizes == [16, 64] || sizes == [16], "{sizes:?}");
}

/// The largest |x| over the root mean square of what every linear multiplies, on average.
fn crest(model: &Model, ids: &[u32]) -> f32 {
    #[derive(Default)]
    struct Crest(Vec<f32>);
    impl Observer for Crest {
        fn linear_input(&mut self, _: &str, x: &Panels) {
            for token in 0..x.tokens() {
                let x: Vec<f32> = x.token(token).collect();
                let square = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
                self.0.push(x.iter().fold(0f32, |a, b| a.max(b.abs())) / square.sqrt());
            }
        }
    }
    let mut crest = Crest::default();
    model.hidden(ids, &mut model.cache(ids.len()), &Skips::new(), &mut crest).unwrap();
    crest.0.iter().sum::<f32>() / crest.0.len() as f32
}

#[test]
fn rotations_spread_the_outliers_of_a_trained_model() {
    let tinylm: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tinylm");
    let mut model = open(&tinylm);
    let ids: Vec<u32> = (0..96).map(|i| i * 37 % 4000).collect();
    let before = crest(&model, &ids);
    let list = rotations(&model, Rotate::ALL, 1).unwrap();
    fold(&mut model, list);
    let after = crest(&model, &ids);
    println!("largest |x| over its root mean square: {before} before, {after} after");
    // About 2.9 of normal values of 256 features.
    assert!(after < 0.9 * before && after < 4.0, "{before} {after}");
}
