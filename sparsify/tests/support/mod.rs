//! A checkpoint of one layer with weights by chance.

use std::path::Path;

/// The sizes of a layer.
#[derive(Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) hidden: u64,
    pub(crate) kv: u64,
    pub(crate) inner: u64,
    pub(crate) head: u64,
}

/// Writes it; `change` may change the first value of a tensor.
pub(crate) fn write_model(dir: &Path, sizes: Sizes, change: impl Fn(&str) -> Option<f32>) {
    let Sizes { hidden, kv, inner, head } = sizes;
    let config = format!(
        r#"{{"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_size":{hidden},"intermediate_size":{inner},
        "num_hidden_layers":1,"num_attention_heads":{heads},"num_key_value_heads":{kv_heads},"head_dim":{head},"vocab_size":64,
        "rms_norm_eps":1e-5,"rope_theta":10000.0,"max_position_embeddings":64,"hidden_act":"silu",
        "tie_word_embeddings":true,"torch_dtype":"bfloat16"}}"#,
        heads = hidden / head,
        kv_heads = kv / head,
    );
    std::fs::write(dir.join("config.json"), config).unwrap();
    let layer = |name: &str| format!("model.layers.0.{name}.weight");
    let tensors = [
        ("model.embed_tokens.weight".to_owned(), vec![64, hidden]),
        ("model.norm.weight".to_owned(), vec![hidden]),
        (layer("input_layernorm"), vec![hidden]),
        (layer("post_attention_layernorm"), vec![hidden]),
        (layer("self_attn.q_proj"), vec![hidden, hidden]),
        (layer("self_attn.k_proj"), vec![kv, hidden]),
        (layer("self_attn.v_proj"), vec![kv, hidden]),
        (layer("self_attn.o_proj"), vec![hidden, hidden]),
        (layer("mlp.gate_proj"), vec![inner, hidden]),
        (layer("mlp.up_proj"), vec![inner, hidden]),
        (layer("mlp.down_proj"), vec![hidden, inner]),
    ];
    let (mut header, mut data) = (Vec::new(), Vec::new());
    let mut state = 1u64;
    for (name, shape) in &tensors {
        let from = data.len();
        for at in 0..shape.iter().product::<u64>() {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let by_chance =
                if shape.len() == 1 { 1.0 } else { (state >> 40) as f32 / (1u64 << 27) as f32 - 0.0625 };
            let value = change(name).filter(|_| at == 0).unwrap_or(by_chance);
            data.extend_from_slice(&((value.to_bits() >> 16) as u16).to_le_bytes());
        }
        header.push(format!(
            r#""{name}":{{"dtype":"BF16","shape":{shape:?},"data_offsets":[{from},{}]}}"#,
            data.len()
        ));
    }
    let mut header = format!("{{{}}}", header.join(","));
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
    std::fs::write(dir.join("model.safetensors"), file).unwrap();
}
