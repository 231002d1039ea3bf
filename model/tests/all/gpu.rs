//! The decoder of the GPU, on the emulator: every architecture, every encoding of the weights, step by step.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use llmpress_emulator::Emulator;
use llmpress_formats::{Checkpoint, Error};
use llmpress_kernels::cpu::{self, Limits};
use llmpress_kernels::gpu::Gpu;
use llmpress_model::{
    Engine, Generation, GpuModel, GpuNeeds, Model, Observer, Panels, Sampling, Skips, SubLayer, Weights,
    greedy,
};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// What activations in BF16 may move a logit by, as a share of the largest one.
const TOLERANCE: f32 = 0.05;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn open(dir: &Path) -> Model {
    Model::open(Arc::new(Checkpoint::open(dir).unwrap())).unwrap()
}

fn on_gpu(model: &Model, weights: Weights) -> Result<GpuModel, Error> {
    GpuModel::open(Gpu::new(Emulator::new()), model, weights, false)
}

/// Rows of logits of all tokens, read in pieces.
fn logits(engine: &dyn Engine, pieces: &[&[u32]], skips: &Skips) -> Vec<Vec<f32>> {
    let mut session = engine.session(pieces.iter().map(|p| p.len()).sum()).unwrap();
    session.announce(pieces.iter().map(|p| p.len()).sum());
    let mut rows = Vec::new();
    let mut part = Panels::default();
    for piece in pieces {
        session.read(piece, skips, 0..piece.len()).unwrap();
        let mut of_piece = vec![Vec::new(); piece.len()];
        for run in engine.logit_runs(piece.len()) {
            session.logits(run, &mut part).unwrap();
            of_piece.iter_mut().enumerate().for_each(|(t, row)| row.extend(part.token(t)));
        }
        rows.extend(of_piece);
    }
    rows
}

/// The largest difference, as a share of the largest logit.
fn worst(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    assert_eq!(a.len(), b.len());
    let largest = b.iter().flatten().fold(0f32, |a, b| a.max(b.abs()));
    let pairs = a.iter().zip(b).flat_map(|(a, b)| a.iter().zip(b));
    pairs.map(|(a, b)| (a - b).abs() / largest).fold(0.0, |a, b| if b > a || b.is_nan() { b } else { a })
}

fn bits(rows: &[Vec<f32>]) -> Vec<Vec<u32>> {
    rows.iter().map(|row| row.iter().map(|x| x.to_bits()).collect()).collect()
}

const IDS: [u32; 11] = [3, 17, 5, 60, 2, 9, 33, 41, 8, 8, 1];

/// What routers get on the processor.
#[derive(Default)]
struct Routers(Vec<(String, Panels)>);

impl Observer for Routers {
    fn linear_input(&mut self, weight: &str, input: &Panels) {
        if weight.ends_with("gate.weight") && !weight.contains("proj") {
            self.0.push((weight.to_owned(), input.clone()));
        }
    }
}

/// For each token the least difference between the logits of the last expert that it takes and of the first that it does not,
/// over all layers; nothing for models without experts.
fn router_margins(model: &Model, ids: &[u32]) -> Vec<f32> {
    let mut routers = Routers::default();
    model.hidden(ids, &mut model.cache(ids.len()), &Skips::new(), &mut routers).unwrap();
    let top_k = 2;
    let mut margins = Vec::new();
    for (name, x) in &routers.0 {
        let words: Vec<u16> = bytemuck::pod_collect_to_vec(&model.checkpoint().read_tensor(name).unwrap());
        let weights: Vec<f32> = words.into_iter().map(widened).collect();
        margins.resize(ids.len(), f32::INFINITY);
        for (token, margin) in margins.iter_mut().enumerate() {
            let x: Vec<f32> = x.token(token).collect();
            let row = |row: &[f32]| row.iter().zip(&x).map(|(w, x)| w * x).sum::<f32>();
            let mut logits: Vec<f32> = weights.chunks(x.len()).map(row).collect();
            logits.sort_by(|a, b| b.total_cmp(a));
            *margin = margin.min(logits[top_k - 1] - logits[top_k]);
        }
    }
    margins
}

