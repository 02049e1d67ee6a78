#!/usr/bin/env python3
"""Training steps on GPUs: the limit, the plan's prediction, the measurement, and the ratio, for a table of models.

    python3 bench/gpu_table.py --bin target/release --out DIR [--rows llama-8b-16k,qwen-7b] [--steps 10] [--device cuda:0]
    python3 bench/gpu_table.py --bin target/release --out DIR --gpus 4 [--one llama-8b-16k=9000] [--one ONE/table.json]

Models are made from their configuration alone (seeded weights), data are random tokens. For every row the plan is asked
first, by a daemon of its own (which measures the GPU), then the job runs with `ramtorchd run`. Writes table.json, table.md,
and for each row its job file, plan, metrics and log. Needs nothing but Python, the two binaries and nvidia-smi.

Ends with 1 where a row was refused, crashed, ran out of time, or took more of the GPU's memory than its plan. A prediction that is
off by more than 15 % is marked with (!), and no failure: it says something of the plan, and not that anything is wrong.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time

import inputs
import machine
from node import Node, stop

WARM_UP_STEPS = 2
# Predictions are within this share of what is measured, or marked.
CLOSE = 0.15
TOKENS = 4_000_000


def llama(hidden, inner, layers, heads, kv, tied):
    return dict(model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=128256, hidden_size=hidden, intermediate_size=inner,
                num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv, head_dim=128, tie_word_embeddings=tied,
                hidden_act="silu", rms_norm_eps=1e-5, rope_theta=500000.0, max_position_embeddings=131072, initializer_range=0.02,
                bos_token_id=128000, eos_token_id=128001)


def qwen2(hidden, inner, layers, heads, kv):
    return dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"], vocab_size=152064, hidden_size=hidden, intermediate_size=inner,
                num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv, tie_word_embeddings=False, hidden_act="silu",
                rms_norm_eps=1e-6, rope_theta=1000000.0, max_position_embeddings=131072, initializer_range=0.02,
                bos_token_id=151643, eos_token_id=151643)


LLAMA_8B = llama(4096, 14336, 32, 32, 8, False)
# name: configuration, sequence length, sequences a step, tokens a second: goal and what the hardware allows (H100 80 GB,
# 16 vCPU, 128 GiB), more of the job file: lines of [train], and of [optimizer]
ROWS = {
    # In 14 bytes of RAM a parameter; the next row with a log of gradients, where the plan finds it worth its RAM.
    "llama-8b-16k": (LLAMA_8B, 2048, 8, 7500, 9500, "write_back_steps = 1\n", ""),
    "llama-8b-16k-log": (LLAMA_8B, 2048, 8, 7500, 9500, "", ""),
    "llama-8b-131k": (LLAMA_8B, 2048, 64, 12500, 14500, "", ""),
    "qwen-7b-131k": (qwen2(3584, 18944, 28, 28, 4), 1024, 128, 13700, 17000, "", ""),
    "qwen-14b-65k": (qwen2(5120, 13824, 48, 40, 8), 1024, 64, 6400, 8000, "", 'moments = "bf16"\n'),
    "llama-3b-16k": (llama(3072, 8192, 28, 24, 8, True), 2048, 8, 25000, 33000, "", ""),
    "llama-8b-65k": (LLAMA_8B, 2048, 32, 11500, 14450, "", ""),
    # Of qwen-7b-131k half, on each of eight GPUs: 524,288 tokens a step.
    "qwen-7b-65k": (qwen2(3584, 18944, 28, 28, 4), 1024, 64, 14000, 17000, "", ""),
    "qwen-32b-32k": (qwen2(5120, 27648, 64, 40, 8), 2048, 16, 2250, 3700, "", ""),
}
# With --gpus, sequences are those of each GPU. Rows that run by default then, and what all GPUs together are to reach, a GPU.
SEVERAL = {"llama-8b-16k": 9500, "llama-8b-65k": 11500, "qwen-7b-65k": 14000, "qwen-32b-32k": 2250}
# On one GPU only where they are asked for.
LARGE = {"llama-8b-16k-log", "llama-8b-65k", "qwen-7b-65k", "qwen-32b-32k"}


def write_job(folder, name, config, length, batch, steps, more, train, weights):
    inputs.write(folder, config, TOKENS)
    if weights:
        inputs.write_weights(folder, config)
    path = os.path.join(folder, "job.toml")
    with open(path, "w") as f:
        f.write(f"""name = "{name}"
