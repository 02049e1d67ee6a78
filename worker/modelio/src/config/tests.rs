use super::*;
use crate::arch::{Rope, RopeScaling};
use crate::testing::architecture;
use proptest::prelude::*;

fn parse(text: &str) -> Result<ParsedConfig, ModelError> {
    parse_config(text.as_bytes(), Path::new("m/config.json"))
}

fn refusal(text: &str) -> String {
    parse(text).unwrap_err().to_string()
}

#[test]
fn defaults_are_those_of_transformers() {
    let c = parse(r#"{"model_type": "llama"}"#).unwrap().config;
    assert_eq!((c.vocab_size, c.hidden_size, c.intermediate_size, c.layers, c.heads, c.kv_heads), (32_000, 4096, 11_008, 32, 32, 32));
    assert_eq!((c.head_dim, c.max_positions, c.norm_eps, c.tie_embeddings), (128, 2048, 1e-6, false));
    assert_eq!((c.bos_token_id, c.eos_token_ids.as_slice(), c.padding_idx), (Some(1), &[2][..], None));
    assert_eq!(c.rope, Some(Rope { theta: 10_000.0, scaling: RopeScaling::None }));
    assert!(!c.attention_bias && !c.output_bias && !c.mlp_bias && !c.qk_norm);

    let c = parse(r#"{"model_type": "mistral"}"#).unwrap().config;
    assert_eq!((c.intermediate_size, c.kv_heads, c.max_positions), (14_336, 8, 131_072));
    assert_eq!((c.sliding_window, c.layer_windows), (Some(4096), vec![Some(4096); 32]));

    let c = parse(r#"{"model_type": "qwen2"}"#).unwrap().config;
    assert_eq!((c.vocab_size, c.intermediate_size, c.kv_heads, c.max_positions), (151_936, 22_016, 32, 32_768));
    assert_eq!((c.attention_bias, c.output_bias, c.sliding_window, c.bos_token_id), (true, false, None, None));

    let c = parse(r#"{"model_type": "qwen3", "hidden_size": 1024, "num_attention_heads": 64}"#).unwrap().config;
    assert_eq!((c.head_dim, c.qk_norm, c.attention_bias), (128, true, false));

    let c = parse(r#"{"model_type": "gpt2"}"#).unwrap().config;
    assert_eq!((c.vocab_size, c.hidden_size, c.intermediate_size, c.layers, c.heads, c.max_positions), (50_257, 768, 3072, 12, 12, 1024));
    assert_eq!((c.hidden_act, c.tie_embeddings, c.norm_eps, c.rope), (HiddenAct::GeluTanh, true, 1e-5, None));
    assert_eq!(c.eos_token_ids, [50_256]);
}

#[test]
fn published_sizes_come_out() {
    let llama = architecture(
        r#"{"model_type": "llama", "vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8,
            "max_position_embeddings": 131072}"#,
    );
    assert_eq!(llama.parameter_count(), 8_030_261_248);
    assert_eq!(llama.matmul_parameters(), 8_030_261_248 - 128_256 * 4096 - 65 * 4096);
    assert_eq!(llama.describe(), "Llama, 8.03 B parameters, 32 layers");
    let gpt2 = architecture(r#"{"model_type": "gpt2"}"#);
    assert_eq!(gpt2.parameter_count(), 124_439_808);
    assert_eq!(gpt2.matmul_parameters(), 12 * (12 * 768 * 768) + 50_257 * 768);
    let qwen = r#"{"model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "intermediate_size": 4864, "tie_word_embeddings": true}"#;
    assert_eq!(architecture(qwen).parameter_count(), 494_032_768);
}

#[test]
fn both_spellings_of_rotary_settings_agree() {
    let old = r#"{"model_type": "qwen3", "rope_theta": 1e6,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}}"#;
    let new = r#"{"model_type": "qwen3",
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4, "original_max_position_embeddings": 4096}}"#;
    let (old, new) = (parse(old).unwrap(), parse(new).unwrap());
    assert_eq!(old, new);
    let Some(Rope { theta, scaling: RopeScaling::Yarn { attention_factor, beta_fast, truncate, .. } }) = old.config.rope else {
        panic!("{:?}", old.config.rope)
    };
    assert_eq!((theta, beta_fast, truncate), (1e6, 32.0, true));
    assert_eq!(attention_factor, 0.1 * 4f64.ln() + 1.0);
}

#[test]
fn sliding_windows_go_to_the_layers_that_have_them() {
    let qwen = |extra: &str| parse(&format!(r#"{{"model_type": "qwen2", "num_hidden_layers": 3, "sliding_window": 7, {extra}}}"#));
    let windows = |extra: &str| qwen(extra).unwrap().config.layer_windows;
    assert_eq!(windows(r#""use_sliding_window": false"#), [None; 3]);
    assert_eq!(windows(r#""use_sliding_window": true, "max_window_layers": 1"#), [None, Some(7), Some(7)]);
    let typed = r#""use_sliding_window": true, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]"#;
    assert_eq!(windows(typed), [Some(7), None, Some(7)]);
    assert!(qwen(r#""layer_types": ["sliding_attention", "full_attention", "full_attention"]"#).is_err());
    assert!(qwen(r#""layer_types": ["full_attention"]"#).unwrap_err().to_string().contains("1 entries for 3 layers"));
    assert!(qwen(r#""layer_types": ["chunked_attention", "full_attention", "full_attention"]"#).is_err());
    let mistral = parse(r#"{"model_type": "mistral", "num_hidden_layers": 2, "sliding_window": null}"#).unwrap();
    assert_eq!(mistral.config.layer_windows, [None, None]);
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    for (text, names) in [
        (r#"{"model_type": "mamba"}"#, &["mamba", "llama, mistral"][..]),
        (r#"{}"#, &["model_type"]),
        (r#"{"model_type": "llama", "quantization_config": {"bits": 4}}"#, &["quantization_config"]),
        (r#"{"model_type": "llama", "hidden_act": "relu2"}"#, &["hidden_act", "relu2"]),
        (r#"{"model_type": "llama", "partial_rotary_factor": 0.5}"#, &["partial_rotary_factor", "0.5"]),
        (r#"{"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}}"#, &["dynamic", "rope_scaling"]),
        (r#"{"model_type": "llama", "rope_parameters": {"rope_type": "longrope"}}"#, &["longrope"]),
        (r#"{"model_type": "qwen2", "rope_scaling": {"type": "mrope"}}"#, &["mrope"]),
        (r#"{"model_type": "qwen3", "rope_parameters": {"full_attention": {"rope_type": "default"}}}"#, &["kind of layer"]),
        (r#"{"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": true}"#, &["scale_attn_by_inverse_layer_idx"]),
        (r#"{"model_type": "gpt2", "scale_attn_weights": false}"#, &["scale_attn_weights"]),
        (r#"{"model_type": "gpt2", "add_cross_attention": true}"#, &["add_cross_attention"]),
        (r#"{"model_type": "llama", "is_causal": false}"#, &["is_causal"]),
        (r#"{"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}"#, &["LlamaForSequenceClassification"]),
    ] {
        let message = refusal(text);
        assert!(message.starts_with("m/config.json: "), "{message}");
        assert!(names.iter().all(|name| message.contains(name)), "{message}");
    }
}

#[test]
fn impossible_values_are_refused_by_name() {
    for (text, name) in [
        (r#"{"model_type": "llama", "hidden_size": 0}"#, "hidden_size"),
        (r#"{"model_type": "llama", "hidden_size": -4096}"#, "hidden_size"),
        (r#"{"model_type": "llama", "hidden_size": "4096"}"#, "hidden_size"),
        (r#"{"model_type": "llama", "hidden_size": 1e300}"#, "hidden_size"),
        (r#"{"model_type": "llama", "num_hidden_layers": 100000}"#, "num_hidden_layers"),
        (r#"{"model_type": "llama", "num_key_value_heads": 5}"#, "num_key_value_heads"),
        (r#"{"model_type": "llama", "hidden_size": 4097}"#, "hidden_size"),
        (r#"{"model_type": "llama", "head_dim": 63}"#, "head_dim"),
        (r#"{"model_type": "llama", "head_dim": 2147483648}"#, "sizes cannot be right"),
        (r#"{"model_type": "llama", "vocab_size": 2147483648, "hidden_size": 2147483648}"#, "sizes cannot be right"),
        (r#"{"model_type": "llama", "rms_norm_eps": -1.0}"#, "epsilon"),
        (r#"{"model_type": "llama", "rms_norm_eps": "1e-5"}"#, "rms_norm_eps"),
        (r#"{"model_type": "llama", "pad_token_id": 32000}"#, "pad_token_id"),
        (r#"{"model_type": "llama", "eos_token_id": [1, "2"]}"#, "eos_token_id"),
        (r#"{"model_type": "llama", "rope_theta": 0}"#, "rope_theta"),
        (r#"{"model_type": "llama", "rope_theta": 1e31}"#, "rope_theta"),
        (r#"{"model_type": "llama", "rope_scaling": {"type": "linear"}}"#, "rope_scaling.factor is missing"),
        (r#"{"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 0}}"#, "rope_scaling.factor"),
        (
            r#"{"model_type": "llama", "rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}}"#,
            "high_freq_factor",
        ),
        (r#"{"model_type": "mistral", "sliding_window": 0}"#, "sliding_window"),
        (r#"{"model_type": "gpt2", "n_embd": 10, "n_head": 3}"#, "n_embd"),
        (r#"{"model_type": "gpt2", "n_layer": 70000}"#, "n_layer"),
        (r#"[1]"#, "object"),
        (r#"{"model_type": "llama""#, "JSON"),
    ] {
        let message = refusal(text);
        assert!(message.contains(name), "{text}: {message}");
    }
}

#[test]
fn what_is_ignored_is_told() {
    let parsed = parse(r#"{"model_type": "gpt2", "resid_pdrop": 0.1, "attn_pdrop": 0.0}"#).unwrap();
    assert_eq!(parsed.warnings, ["m/config.json: resid_pdrop = 0.1 is ignored: training is without dropout"]);
    let parsed = parse(r#"{"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0, "colour": 1}}"#).unwrap();
    assert!(parsed.warnings[0].contains("colour"), "{:?}", parsed.warnings);
    assert!(parse(r#"{"model_type": "llama"}"#).unwrap().warnings.is_empty());
}

#[test]
fn the_declared_format_is_found_under_both_names() {
    for (text, dtype) in [
        (r#"{"model_type": "llama", "torch_dtype": "bfloat16"}"#, Some(Precision::Bf16)),
        (r#"{"model_type": "llama", "dtype": "float32", "torch_dtype": "bfloat16"}"#, Some(Precision::Fp32)),
        (r#"{"model_type": "llama", "torch_dtype": "float16"}"#, None),
    ] {
        assert_eq!(parse(text).unwrap().dtype, dtype);
    }
}

#[test]
fn an_architecture_survives_json() {
    let model = architecture(r#"{"model_type": "qwen3", "rope_scaling": {"type": "yarn", "factor": 4.0}}"#);
    let text = serde_json::to_string(&model).unwrap();
    assert_eq!(serde_json::from_str::<Architecture>(&text).unwrap(), model);
    let broken = text.replace("\"kv_heads\":32", "\"kv_heads\":0");
    let error = serde_json::from_str::<Architecture>(&broken).unwrap().validate().unwrap_err();
    assert!(error.contains("num_key_value_heads"), "{error}");
}

fn any_value() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<i64>().prop_map(|x| x.to_string()),
        (0i64..100).prop_map(|x| x.to_string()),
        any::<f64>().prop_filter("JSON has finite numbers only", |x| x.is_finite()).prop_map(|x| format!("{x:e}")),
        Just("null".to_owned()),
        Just("true".to_owned()),
        Just("\"default\"".to_owned()),
        Just("[]".to_owned()),
        Just("[\"full_attention\"]".to_owned()),
        Just("{}".to_owned()),
        Just(r#"{"rope_type": "yarn", "factor": 3}"#.to_owned()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]
    #[test]
    fn no_configuration_panics(
        family in 0usize..5,
        fields in proptest::collection::vec((0usize..25, any_value()), 0..6),
    ) {
        const KEYS: [&str; 25] = [
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "sliding_window",
            "use_sliding_window", "max_window_layers", "layer_types", "n_embd", "n_layer", "n_head", "n_inner", "eos_token_id",
            "pad_token_id", "initializer_range", "architectures", "original_max_position_embeddings",
        ];
        let mut text = format!(r#"{{"model_type": "{}""#, Family::ALL[family].model_type());
        for (key, value) in &fields {
            text.push_str(&format!(r#", "{}": {value}"#, KEYS[*key]));
        }
        text.push('}');
        if let Ok(parsed) = parse(&text) {
            prop_assert!(parsed.config.layers <= 1 << 16);
            let (frequencies, factor) = parsed.config.rope_inv_freq();
            prop_assert!(factor > 0.0 && frequencies.iter().all(|f| !f.is_nan()), "{text}");
            if parsed.config.layers <= 64 {
                let model = Architecture::Transformer(parsed.config);
                prop_assert!(model.parameter_count() >= model.matmul_parameters() / 2);
                prop_assert!(!model.describe().is_empty());
            }
        }
    }
}