#[test]
fn every_architecture_runs_near_the_processors_logits() {
    let root = golden("");
    let (mut ran, mut refused) = (0, Vec::new());
    for entry in std::fs::read_dir(root).unwrap() {
        let dir = entry.unwrap().path();
        if !dir.is_dir() {
            continue;
        }
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let model = open(&dir);
        let gpu = match on_gpu(&model, Weights::Stored) {
            Ok(gpu) => gpu,
            Err(error) => {
                assert!(matches!(error, Error::Unsupported { .. }), "{name}: {error}");
                for part in [model.config().blueprint.name, "does not run on a GPU", "--device cpu"] {
                    assert!(error.to_string().contains(part), "{name}: {error}");
                }
                refused.push(name);
                continue;
            }
        };
        ran += 1;
        let skips = Skips::new();
        let expected = logits(&model, &[&IDS], &skips);
        let found = logits(&gpu, &[&IDS], &skips);
        let of_tokens: Vec<f32> = found
            .iter()
            .zip(&expected)
            .map(|(a, b)| worst(std::slice::from_ref(a), std::slice::from_ref(b)))
            .collect();
        println!("{name}: {of_tokens:.4?}");
        let margins = router_margins(&model, &IDS);
        for (token, off) in of_tokens.iter().enumerate() {
            // A token whose experts are all but equally likely may go through another one, which those after it see.
            let torn = margins.iter().take(token + 1).any(|margin| *margin < 0.02);
            assert!(*off < TOLERANCE || torn && *off < 3.0 * TOLERANCE, "{name}: {of_tokens:?} {margins:?}");
        }
    }
    assert!(ran >= 35, "{ran}");
    refused.sort();
    let all = [
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v3_plain",
        "gpt_oss",
        "llama4",
        "llama4_plain",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_next",
    ];
    assert_eq!(refused, all);
}

/// Ids, logits of all tokens, and the greedy tokens after the first eight, as transformers computed them.
fn of_transformers(name: &str) -> (Vec<u32>, Vec<Vec<f32>>, Vec<u32>) {
    let bytes = std::fs::read(golden(name).join("golden.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let ids = |name: &str| -> Vec<u32> {
        let data = tensors.tensor(name).unwrap();
        data.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32).collect()
    };
    let rows = tensors.tensor("logits").unwrap();
    let row = |row: &[u8]| row.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    (ids("input_ids"), rows.data().chunks_exact(4 * rows.shape()[1]).map(row).collect(), ids("greedy"))
}

#[test]
fn experts_have_the_logits_and_tokens_of_transformers() {
    for name in ["mixtral", "qwen3_moe", "qwen3_moe_nonorm"] {
        let model = open(&golden(name));
        let (ids, expected, tokens) = of_transformers(name);
        for weights in [Weights::Stored, Weights::Dfloat11] {
            let gpu = on_gpu(&model, weights).unwrap();
            let found = logits(&gpu, &[&ids], &Skips::new());
            assert!(worst(&found, &expected) < TOLERANCE, "{name}: {}", worst(&found, &expected));
            assert_eq!(greedy(&gpu, &ids[..8], tokens.len()).unwrap(), tokens, "{name} {weights:?}");
        }
    }
}

#[test]
fn experts_give_the_same_bits_from_every_encoding_and_in_pieces() {
    for name in ["mixtral", "qwen3_moe"] {
        let model = open(&golden(name));
        let skips = Skips::new();
        let plain = on_gpu(&model, Weights::Bf16).unwrap();
        let expected = bits(&logits(&plain, &[&IDS], &skips));
        for weights in [Weights::Fixed12, Weights::Dfloat11] {
            let encoded = on_gpu(&model, weights).unwrap();
            assert!(bits(&logits(&encoded, &[&IDS], &skips)) == expected, "{name}: {weights:?}");
            // The tables of a unit outweigh its few weights here.
            let needs = GpuNeeds::of(&model, weights, 1).unwrap().weights as f64;
            let off = needs / encoded.allocated().0 as f64;
            assert!(weights == Weights::Dfloat11 || (0.95..1.05).contains(&off), "{name}: {off}");
        }
        let pieces: Vec<&[u32]> = IDS.chunks(1).collect();
        assert!(bits(&logits(&plain, &pieces, &skips)) == expected, "{name}: step by step");
        // F32 experts that BF16 holds, and many tokens, which take another loop.
        let wide = in_dtype(name, safetensors::Dtype::F32, |_, w| widened(w).to_le_bytes().to_vec());
        let wide = on_gpu(&open(wide.path()), Weights::Stored).unwrap();
        assert!(bits(&logits(&wide, &[&IDS], &skips)) == expected, "{name}: F32");
        let many: Vec<u32> = IDS.iter().cycle().take(90).map(|id| (id * 7 + 3) % 120).collect();
        let halves: Vec<&[u32]> = many.chunks(11).collect();
        assert!(
            bits(&logits(&plain, &[&many], &skips)) == bits(&logits(&plain, &halves, &skips)),
            "{name}: many tokens"
        );
    }
}

