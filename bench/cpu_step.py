#!/usr/bin/env python3
"""Time of a training step on this machine's CPU: ramtorch beside PyTorch, in alternation, on the same model and batch.

    bench/cpu_step.py MODEL [--rounds 3] [--batch 4] [--length 256] [--steps 8]

MODEL is a Hugging Face folder, as a 135M Llama. Both sides train it in fp32 with AdamW (weight decay, clipping) on the
same tokens; PyTorch uses every core and keeps all activations. A round is one process of each, the first steps dropped.
bench/README.md has more, and the results so far are in bench/results/.
"""
import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WARM_UP_STEPS = 2
LR, BETAS, EPS, WEIGHT_DECAY, CLIP = 1e-5, (0.9, 0.999), 1e-8, 0.1, 1.0


def tokens(args, vocabulary):
    """The same pseudo-random ids for both sides: their values cost nothing."""
    count = args.steps * args.batch * args.length + 1
    state, out = 12345, []
    for _ in range(count):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        out.append((state >> 33) % vocabulary)
    return out


def torch_side(args):
    """Runs in a process of its own; prints seconds and loss of every step as JSON."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="sdpa").train()
    parameters = list(model.parameters())
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, fused=True)
    ids = torch.tensor(tokens(args, model.config.vocab_size))
    seconds, losses = [], []
    for step in range(args.steps):
        at = step * args.batch * args.length
        begin = time.perf_counter()
        inputs = ids[at:at + args.batch * args.length].view(args.batch, args.length)
        targets = ids[at + 1:at + 1 + args.batch * args.length]
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(input_ids=inputs, use_cache=False).logits.flatten(0, 1), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begin)
    print(json.dumps({"seconds": seconds, "losses": losses, "version": torch.__version__}))


def run_torch(args):
    command = [sys.executable, os.path.abspath(__file__), args.model, "--torch-side"]
    for name in ("batch", "length", "steps", "threads"):
        command += [f"--{name}", str(getattr(args, name))]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    return json.loads(out.splitlines()[-1])


def run_ramtorch(args, vocabulary):
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "tokens.bin"), "wb") as f:
            f.write(b"".join(i.to_bytes(4, "little") for i in tokens(args, vocabulary)))
        job = f"""
name = "cpu-step"
[model]
path = {json.dumps(os.path.abspath(args.model))}
[data]
format = "tokens"
train = "tokens.bin"
sequence_length = {args.length}
shuffle = false
[train]
steps = {args.steps}
batch_size = {args.batch}
precision = "fp32"
{f"micro_batch_size = {args.micro_batch}" if args.micro_batch else ""}
[optimizer]
lr = {LR}
betas = [{BETAS[0]}, {BETAS[1]}]
eps = {EPS}
weight_decay = {WEIGHT_DECAY}
clip_norm = {CLIP}
[output]
metrics = "metrics.jsonl"
"""
        path = os.path.join(folder, "job.toml")
        with open(path, "w") as f:
            f.write(job)
        command = [args.ramtorchd, "run", path, "--devices", args.devices, "--threads", str(args.threads)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
        with open(os.path.join(folder, "metrics.jsonl")) as f:
            lines = [json.loads(line) for line in f]
    return {"seconds": [line["step_seconds"] for line in lines], "losses": [line["loss"] for line in lines]}


def cpu_name():
    with open("/proc/cpuinfo") as f:
        for line in f:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("--batch", type=int, default=4, help="sequences a step")
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence")
    parser.add_argument("--steps", type=int, default=8, help=f"steps a process, the first {WARM_UP_STEPS} are dropped")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--devices", default="cpu:1", help="as of `ramtorchd run`")
    parser.add_argument("--micro-batch", type=int, help="micro_batch_size; the plan chooses without it")
    parser.add_argument("--ramtorchd", default=os.path.join(ROOT, "target", "release", "ramtorchd"))
    parser.add_argument("--torch-side", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.torch_side:
        return torch_side(args)
    if args.steps <= WARM_UP_STEPS:
        parser.error(f"--steps must be more than {WARM_UP_STEPS}")
    with open(os.path.join(args.model, "config.json")) as f:
        vocabulary = json.load(f)["vocab_size"]
    times, losses, torch_version = {"torch": [], "ramtorch": []}, {}, None
    for round_number in range(1, args.rounds + 1):
        for side in ("torch", "ramtorch"):
            result = run_torch(args) if side == "torch" else run_ramtorch(args, vocabulary)
            torch_version = result.get("version", torch_version)
            kept = result["seconds"][WARM_UP_STEPS:]
            times[side].append(kept)
            losses[side] = result["losses"]
            print(f"round {round_number}  {side:9} {statistics.median(kept):.3f} s a step   ({min(kept):.3f} to {max(kept):.3f})", flush=True)
    medians = {side: statistics.median(t for kept in rounds for t in kept) for side, rounds in times.items()}
    count = args.batch * args.length
    # Both must have done the same work.
    off = max(abs(a - b) / abs(a) for a, b in zip(losses["torch"], losses["ramtorch"], strict=True))
    ratio = medians["torch"] / medians["ramtorch"]
    for side, t in medians.items():
        print(f"{side:9} median {t:.3f} s a step, {count / t:.0f} tok/s")
    print(f"ramtorch is {ratio:.2f} times as fast; losses differ by at most {off:.1e}")
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    now = datetime.datetime.now(datetime.timezone.utc)
    result = {"date": now.isoformat(timespec="seconds"), "commit": commit, "cpu": cpu_name(), "threads": args.threads,
              "model": os.path.basename(os.path.abspath(args.model)), "batch": args.batch, "length": args.length,
              "devices": args.devices, "torch_version": torch_version, "seconds": times, "median_seconds": medians,
              "tokens_per_second": {side: count / t for side, t in medians.items()}, "speed_ratio": ratio,
              "loss_difference_max": off}
    folder = os.path.join(ROOT, "bench", "results")
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"cpu_step-{now:%Y-%m-%dT%H%M%SZ}.json")
    with open(path, "w") as f:
        json.dump(result, f, indent=1)
        f.write("\n")
    print(f"written to {os.path.relpath(path, os.getcwd())}")


if __name__ == "__main__":
    main()
