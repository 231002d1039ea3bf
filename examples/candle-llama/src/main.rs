//! Text by the llama of candle-transformers, whose weights come from any checkpoint that llmpress reads: plain, dfloat11, fixed12, abq.
//!
//! ```text
//! config.json --> llama::Config     VarBuilder --name, shape--> weights.rs --decode--> Tensor     greedy tokens --> stdout
//! ```

mod weights;

use std::path::Path;

use candle_core::{D, DType, Device, IndexOp, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::llama::{Cache, Llama, LlamaConfig, LlamaEosToks};
use tokenizers::Tokenizer;
use weights::Weights;

type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, prompt, count] = &arguments[..] else {
        return Err("usage: candle-llama MODEL PROMPT TOKENS".into());
    };
    println!("{}", go_on(Path::new(model), prompt, count.parse()?)?);
    Ok(())
}

/// What follows a prompt: at most so many tokens, each the likeliest.
fn go_on(model: &Path, prompt: &str, count: usize) -> Outcome<String> {
    let device = Device::Cpu;
    let weights = Weights::open(model)?;
    let mut config: LlamaConfig = serde_json::from_str(weights.config()?)?;
    // transformers 5 says it here.
    let json: serde_json::Value = serde_json::from_str(weights.config()?)?;
    if let Some(theta) = json.pointer("/rope_parameters/rope_theta").and_then(serde_json::Value::as_f64) {
        config.rope_theta = theta as f32;
    }
    let config = config.into_config(false);
    let vars = VarBuilder::from_backend(Box::new(weights), DType::F32, device.clone());
    let llama = Llama::load(vars, &config)?;
    let mut cache = Cache::new(true, DType::F32, &config, &device)?;
    let tokenizer = Tokenizer::from_file(model.join("tokenizer.json"))?;
    let mut tokens = tokenizer.encode(prompt, true)?.get_ids().to_vec();
    let begin = tokens.len();
    let ends = |token: u32| match &config.eos_token_id {
        Some(LlamaEosToks::Single(end)) => token == *end,
        Some(LlamaEosToks::Multiple(ends)) => ends.contains(&token),
        None => false,
    };
    let mut read = 0;
    while tokens.len() < begin + count {
        let input = Tensor::new(&tokens[read..], &device)?.unsqueeze(0)?;
        let logits = llama.forward(&input, read, &mut cache)?.i(0)?;
        read = tokens.len();
        let next = logits.argmax(D::Minus1)?.to_scalar::<u32>()?;
        if ends(next) {
            break;
        }
        tokens.push(next);
    }
    // Decoded together: a word may begin with a space that the prompt's end decides on.
    let whole = tokenizer.decode(&tokens, true)?;
    let before = tokenizer.decode(&tokens[..begin], true)?;
    Ok(whole.strip_prefix(&before).unwrap_or(&whole).to_owned())
}