#[test]
fn encodings_and_pieces_change_no_bit() {
    for name in [
        "llama_tied",
        "gemma3_text",
        "qwen3",
        "phi3",
        "cohere2",
        "gemma2",
        "gpt2",
        "glm4",
        "olmo2",
        "olmo3",
        "starcoder2",
    ] {
        let model = open(&golden(name));
        let skips = Skips::new();
        let plain = on_gpu(&model, Weights::Bf16).unwrap();
        let expected = bits(&logits(&plain, &[&IDS], &skips));
        for weights in [Weights::Fixed12, Weights::Dfloat11] {
            let encoded = on_gpu(&model, weights).unwrap();
            assert!(bits(&logits(&encoded, &[&IDS], &skips)) == expected, "{name}: {weights:?}");
            assert_eq!(greedy(&encoded, &IDS, 6).unwrap(), greedy(&plain, &IDS, 6).unwrap());
        }
        // One token at a time: the first as it is, the others recorded. Products of other shapes add in one order, and
        // attention's chunks count from the first token.
        let pieces: Vec<&[u32]> = IDS.chunks(1).collect();
        assert!(bits(&logits(&plain, &pieces, &skips)) == expected, "{name}: step by step");
        assert!(
            bits(&logits(&plain, &[&IDS[..4], &IDS[4..5], &IDS[5..]], &skips)) == expected,
            "{name}: in pieces"
        );
    }
}

#[test]
fn a_position_that_was_not_learned_is_refused_as_on_the_processor() {
    let model = open(&golden("gpt2"));
    let gpu = on_gpu(&model, Weights::Bf16).unwrap();
    let many: Vec<u32> =
        IDS.iter().cycle().take(1 + model.config().max_positions.unwrap()).copied().collect();
    let error = |engine: &dyn Engine| {
        let mut session = engine.session(many.len()).unwrap();
        session.read(&many, &Skips::new(), 0..1).unwrap_err().to_string()
    };
    assert_eq!(error(&gpu), error(&model));
}

#[test]
fn sub_layers_can_be_left_out() {
    let model = open(&golden("llama"));
    let gpu = on_gpu(&model, Weights::Bf16).unwrap();
    for skips in [vec![SubLayer::Attention(0)], vec![SubLayer::Mlp(1), SubLayer::Attention(1)]] {
        let skips: Skips = skips.into_iter().collect();
        let (found, expected) = (logits(&gpu, &[&IDS], &skips), logits(&model, &[&IDS], &skips));
        assert!(worst(&found, &expected) < TOLERANCE);
        assert!(worst(&found, &logits(&gpu, &[&IDS], &Skips::new())) > TOLERANCE);
    }
}

#[test]
fn a_switch_of_frequencies_is_followed() {
    // LongRoPE reads the sequence again when it grows beyond the original length.
    let model = open(&golden("phi3_longrope_switch"));
    let gpu = on_gpu(&model, Weights::Bf16).unwrap();
    let switch = model.config().ropes[0].switches_after().unwrap();
    let prompt: Vec<u32> = IDS.iter().cycle().take(switch - 2).copied().collect();
    let mut generation = Generation::start(&gpu, &prompt, 6, Sampling::GREEDY).unwrap();
    let mut all = prompt.clone();
    for _ in 0..6 {
        all.push(generation.next_token().unwrap());
    }
    // The same tokens read at once have the successors that were picked.
    let rows = logits(&gpu, &[&all[..all.len() - 1]], &Skips::new());
    let last = rows.last().unwrap();
    let best = (0..last.len()).reduce(|a, b| if last[b] > last[a] { b } else { a }).unwrap();
    assert_eq!(best as u32, *all.last().unwrap());
}

