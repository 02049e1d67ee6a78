#!/usr/bin/env python3
"""How fast a model generates and is evaluated: with all weights on the GPU, and with layers streamed from RAM.

    python3 bench/inference.py --bin target/release --out DIR [--model 1b|3b|8b] [--device cuda:0] [--memory all,8GiB]

Makes a model folder with random weights in bf16 (8B: 16 GB of disk), which is loaded for each call, as a user's would be; the
tokenizer is the test fixtures'. Prints Markdown: seconds of a call less those of decoding (loading, preparing, prefill), and the
prefill alone; tokens a second of those after the first; and what `eval` says of itself, beside the seconds of its whole call.
"""

import argparse
import json
import os
import shutil
import time

import inputs
from checkpoint_stall import llama
from node import Node

MODELS = {
    "tiny": llama(2048, 64, 128, 2, 4, 2, True),
    "wide": llama(128256, 64, 128, 2, 4, 2, True),
    "1b": llama(128256, 2048, 8192, 16, 32, 8, True),
    "3b": llama(128256, 3072, 8192, 28, 24, 8, True),
    "8b": llama(128256, 4096, 14336, 32, 32, 8, False),
}
SEQUENCE = 2048


def timed(node, *arguments):
    begin = time.time()
    return node.ask(*arguments), time.time() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", default="target/release")
    parser.add_argument("--out", required=True)
    parser.add_argument("--model", choices=MODELS, default="3b")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--memory", default="all", help="what plans may use of the device, separated by commas")
    parser.add_argument("--prompts", default="1,16", help="prompts at once, separated by commas")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--eval-tokens", type=int, default=131_072)
    args = parser.parse_args()
    args.out = os.path.abspath(args.out)
    folder = os.path.join(args.out, args.model)
    inputs.write(folder, MODELS[args.model], 200_000)
    size = inputs.write_weights(folder, MODELS[args.model])
    fixture = os.path.join(os.path.dirname(__file__), "..", "tests", "fixtures", "models", "llama", "tokenizer.json")
    shutil.copy(fixture, folder)
    print(f"{args.model}: {size / 1e9:.2f} GB of weights\n")
    print("| memory for plans | prompts | first tokens after s | of it prefill, ms | generate, tokens a second | eval, tokens a second (with loading) |")
    print("|---|---|---|---|---|---|")
    for memory in args.memory.split(","):
        more = [] if memory == "all" else ["--device-memory", memory]
        with open(os.path.join(args.out, "daemon.log"), "a") as log, Node(args.bin, args.device, log, more=more) as node:
            timed(node, "generate", folder, "-p", "the", "--max-new-tokens", "1")  # reads the files and compiles kernels, too
            for i, count in enumerate(map(int, args.prompts.split(","))):
                prompts = [x for i in range(count) for x in ("-p", "the " * (i % 5 + 1))]
                answer, seconds = timed(node, "generate", folder, *prompts, "--max-new-tokens", str(args.tokens))
                loading = seconds - answer["decode_seconds"]
                rate = answer["decode_tokens"] / max(answer["decode_seconds"], 1e-3)
                rated = ""
                if i == 0:
                    said, seconds = timed(node, "eval", folder, "--data", os.path.join(folder, "tokens.bin"), "--format", "tokens",
                                          "--sequence-length", str(SEQUENCE), "--max-tokens", str(args.eval_tokens))
                    rated = f"{said['tokens'] / said['seconds']:.0f} ({said['tokens']} tokens in {seconds:.1f} s)"
                print(f"| {memory} | {count} | {loading:.1f} | {answer['prefill_seconds'] * 1e3:.0f} | {rate:.1f} | {rated} |", flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
