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