#[test]
fn draws_are_the_processors_for_the_same_logits() {
    let model = open(&golden("llama"));
    let gpu = on_gpu(&model, Weights::Fixed12).unwrap();
    for limits in [
        Limits { temperature: 0.8, top_k: 20, top_p: 0.9 },
        Limits { temperature: 2.0, top_k: 0, top_p: 1.0 },
        Limits { temperature: 1.5, top_k: 0, top_p: 0.7 },
    ] {
        let Limits { temperature, top_k, top_p } = limits;
        let sampling = Sampling { temperature, top_k, top_p, seed: 7 };
        let mut generation = Generation::start(&gpu, &IDS, 8, sampling).unwrap();
        let found: Vec<u32> = (0..8).map(|_| generation.next_token().unwrap()).collect();
        // The same tokens from the logits themselves.
        let mut random = ChaCha8Rng::seed_from_u64(7);
        let all = [&IDS[..], &found].concat();
        let rows = logits(&gpu, &[&all], &Skips::new());
        let expected: Vec<u32> =
            rows[IDS.len() - 1..][..8].iter().map(|row| cpu::draw(row, limits, random.next_u64())).collect();
        assert_eq!(found, expected, "{limits:?}");
    }
}

#[test]
fn wrong_requests_are_refused_and_nothing_is_lost() {
    let model = open(&golden("llama"));
    let gpu = on_gpu(&model, Weights::Bf16).unwrap();
    let mut session = gpu.session(4).unwrap();
    assert!(matches!(session.read(&IDS, &Skips::new(), 0..1), Err(Error::Limit(_))));
    assert!(matches!(session.read(&[u32::MAX], &Skips::new(), 0..1), Err(Error::Invalid(_))));
    session.read(&IDS[..4], &Skips::new(), 3..4).unwrap();
    assert_eq!(session.len(), 4);
    assert!(matches!(session.read(&IDS[..1], &Skips::new(), 0..1), Err(Error::Limit(_))));
    session.clear();
    assert!(session.is_empty() && session.read(&IDS[..4], &Skips::new(), 3..4).is_ok());
    // All of a session's memory is given back.
    let before = gpu.allocated().0;
    drop(session);
    assert!(gpu.allocated().0 < before);
}

