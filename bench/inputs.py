"""What benchmarks train: a model from its configuration alone, and random tokens."""

import array
import json
import os
import random


def write(folder, config, tokens):
    """Writes config.json and `tokens` tokens into tokens.bin, the same every time; makes the folder."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(config, f, indent=1)
    values = array.array("I")
    values.frombytes(random.Random(0).randbytes(4 * tokens))
    top = config["vocab_size"] - 300  # no special tokens
    with open(os.path.join(folder, "tokens.bin"), "wb") as f:
        array.array("I", (v % top for v in values)).tofile(f)


# In bf16.
ONES = b"\x80\x3f" * (1 << 19)


def write_weights(folder, config):
    """Random weights of a Llama or Qwen2 with the deviation that training begins with, in one safetensors file in bf16; norms are
    ones, biases too small to matter. Returns its bytes."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    kv = hidden // heads * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": [config["vocab_size"], hidden], "model.norm.weight": [hidden]}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = [config["vocab_size"], hidden]
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        shapes |= {p + "input_layernorm.weight": [hidden], p + "post_attention_layernorm.weight": [hidden],
                   p + "self_attn.q_proj.weight": [hidden, hidden], p + "self_attn.k_proj.weight": [kv, hidden],
                   p + "self_attn.v_proj.weight": [kv, hidden], p + "self_attn.o_proj.weight": [hidden, hidden],
                   p + "mlp.gate_proj.weight": [inner, hidden], p + "mlp.up_proj.weight": [inner, hidden],
                   p + "mlp.down_proj.weight": [hidden, inner]}
        if config["model_type"] == "qwen2":
            shapes |= {p + "self_attn.q_proj.bias": [hidden], p + "self_attn.k_proj.bias": [kv], p + "self_attn.v_proj.bias": [kv]}
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # A megabyte of bf16 numbers between -0.03 and 0.03: sign, exponents 2^-8 to 2^-6, random fractions.
    draw = random.Random(0)
    block = b"".join((draw.getrandbits(1) << 15 | (119 + draw.getrandbits(1)) << 7 | draw.getrandbits(7)).to_bytes(2, "little")
                     for _ in range(1 << 19))
    with open(os.path.join(folder, "model.safetensors"), "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            left = header[name]["data_offsets"][1] - header[name]["data_offsets"][0]
            source = block if len(shape) > 1 or name.endswith("bias") else ONES
            while left > 0:
                left -= f.write(source[:left])
    return at