[model]
{'path = "."' if weights else 'config = "config.json"'}
[data]
format = "tokens"
train = "tokens.bin"
sequence_length = {length}
[train]
steps = {steps}
batch_size = {batch}
precision = "bf16"
{train}
[optimizer]
lr = 1e-5
{more}[output]
metrics = "metrics.jsonl"
""")
    return path


def ask_plan(args, folder, job, log):
    """The plan as JSON, or the refusal as text."""
    try:
        with Node(args.bin, args.device, log, args.state) as node:
            begin = time.time()
            plan = node.ask("plan", job, timeout=300)
            took = time.time() - begin
    except subprocess.TimeoutExpired:
        return None, "no plan within 300 s"
    except RuntimeError as e:
        return None, str(e)
    with open(os.path.join(folder, "plan.txt"), "w") as f:
        f.write(plan["text"])
    print(plan["text"], f"(asked in {took:.1f} s)", flush=True)
    return plan, None


class MemorySampler:
    """Peak of GPUs' used memory, of the one that uses most, as nvidia-smi tells it; MiB. Zero where there is no nvidia-smi."""

    def __init__(self, device):
        self.peak, self.first = 0, None
        indices = ",".join(d.rsplit(":", 1)[-1] for d in device.split(","))
        command = ["nvidia-smi", "-i", indices, "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-lms", "100"]
        try:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError:
            self.process = None
            return
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def read(self):
        for line in self.process.stdout:
            try:
                used = int(line.strip())
            except ValueError:
                continue
            self.first = used if self.first is None else self.first
            self.peak = max(self.peak, used)

    def finish(self):
        if self.process is not None:
            stop(self.process, 5)
            self.thread.join(5)
        return self.peak, self.first or 0


def read_metrics(path):
    lines = []
    try:
        with open(path) as f:
            for line in f:
                if line.endswith("\n"):
                    lines.append(json.loads(line))
    except OSError:
        pass
    return lines