/// A copy of a golden checkpoint whose BF16 tensors are changed to another dtype.
fn in_dtype(
    name: &str,
    dtype: safetensors::Dtype,
    change: impl Fn(&str, u16) -> Vec<u8>,
) -> tempfile::TempDir {
    let source = Checkpoint::open(&golden(name)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let changed: Vec<(String, Vec<usize>, Vec<u8>)> = source
        .tensors()
        .iter()
        .filter(|(_, tensor)| tensor.dtype.name() == "BF16")
        .map(|(name, tensor)| {
            let words: Vec<u16> = bytemuck::pod_collect_to_vec(&source.read_tensor(name).unwrap());
            let bytes = words.iter().flat_map(|word| change(name, *word)).collect();
            (name.clone(), tensor.shape.iter().map(|&n| n as usize).collect(), bytes)
        })
        .collect();
    let views = changed.iter().map(|(name, shape, bytes)| {
        (name, safetensors::tensor::TensorView::new(dtype, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &dir.path().join("model.safetensors")).unwrap();
    std::fs::copy(golden(name).join("config.json"), dir.path().join("config.json")).unwrap();
    dir
}

fn widened(word: u16) -> f32 {
    f32::from_bits(u32::from(word) << 16)
}

#[test]
fn f32_weights_that_are_bf16_give_the_bits_of_bf16() {
    // With biases, norms of heads and a head of its own between them.
    for name in ["llama_bias", "qwen3"] {
        let wide = in_dtype(name, safetensors::Dtype::F32, |_, w| widened(w).to_le_bytes().to_vec());
        let [plain, wide] = [golden(name), wide.path().to_owned()].map(|dir| {
            let gpu = on_gpu(&open(&dir), Weights::Stored).unwrap();
            (bits(&logits(&gpu, &[&IDS], &Skips::new())), greedy(&gpu, &IDS[..4], 4).unwrap())
        });
        assert!(plain == wide, "{name}");
    }
}

#[test]
fn f16_and_f32_weights_run_near_the_processors_logits() {
    // Every weight has bits that BF16 has no room for.
    let single = |_: &str, w: u16| (widened(w) * 1.003_906_2).to_le_bytes().to_vec();
    let half = |_: &str, w: u16| half::f16::from_f32(widened(w) * 1.003_906_2).to_le_bytes().to_vec();
    let wide = in_dtype("llama_bias", safetensors::Dtype::F32, single);
    let short = in_dtype("llama_bias", safetensors::Dtype::F16, half);
    for dir in [&wide, &short] {
        let model = open(dir.path());
        let expected = logits(&model, &[&IDS], &Skips::new());
        let found = bits(&{
            let gpu = on_gpu(&model, Weights::Stored).unwrap();
            let rows = logits(&gpu, &[&IDS], &Skips::new());
            assert!(worst(&rows, &expected) < TOLERANCE, "{}", worst(&rows, &expected));
            let pieces: Vec<&[u32]> = IDS.chunks(1).collect();
            assert!(bits(&logits(&gpu, &pieces, &Skips::new())) == bits(&rows), "step by step");
            rows
        });
        // What the encodings do not hold stays as it is.
        for weights in [Weights::Bf16, Weights::Dfloat11, Weights::Fixed12] {
            let gpu = on_gpu(&model, weights).unwrap();
            assert!(bits(&logits(&gpu, &[&IDS], &Skips::new())) == found, "{weights:?}");
            let (needs, loaded) =
                (GpuNeeds::of(&model, weights, 1).unwrap().weights, gpu.allocated().0 as f64);
            assert!((0.95..1.05).contains(&(needs as f64 / loaded)), "{needs} {loaded}");
        }
    }
}

#[test]
fn matrices_of_several_dtypes_run_side_by_side() {
    // Of q, k and v, which share their input, one is F32: they give the bits that they give as one matrix.
    let name = "llama_bias";
    let source = golden(name);
    let wide = in_dtype(name, safetensors::Dtype::F32, |_, w| widened(w).to_le_bytes().to_vec());
    let dir = tempfile::tempdir().unwrap();
    let [narrow, wide] =
        [&source, wide.path()].map(|dir| std::fs::read(dir.join("model.safetensors")).unwrap());
    let (narrow, wide) = (
        safetensors::SafeTensors::deserialize(&narrow).unwrap(),
        safetensors::SafeTensors::deserialize(&wide).unwrap(),
    );
    let mixed = narrow.names().into_iter().map(|name| {
        let odd = name.contains("k_proj.weight") || name.contains("up_proj.weight");
        (name, if odd { &wide } else { &narrow }.tensor(name).unwrap())
    });
    safetensors::serialize_to_file(mixed, None, &dir.path().join("model.safetensors")).unwrap();
    std::fs::copy(source.join("config.json"), dir.path().join("config.json")).unwrap();
    let plain = on_gpu(&open(&source), Weights::Stored).unwrap();
    let expected = bits(&logits(&plain, &[&IDS], &Skips::new()));
    for weights in [Weights::Stored, Weights::Fixed12, Weights::Dfloat11] {
        let mixed = on_gpu(&open(dir.path()), weights).unwrap();
        assert!(bits(&logits(&mixed, &[&IDS], &Skips::new())) == expected, "{weights:?}");
    }
}

/// A llama of two layers with random weights, whose heads have so many features, and of whose sizes none is a multiple of 8.
fn with_heads_of(head_dim: usize) -> tempfile::TempDir {
    let (hidden, heads, kv_heads, inner, vocab) = (20, 4, 2, 36, 68);
    let dir = tempfile::tempdir().unwrap();
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": hidden,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "intermediate_size": inner,
        "num_hidden_layers": 2, "vocab_size": vocab, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": true
    });
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let mut shapes =
        vec![("model.embed_tokens".to_owned(), vec![vocab, hidden]), ("model.norm".to_owned(), vec![hidden])];
    for layer in 0..2 {
        for (name, shape) in [
            ("self_attn.q_proj", vec![heads * head_dim, hidden]),
            ("self_attn.k_proj", vec![kv_heads * head_dim, hidden]),
            ("self_attn.v_proj", vec![kv_heads * head_dim, hidden]),
            ("self_attn.o_proj", vec![hidden, heads * head_dim]),
            ("mlp.gate_proj", vec![inner, hidden]),
            ("mlp.up_proj", vec![inner, hidden]),
            ("mlp.down_proj", vec![hidden, inner]),
            ("input_layernorm", vec![hidden]),
            ("post_attention_layernorm", vec![hidden]),
        ] {
            shapes.push((format!("model.layers.{layer}.{name}"), shape));
        }
    }
    let mut random = ChaCha8Rng::seed_from_u64(head_dim as u64);
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = shapes
        .into_iter()
        .map(|(name, shape)| {
            let count: usize = shape.iter().product();
            let one = |random: &mut ChaCha8Rng| (random.next_u64() >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
            let norm = name.ends_with("norm");
            let words =
                (0..count).map(|_| half::bf16::from_f32(if norm { 1.0 } else { one(&mut random) * 0.4 }));
            (format!("{name}.weight"), shape, words.flat_map(|w| w.to_bits().to_le_bytes()).collect())
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::BF16, shape.clone(), bytes);
        (name, view.unwrap())
    });
    safetensors::serialize_to_file(views, None, &dir.path().join("model.safetensors")).unwrap();
    dir
}

#[test]
fn heads_and_sizes_need_not_be_multiples_of_eight() {
    for head_dim in [2, 10, 78] {
        let dir = with_heads_of(head_dim);
        let model = open(dir.path());
        let skips = Skips::new();
        let expected = logits(&model, &[&IDS], &skips);
        let plain = on_gpu(&model, Weights::Bf16).unwrap();
        let found = logits(&plain, &[&IDS], &skips);
        assert!(worst(&found, &expected) < TOLERANCE, "{head_dim}: {}", worst(&found, &expected));
        let pieces: Vec<&[u32]> = IDS.chunks(1).collect();
        assert!(bits(&logits(&plain, &pieces, &skips)) == bits(&found), "{head_dim}: step by step");
        for weights in [Weights::Fixed12, Weights::Dfloat11] {
            let encoded = on_gpu(&model, weights).unwrap();
            assert!(bits(&logits(&encoded, &[&IDS], &skips)) == bits(&found), "{head_dim}: {weights:?}");
            let (needs, loaded) =
                (GpuNeeds::of(&model, weights, 1).unwrap().weights, encoded.allocated().0 as f64);
            assert!((0.9..1.1).contains(&(needs as f64 / loaded)), "{needs} {loaded}");
        }
    }
}

#[test]
fn tinylm_runs_from_every_encoding() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tinylm");
    let model = open(&dir);
    let ids: Vec<u32> = (0..24).map(|i| (i * 151 + 7) % 4000).collect();
    let skips = Skips::new();
    let expected = logits(&model, &[&ids], &skips);
    let plain = on_gpu(&model, Weights::Bf16).unwrap();
    let found = logits(&plain, &[&ids], &skips);
    assert!(worst(&found, &expected) < 0.01, "{}", worst(&found, &expected));
    for weights in [Weights::Fixed12, Weights::Dfloat11] {
        let encoded = on_gpu(&model, weights).unwrap();
        assert!(bits(&logits(&encoded, &[&ids], &skips)) == bits(&found), "{weights:?}");
        assert!(encoded.allocated().0 < plain.allocated().0 * 9 / 10);
    }
}

#[test]
fn what_a_model_takes_is_known_before_it_is_loaded() {
    let model = open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tinylm"));
    for weights in [Weights::Bf16, Weights::Fixed12, Weights::Dfloat11] {
        for capacity in [1, 700] {
            let needs = GpuNeeds::of(&model, weights, capacity).unwrap();
            let gpu = on_gpu(&model, weights).unwrap();
            let loaded = gpu.allocated().0 as f64;
            let off = needs.weights as f64 / loaded;
            assert!((0.95..1.05).contains(&off), "{weights:?}: {needs:?}, {loaded}");
            let session = gpu.session(capacity).unwrap();
            let all = gpu.allocated().0 as f64;
            // Room for the logits is taken when they are asked for.
            let (least, most) = (needs.weights + needs.cache, needs.total());
            assert!(all > 0.95 * least as f64 && all < 1.05 * most as f64, "{weights:?}: {needs:?}, {all}");
            drop(session);
        }
    }
}
