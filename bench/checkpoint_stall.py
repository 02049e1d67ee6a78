#!/usr/bin/env python3
"""What a checkpoint costs training: seconds that the optimizer stood still, seconds until it is durable, bytes, and how much
longer the steps took in which it was written, for several amounts of staging.

    python3 bench/checkpoint_stall.py --bin target/release --out DIR [--model 22m|150m|3b|8b] [--device cpu:1] [--staging 0,default]

The model is made from its configuration alone (seeded weights), data are random tokens. Every run writes one checkpoint, at
step --every, and goes on to --steps; it is removed before the next run, so the disk needs room for one. Needs Python and the
daemon's binary. For a 3B model on one GPU (segment 45 GB, checkpoint 38 GB):

    python3 bench/checkpoint_stall.py --bin target/release --out out/stall --model 3b --device cuda:0 --every 60 --steps 119
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import time

import inputs

WARM_UP_STEPS = 2
TOKENS = 2_000_000
EVENT = re.compile(r"checkpoint of step (\d+): (\d+) bytes copied or written in ([\d.]+) s and durable after ([\d.]+) s; "
                   r"the optimizer stood still for ([\d.]+) s")


def llama(vocabulary, hidden, inner, layers, heads, kv, tied):
    return dict(model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=vocabulary, hidden_size=hidden,
                intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
                tie_word_embeddings=tied, hidden_act="silu", rms_norm_eps=1e-5, rope_theta=500000.0, max_position_embeddings=4096,
                initializer_range=0.02, bos_token_id=0, eos_token_id=1)


# name: configuration, sequence length, sequences a step
MODELS = {
    "22m": (llama(8192, 512, 1408, 6, 8, 4, True), 32, 1),
    "150m": (llama(8192, 1024, 2816, 12, 16, 8, True), 32, 1),
    "3b": (llama(128256, 3072, 8192, 28, 24, 8, True), 2048, 8),
    "8b": (llama(128256, 4096, 14336, 32, 32, 8, False), 2048, 64),
}


def write_job(folder, args, staging):
    config, length, batch = MODELS[args.model]
    inputs.write(folder, config, TOKENS)
    path = os.path.join(folder, "job.toml")
    more = "" if staging == "default" else f"staging_gib = {float(staging)}\n"
    with open(path, "w") as f:
        f.write(f"""name = "stall"
[model]
config = "config.json"
[data]
format = "tokens"
train = "tokens.bin"
sequence_length = {length}
[train]
steps = {100_000 if args.until_durable else args.steps}
batch_size = {args.batch or batch}
[optimizer]
lr = 1e-5
[checkpoint]
path = {json.dumps(os.path.abspath(args.checkpoints or os.path.join(folder, "checkpoints")))}
every_steps = {args.every}
{more}[output]
metrics = "metrics.jsonl"
""")
    return path


def read(path):
    """Whole lines of a metrics file, which may still be written."""
    try:
        return [json.loads(x) for x in open(path) if x.endswith("\n")]
    except FileNotFoundError:
        return []


def stop_when_durable(process, log, metrics, end):
    """Ends a run three steps after its checkpoint is durable. Whether it did so."""
    steps = None
    while process.poll() is None:
        if steps is None and EVENT.search(open(log).read()):
            steps = len(read(metrics))
        late = time.monotonic() > end
        if late or (steps is not None and len(read(metrics)) >= steps + 3):
            process.terminate()
            return not late
        time.sleep(0.2)
    return False


def run(args, staging):
    folder = os.path.join(args.out, f"{args.model}-{staging}")
    job = write_job(folder, args, staging)
    checkpoints = args.checkpoints or os.path.join(folder, "checkpoints")
    metrics, log = os.path.join(folder, "metrics.jsonl"), os.path.join(folder, "log.txt")
    for old in (metrics, log):
        if os.path.exists(old):
            os.remove(old)
    shutil.rmtree(checkpoints, ignore_errors=True)
    command = [os.path.join(args.bin, "ramtorchd"), "run", job, "--state-dir", os.path.join(folder, "state"), "--devices", args.device]
    with open(log, "w") as f:
        process = subprocess.Popen(command, stdout=f, stderr=f)
        stopped = args.until_durable and stop_when_durable(process, log, metrics, time.monotonic() + args.limit)
        code = process.wait(args.limit)
    shutil.rmtree(checkpoints, ignore_errors=True)
    text = open(log).read()
    found = EVENT.search(text)
    if not found or not (code == 0 or stopped):
        return {"staging": staging, "failed": code, "log": text[-2000:]}
    lines = read(metrics)
    at, size, copied, durable, stall = (float(x) for x in found.groups())
    before = [x["step_seconds"] for x in lines if WARM_UP_STEPS < x["step"] <= at]
    after = [x for x in lines if x["step"] > at]
    median = statistics.median(before)
    # Steps until the checkpoint was durable, and two more.
    beside, elapsed = [], 0.0
    for x in after:
        beside.append(x)
        elapsed += x["step_seconds"]
        if elapsed > durable and len(beside) > 2:
            break
    return {"staging": staging, "bytes": int(size), "stall_seconds": stall, "copied_seconds": copied, "durable_seconds": durable,
            "step_seconds": median, "steps_beside": len(beside),
            "wait_seconds": sum(x["checkpoint_wait_seconds"] for x in after),
            "longer_seconds": sum(x["step_seconds"] for x in beside) - median * len(beside),
            "losses": [x["loss"] for x in lines]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", default="target/release")
    parser.add_argument("--out", required=True)
    parser.add_argument("--model", choices=MODELS, default="150m")
    parser.add_argument("--device", default="cpu:1")
    parser.add_argument("--staging", default="0,default", help="GiB, or `default`, separated by commas")
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--steps", type=int, default=19, help="less than twice --every: one checkpoint a run")
    parser.add_argument("--until-durable", action="store_true",
                        help="end three steps after the checkpoint is durable, however many that takes (--every has to be large enough)")
    parser.add_argument("--batch", type=int, help="sequences a step")
    parser.add_argument("--checkpoints", help="folder for them (removed!), where that of --out is not on the disk to measure")
    parser.add_argument("--limit", type=float, default=560, help="seconds a run may take")
    args = parser.parse_args()
    results = [run(args, staging) for staging in args.staging.split(",")]
    with open(os.path.join(args.out, f"stall-{args.model}.json"), "w") as f:
        json.dump(results, f, indent=1)
    print("| staging | bytes | optimizer stood still | copied after | durable after | a step | steps beside it took longer by |")
    print("|---|---|---|---|---|---|---|")
    for r in results:
        if "failed" in r:
            print(f"| {r['staging']} | failed with exit code {r['failed']}: {r['log']} |")
            continue
        print(f"| {r['staging']} | {r['bytes'] / 1e9:.2f} GB | {r['stall_seconds']:.3f} s | {r['copied_seconds']:.2f} s "
              f"| {r['durable_seconds']:.2f} s | {r['step_seconds']:.3f} s | {r['longer_seconds']:.2f} s in {r['steps_beside']} steps |")
    same = len({json.dumps(r.get("losses")) for r in results}) == 1
    print(f"losses of all runs {'are the same to the bit' if same else 'DIFFER'}")


if __name__ == "__main__":
    main()
