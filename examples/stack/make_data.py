#!/usr/bin/env python3
"""Writes stack.safetensors: 4,096 rows of 1,000 inputs and the 100 outputs of a random two-layer network on them.

    python3 -m venv v && v/bin/pip install numpy==2.4.6 safetensors==0.8.0 && v/bin/python examples/stack/make_data.py
"""
import os

import numpy as np
from safetensors.numpy import save_file

ROWS, INPUTS, HIDDEN, OUTPUTS = 4096, 1000, 64, 100


def main():
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((ROWS, INPUTS), dtype=np.float32)
    first = rng.standard_normal((INPUTS, HIDDEN), dtype=np.float32) / np.sqrt(INPUTS)
    second = rng.standard_normal((HIDDEN, OUTPUTS), dtype=np.float32) / np.sqrt(HIDDEN)
    targets = np.maximum(inputs @ first, 0.0) @ second
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "stack.safetensors")
    save_file({"inputs": inputs, "targets": targets.astype(np.float32)}, path)
    print(f"{path}: inputs {inputs.shape}, targets {targets.shape}")


if __name__ == "__main__":
    main()