def kill_a_worker(parent):
    """Kills (SIGKILL) a worker of this daemon; whether there was one."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as f:
                command = f.read().split(b"\0")
            with open(f"/proc/{pid}/stat") as f:
                of = int(f.read().rsplit(")", 1)[1].split()[1])
            if of == parent and b"worker" in command:
                os.kill(int(pid), signal.SIGKILL)
                return True
        except (OSError, IndexError):
            continue  # it is gone
    return False


def run_job(args, folder, job, log):
    metrics = os.path.join(folder, "metrics.jsonl")
    if os.path.exists(metrics):
        os.remove(metrics)
    sampler = MemorySampler(args.device)
    time.sleep(0.5)
    begin = time.time()
    command = [os.path.join(args.bin, "ramtorchd"), "run", job, "--state-dir", args.state, "--devices", args.device]
    if args.trace:
        command += ["--trace", os.path.join(folder, "trace.json"), "--trace-steps", args.trace]
    else:
        command.append("--quiet")
    process = subprocess.Popen(command, stdout=log, stderr=log)
    first, ended, shared, shared_before = None, False, 0.0, shared_memory_gib()
    killed, steps_then, recovered = None, 0, None
    while process.poll() is None:
        shared = max(shared, shared_memory_gib() - shared_before)
        if first is None and read_metrics(metrics):
            first = time.time() - begin
        if args.kill and recovered is None:
            steps = len(read_metrics(metrics))
            if killed is None and steps >= args.kill and kill_a_worker(process.pid):
                killed, steps_then = time.time(), steps
            # The step that was committed when it died may be written a moment later.
            elif killed is not None and steps > steps_then + 1:
                recovered = time.time() - killed
        if time.time() - begin > args.limit:
            ended = True
            stop(process)
            break
        time.sleep(0.05)
    peak, before = sampler.finish()
    lines = read_metrics(metrics)
    result = {"exit_code": process.returncode, "timed_out": ended, "gpu_peak_mib": peak, "gpu_before_mib": before, "steps": len(lines),
              "shared_memory_gib": shared}
    if killed is not None:
        result["killed_at_step"] = steps_then
        if recovered is not None:
            result["two_steps_after_death_seconds"] = recovered
    if first is not None and lines:
        result["start_up_seconds"] = first - lines[0]["step_seconds"]
    timed = lines[WARM_UP_STEPS:]
    if not timed:
        return result
    seconds = [x["step_seconds"] for x in timed]
    median = statistics.median(seconds)
    result.update(step_seconds=median, fastest=min(seconds), slowest=max(seconds), loss=lines[-1]["loss"],
                  tokens_per_second=timed[0]["tokens"] / median, tflops=statistics.median(x["tflops"] for x in timed))
    wait = statistics.median(x["copy_wait_seconds"] for x in timed)
    # Where copy_wait_seconds is nothing but the host's waiting for pages of the optimizer, how long arithmetic waited for
    # copies is not told: the plan's figure and a trace say more.
    pages = statistics.median(x.get("optimizer_wait_seconds", x["copy_wait_seconds"]) for x in timed)
    result["optimizer_wait_seconds"] = pages
    if wait != pages:
        result["copy_wait_share"] = wait / median
    for key in ("optimizer_seconds", "optimizer_pages_cpu", "optimizer_pages_device"):
        if key in timed[0]:
            result[key] = statistics.median(x[key] for x in timed)
    return result


def number(x, form):
    return "-" if x is None else format(x, form)


HEAD = ["row", "limit tok/s", "goal", "predicted s", "measured s", "measured / predicted", "tok/s", "of the limit", "TFLOP/s", "copy wait",
        "optimizer wait s", "GPU peak / plan GiB", "segment B/param", "start-up s"]
# With several GPUs.
HEAD_SEVERAL = ["GPUs", "segment GiB", "shared memory GiB", "tok/s of one", "scaling"]


def missed(r):
    """The prediction was not close."""
    predicted, measured = (r.get("plan") or {}).get("step_seconds"), (r.get("measured") or {}).get("step_seconds")
    return bool(predicted and measured) and abs(measured / predicted - 1) > CLOSE


def failures(r, steps, kill):
    """What is wrong with a row, in words."""
    if "refused" in r:
        return ["refused"]
    m = r.get("measured")
    if m is None:
        return []  # nothing was to run
    wrong = []
    if m["timed_out"]:
        wrong.append("out of time")
    elif m["exit_code"] != 0:
        wrong.append(f"exit code {m['exit_code']}")
    if kill and m.get("two_steps_after_death_seconds") is None:
        wrong.append("no worker was killed" if "killed_at_step" not in m else "no step came after the death")
    if m["steps"] < steps:
        wrong.append(f"{m['steps']} of {steps} steps")
    # nvidia-smi counts whole MiB, and what others had before.
    peak = m["gpu_peak_mib"] - m["gpu_before_mib"] - 1
    if peak > r["plan_device_gib"] * 1024:
        wrong.append(f"{peak / 1024:.2f} GiB of the GPU's memory, {r['plan_device_gib']:.2f} planned")
    return wrong


def table_line(name, r):
    m, p = r.get("measured") or {}, r.get("plan") or {}
    if r.get("refused"):
        return [name, str(r["limit"]), str(r["goal"]), "refused"] + ["-"] * (len(HEAD) - 4)
    predicted, measured = p.get("step_seconds"), m.get("step_seconds")
    speed = m.get("tokens_per_second")
    peak = f"{number(m.get('gpu_peak_mib', 0) / 1024, '.2f')} / {number(r.get('plan_device_gib'), '.2f')}"
    return [name, str(r["limit"]), str(r["goal"]), number(predicted, ".3f"), number(measured, ".3f"),
            number(measured / predicted if measured and predicted else None, ".2f") + (" (!)" if missed(r) else ""), number(speed, ".0f"),
            number(speed / r["limit"] if speed else None, ".0%"), number(m.get("tflops"), ".0f"), number(m.get("copy_wait_share"), ".1%"),
            number(m.get("optimizer_wait_seconds"), ".3f"), peak, number(r.get("segment_bytes_per_parameter"), ".2f"),
            number(m.get("start_up_seconds"), ".1f")]


def several_columns(r):
    m = r.get("measured") or {}
    speed, one = m.get("tokens_per_second"), r.get("one")
    scaling = speed / one / r["gpus"] if speed and one else None
    return [str(r["gpus"]), number(r.get("segment_gib"), ".2f"), number(m.get("shared_memory_gib"), ".2f"), number(one, ".0f"),
            number(scaling, ".3f")]


def one_gpu_figures(sources):
    """Tokens a second of one GPU, by row: NAME=NUMBER, or the table.json of a run on one."""
    figures = {}
    for source in sources:
        if "=" in source:
            name, value = source.split("=", 1)
            figures[name] = float(value)
            continue
        with open(source) as f:
            for name, r in json.load(f).items():
                speed = (r.get("measured") or {}).get("tokens_per_second")
                if speed and r.get("gpus", 1) == 1:
                    figures[name] = speed
    return figures


def shared_memory_gib():
    with open("/proc/meminfo") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("Shmem:")) / 2**20


def write_table(args, results):
    with open(os.path.join(args.out, "table.json"), "w") as f:
        json.dump(results, f, indent=1)
    head = HEAD + (HEAD_SEVERAL if args.gpus > 1 else [])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(table_line(name, r) + (several_columns(r) if args.gpus > 1 else [])) + " |" for name, r in results.items()]
    lines += [f"\n{name}: {r['refused']}" for name, r in results.items() if r.get("refused")]
    lines += [f"\n{name} FAILED: {', '.join(r['failures'])}" for name, r in results.items() if r.get("failures") and not r.get("refused")]
    for name, r in results.items():
        m = r.get("measured") or {}
        if "two_steps_after_death_seconds" in m:
            lines.append(f"\n{name}: a worker was killed after step {m['killed_at_step']}; two steps later "
                         f"{m['two_steps_after_death_seconds']:.1f} s had gone by")
    text = "\n".join(lines) + "\n"
    with open(os.path.join(args.out, "table.md"), "w") as f:
        f.write(text)
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", required=True, help="folder with ramtorchd and ramtorch")
    parser.add_argument("--out", required=True, help="folder for results")
    parser.add_argument("--rows", help="names, separated by commas: " + ", ".join(ROWS))
    parser.add_argument("--steps", type=int, default=8, help=f"steps a row, the first {WARM_UP_STEPS} are not counted")
    parser.add_argument("--limit", type=float, default=400, help="seconds a row may take")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--gpus", type=int, default=1, help="the first so many GPUs; rows have their sequences on each of them")
    parser.add_argument("--one", action="append", default=[], help="tokens a second of one GPU: ROW=NUMBER, or a table.json")
    parser.add_argument("--train", default="", help="a line for [train] of every job, such as deterministic = false")
    parser.add_argument("--trace", metavar="FIRST..LAST",
                        help="a timeline of these steps in each row's folder; where their time went is at the end of its log.txt")
    parser.add_argument("--kill", type=int, metavar="STEP", help="kill a worker after so many steps, and say when training went on")
    parser.add_argument("--weights", action="store_true",
                        help="begin with weights from a safetensors file (2 bytes a parameter of disk), and not with drawn ones")
    parser.add_argument("--plan-only", action="store_true", help="ask for plans, run nothing")
    parser.add_argument("--touch", type=float, metavar="GIB",
                        help="first fill and free so much memory, on virtual machines whose memory grows on demand")
    parser.add_argument("--shm", type=float, metavar="GIB", help="first remount /dev/shm with at least so much (as root)")
    parser.add_argument("--state", help="state folder of the daemons, with the cache of rates; default: OUT/state")
    args = parser.parse_args()
    if args.gpus > 1:
        args.device = ",".join(f"cuda:{i}" for i in range(args.gpus))
    ones = one_gpu_figures(args.one)
    names = args.rows.split(",") if args.rows else (list(SEVERAL) if args.gpus > 1 else [n for n in ROWS if n not in LARGE])
    unknown = [n for n in names if n not in ROWS]
    if unknown:
        parser.error(f"no such row: {', '.join(unknown)}")
    if args.steps <= WARM_UP_STEPS:
        parser.error(f"--steps must be more than {WARM_UP_STEPS}")
    args.out, args.bin = os.path.abspath(args.out), os.path.abspath(args.bin)
    args.state = os.path.abspath(args.state or os.path.join(args.out, "state"))
    os.makedirs(args.out, exist_ok=True)
    if args.touch and not machine.touch(args.touch):
        parser.error(f"--touch: this machine does not have {args.touch:g} GiB to give")
    refused = machine.enlarge_shm(args.shm) if args.shm else None
    if refused:
        parser.error(f"--shm: {refused}")
    results = {}
    for name in names:
        config, length, batch, goal, limit, train, more = ROWS[name]
        if args.gpus > 1:
            batch, goal, limit = batch * args.gpus, SEVERAL.get(name, goal) * args.gpus, limit * args.gpus
        folder = os.path.join(args.out, name)
        job = write_job(folder, name, config, length, batch, args.steps, more, train + args.train, args.weights)
        results[name] = r = {"goal": goal, "limit": limit, "gpus": args.gpus, "one": ones.get(name)}
        print(f"== {name}", flush=True)
        with open(os.path.join(folder, "log.txt"), "w") as log:
            plan, refused = ask_plan(args, folder, job, log)
            if plan is None:
                r["refused"] = refused
            else:
                r["plan"] = plan
                device = plan["device_bytes"]
                r["plan_device_gib"] = max(map(int, device if isinstance(device, list) else [device])) / 2**30
                r["segment_bytes_per_parameter"] = int(plan["segment_bytes"]) / int(plan["parameters"])
                r["segment_gib"] = int(plan["segment_bytes"]) / 2**30
                if not args.plan_only:
                    r["measured"] = run_job(args, folder, job, log)
        r["failures"] = failures(r, args.steps, args.kill)
        os.remove(os.path.join(folder, "tokens.bin"))
        if args.weights:
            os.remove(os.path.join(folder, "model.safetensors"))
        print(write_table(args, results), flush=True)
    return int(any(r["failures"] for r in results.values()))


if __name__ == "__main__":
    sys.exit(main())
