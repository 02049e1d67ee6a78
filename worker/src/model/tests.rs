//! What is kept of a layer's activations changes no bit of what comes out.

use super::*;
use ramtorch_cpu::CpuDevice;
use ramtorch_device::Stream;
use ramtorch_store::{GradientFormat, GradientLog, MomentFormat, StoreSpec};
use std::path::Path;

/// Runs a decoder layer forward and backward; the bits of its output, the gradient of its input and its parameters' gradients.
fn run(config: &str, dtype: Dtype, keep: Keep) -> [Vec<u8>; 3] {
    let c = ramtorch_modelio::parse_config(config.as_bytes(), Path::new("config.json")).unwrap().config;
    let a = Architecture::Transformer(c);
    let spec = StoreSpec {
        blocks: a.blocks(),
        world_size: 1,
        moments: MomentFormat::None,
        gradients: GradientFormat::None,
        page_parameters: None,
        spare_pages_per_rank: 1,
        exchange_bytes: 0,
        log: GradientLog::NONE,
        metadata: String::new(),
    };
    let model = Model::new(&a, &Layout::new(&spec).unwrap(), dtype).unwrap();
    let (b, seq, sequences) = (1, 24, 3);
    let shape = Shape { sequences, seq, head_rows: 8 };
    let rows = sequences * seq;
    let mut dev = CpuDevice::open(0, dtype, 2, 64 << 20).unwrap();
    let tables = Tables { rope: crate::session::rope_table(&mut dev, &a, seq).unwrap() };
    let needed = model.scratch_bytes(shape, &|s| dev.attention_workspace(s)).unwrap();
    let state = (rows * model.width(b)) as u64 * dtype.size();
    let [scratch, saved, weights, gradients, x, y, d] =
        [needed, model.saved_bytes(b, shape, keep), model.places[b].1 * dtype.size(), model.places[b].1 * 4, state, state, state]
            .map(|n| dev.alloc(n, "test").unwrap());
    let random = |buf: DevBuf, seed: u64, size: f32| {
        let mut s = seed;
        let data: Vec<u8> = (0..buf.bytes / dtype.size())
            .flat_map(|_| {
                s = s.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let v = ((s >> 40) as f32 / (1 << 23) as f32 - 1.0) * size;
                if dtype == Dtype::F32 { v.to_le_bytes().to_vec() } else { half::bf16::from_f32(v).to_le_bytes().to_vec() }
            })
            .collect();
        dev.upload(Stream::Compute, buf, &data).unwrap();
    };
    random(weights, 1, 0.2);
    random(x, 2, 1.0);
    random(d, 3, 1.0);
    dev.zero(Stream::Compute, gradients).unwrap();
    let nothing = DevBuf { ptr: 0, bytes: 0 };
    let tokens = TokenIndex { rows, ids: nothing, order: nothing, bounds: nothing, unique: 0 };
    let mb = MicroBatch { sequences, seq, tokens, input: nothing, targets: nothing, weights: nothing, losses: nothing, starts: None };
    let v = Visit { dev: &dev, shape, tables, mb: &mb, scratch };
    let w = Weights { buf: weights, dtype };
    model.forward(b, &v, w, x, saved, keep, y).unwrap();
    // Other visits use scratch in between.
    random(scratch, 4, 1.0);
    if keep == Keep::Inputs {
        random(saved, 5, 1.0);
        model.recompute(b, &v, w, x, saved).unwrap();
    }
    model.backward(b, &v, Some(w), x, saved, keep, d, Grads { buf: gradients }).unwrap();
    [y, d, gradients].map(|buf| {
        let mut out = vec![0u8; buf.bytes as usize];
        dev.download(Stream::Compute, buf, &mut out).unwrap();
        out
    })
}

#[test]
fn every_way_to_keep_activations_gives_the_same_bits() {
    let common = r#""vocab_size":211,"hidden_size":48,"num_hidden_layers":2,"num_attention_heads":4,"max_position_embeddings":64"#;
    let gated = r#""intermediate_size":80,"num_key_value_heads":2,"rms_norm_eps":1e-5,"hidden_act":"silu""#;
    for config in [
        format!(r#"{{"model_type":"llama",{common},{gated}}}"#),
        format!(r#"{{"model_type":"qwen2",{common},{gated}}}"#),
        format!(r#"{{"model_type":"qwen3","head_dim":16,{common},{gated}}}"#),
        r#"{"model_type":"gpt2","vocab_size":211,"n_embd":48,"n_layer":2,"n_head":4,"n_positions":64,"layer_norm_epsilon":1e-5}"#
            .to_string(),
    ] {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let whole = run(&config, dtype, Keep::All);
            assert!(whole[1].iter().any(|b| *b != 0) && whole[2].iter().any(|b| *b != 0));
            assert!(whole == run(&config, dtype, Keep::Products), "{config} {dtype:?}: products kept");
            assert!(whole == run(&config, dtype, Keep::Inputs), "{config} {dtype:?}: everything made again");
        }
    }
}
