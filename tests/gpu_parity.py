"""Trains the fixtures on GPU 0, evaluates and generates with them, and compares with PyTorch's runs. See gpu.sh.

    python3 gpu_parity.py RAMTORCHD OUT [NAME...]      NAME: a run of fixtures/expected, bf16, wide, inference, ends (default: all)

The client lies beside RAMTORCHD. With DEVICES=cpu in the environment it goes through the same on a CPU device, to test itself."""
import glob
import itertools
import json
import os
import re
import shutil
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "bench"))
from node import Node  # noqa: E402

FIXTURES = os.path.join(HERE, "fixtures")
DEVICE = "cpu:1" if os.environ.get("DEVICES") == "cpu" else "cuda:0"
ROOM = 8 << 30
# Relative to the fp64 run. bf16 has 8 bits of mantissa; what it may cost is known from PyTorch's own bf16 runs.
LIMITS = {"fp32": (1e-5, 1e-4), "bf16": (2e-2, 1e-1)}
# Of all greedy tokens, how many come before the first difference of their text in bf16; PyTorch's are in fp64.
LEAST_SAME_BF16 = 1 / 3


def job(folder, expected, precision, train=""):
    """A job file for a run of fixtures/expected, which may name its model, tokens and more; `train`: more lines for [train]."""
    model = os.path.join(FIXTURES, "models", expected["model"])
    seeded = "seed" in expected
    lines = [
        'name = "gpu-parity"',
        "[model]",
        f'config = "{model}/config.json"\nseed = {expected["seed"]}' if seeded else f'path = "{model}"',
        "[data]",
        'format = "tokens"',
        f'train = "{os.path.join(FIXTURES, "wide-tokens.bin" if seeded else "tokens.bin")}"',
        f'sequence_length = {expected["sequence_length"]}',
        "shuffle = false",
        f'document_mask = {json.dumps(expected.get("document_mask", False))}',
        "[train]",
        f'steps = {expected["steps"]}',
        f'batch_size = {expected["batch_size"]}',
        f'micro_batch_size = {2 if seeded else 4}',
        f'precision = "{precision}"',
        train,
        "[optimizer]",
        *(f"{k} = {json.dumps(v)}" for k, v in expected["optimizer"].items()),
        "[schedule]",
        *(f"{k} = {json.dumps(v)}" for k, v in expected["schedule"].items()),
        "[output]",
        'metrics = "metrics.jsonl"',
    ]
    if "output" in expected:
        lines.append(f'path = "{expected["output"]}"')
    path = os.path.join(folder, "job.toml")
    with open(path, "w") as f:
        f.write("\n".join(lines) + "\n")
    return path


def run(binary, folder, expected, precision, train=""):
    """Runs the job to its end: its metrics, or what it says of its failure."""
    folder = os.path.abspath(folder)
    os.makedirs(folder, exist_ok=True)
    command = [binary, "run", job(folder, expected, precision, train), "--devices", DEVICE, "--device-memory", str(ROOM)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        return None, "not done within 180 s"
    if done.returncode != 0:
        return None, f"exit {done.returncode}: {(done.stdout + done.stderr)[-1500:]}"
    with open(os.path.join(folder, "metrics.jsonl")) as f:
        return [json.loads(line) for line in f], None


class Tally:
    def __init__(self):
        self.passed = self.failed = 0

    def say(self, good, text):
        self.passed, self.failed = self.passed + bool(good), self.failed + (not good)
        print(f"{'ok  ' if good else 'FAIL'} {text}", flush=True)


def compare(tally, binary, out, name, expected, precision, train=""):
    """One run against PyTorch's in fp64: within LIMITS of each loss and norm. Its losses, where it came to its end."""
    loss_limit, norm_limit = LIMITS[precision]
    what = f"{name} {precision}{f' ({train})' if train else ''}"
    lines, failure = run(binary, os.path.join(out, re.sub(r"\W+", "-", what)), expected, precision, train)
    if failure:
        tally.say(False, f"{what}: {failure}")
        return None
    worst = [max(abs(m[k] / e - 1) for m, e in zip(lines, expected[k])) for k in ("loss", "grad_norm")]
    good = len(lines) == expected["steps"] and worst[0] < loss_limit and worst[1] < norm_limit
    tally.say(good, f"{what}: {len(lines)} steps, loss within {worst[0]:.1e}, norm within {worst[1]:.1e}")
    return [line["loss"] for line in lines] if len(lines) == expected["steps"] else None


def rms(losses, reference):
    return (sum((a / b - 1) ** 2 for a, b in zip(losses, reference)) / len(reference)) ** 0.5


def no_farther(tally, what, ours, theirs):
    """Over all models, root mean squares of ours against those of PyTorch's bf16 runs; a tenth is what another order of summation
    makes."""
    mean = [(sum(x * x for x in all) / len(all)) ** 0.5 for all in (ours, theirs)]
    tally.say(mean[0] <= 1.1 * mean[1], f"{what}: off by {mean[0]:.2e}, PyTorch by {mean[1]:.2e}")


def bf16(tally, binary, out):
    """50 steps of every family in bf16: no farther from fp32 than PyTorch's bf16 run."""
    with open(os.path.join(FIXTURES, "expected", "bf16.json")) as f:
        reference = json.load(f)
    ours, theirs = [], []
    for name, expected in reference["models"].items():
        lines, failure = run(binary, os.path.join(out, f"{name}-bf16-50"), {**reference, "model": name}, "bf16")
        losses = [line["loss"] for line in lines or []]
        if failure or len(losses) != len(expected["fp32"]):
            return tally.say(False, f"{name} bf16, 50 steps: {failure or f'{len(losses)} steps'}")
        ours.append(rms(losses, expected["fp32"]))
        theirs.append(expected["bf16_rms"])
        print(f"     {name}: off by {ours[-1]:.1e} (root mean square of 50 steps), PyTorch by {theirs[-1]:.1e}")
    no_farther(tally, f"bf16 against fp32, 50 steps of {len(ours)} families", ours, theirs)


def wide_runs():
    with open(os.path.join(FIXTURES, "expected", "wide.json")) as f:
        reference = json.load(f)
    return reference, {name: {**reference, **expected} for name, expected in reference["runs"].items()}


def wide(tally, binary, out):
    """50 steps of models with heads of 64 and aligned sizes, one with documents packed: what GPUs have fast kernels for."""
    _, runs = wide_runs()
    for train in ("", "deterministic = false"):
        ours, theirs = [], []
        for name, expected in runs.items():
            if not train:
                compare(tally, binary, out, name, expected, "fp32")
            losses = compare(tally, binary, out, name, expected, "bf16", train)
            if losses is None:
                return
            ours.append(rms(losses, expected["loss"]))
            theirs.append(expected["bf16_rms"])
            print(f"     {name}: off by {ours[-1]:.1e} (root mean square of 50 steps), PyTorch by {theirs[-1]:.1e}")
        no_farther(tally, f"bf16 against fp64, 50 steps of {len(ours)} wide runs{f', {train}' if train else ''}", ours, theirs)


def refusal(node, call):
    """Bytes of device memory that a call would need at least, and those it was given, as its refusal names them."""
    try:
        node.ask(*call, timeout=120)
    except RuntimeError as e:
        found = re.search(r"(\d+) bytes of device memory(?: are needed at least)?, (\d+) are given", str(e))
        if found:
            return int(found.group(1)), int(found.group(2))
        raise RuntimeError(f"{call[0]} with too little device memory is refused with another text: {e}") from e
    raise RuntimeError(f"{call[0]} with too little device memory was taken")


def same_tokens(texts, expected):
    """Tokens before the first difference of each text, and all."""
    same = total = 0
    for a, b in zip(texts, expected):
        a, b = a.split(), b.split()
        total += len(b)
        same += next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return same, total


def seeded_folder(binary, out, model, reference):
    """A model that is not stored, as a folder: trained for a step at a rate of zero."""
    still = {**reference, "model": model, "steps": 1, "output": "model", "optimizer": {**reference["optimizer"], "lr": 0.0}}
    still["schedule"] = {"kind": "constant", "warmup_steps": 0, "min_lr_ratio": 0.0}
    folder = os.path.join(out, f"{model}-folder")
    if os.path.exists(os.path.join(folder, "model", "config.json")):
        return os.path.join(folder, "model"), None
    _, failure = run(binary, folder, still, "fp32")
    return os.path.join(folder, "model"), failure


def stored_models():
    """Fixtures that are evaluated and generated with: name, folder, what is expected."""
    with open(os.path.join(FIXTURES, "expected", "inference.json")) as f:
        return [(name, os.path.join(FIXTURES, "models", name), e) for name, e in json.load(f).items()]


def greedy(folder, e, precision, tokens):
    """The call that has the likeliest tokens made after each of a model's prompts."""
    prompts = (x for p in e["prompts"] for x in ("--prompt", p))
    return ["generate", folder, "--temperature", "0", "--max-new-tokens", str(tokens), "--precision", precision, *prompts]


def inference(tally, binary, out):
    """`ramtorch eval` and greedy `ramtorch generate`, weights on the device and streamed to it, against PyTorch in fp64."""
    reference, _ = wide_runs()
    models = [(name, folder, "held-out.bin", e) for name, folder, e in stored_models()]
    for name, e in reference["inference"].items():
        folder, failure = seeded_folder(binary, out, name, reference)
        if failure:
            tally.say(False, f"{name}: {failure}")
        else:
            models.append((name, folder, "wide-tokens.bin", e))
    bin_folder, log_path = os.path.dirname(os.path.abspath(binary)), os.path.join(out, "inference.log")

    def with_daemon(memory, work):
        with open(log_path, "a") as log, Node(bin_folder, DEVICE, log, None, ("--device-memory", str(memory))) as node:
            return work(node)

    keys, calls = [], []
    for name, folder, data, e in models:
        for precision in LIMITS:
            length, tokens = str(e["eval_sequence_length"]), str(e["eval_tokens"])
            keys += [(name, precision, "eval"), (name, precision, "generate")]
            calls.append(["eval", folder, "--data", os.path.join(FIXTURES, data), "--format", "tokens", "--sequence-length", length,
                          "--max-tokens", tokens, "--micro-batch-size", "4", "--precision", precision])
            calls.append(greedy(folder, e, precision, e["max_new_tokens"]))
    # What is said of `generate` leaves the libraries out: so much less than the daemon has is given to what can never fit.
    endless = ["generate", models[0][1], "--max-new-tokens", "1000000", *["--prompt", "w1"] * 48]
    *answers, (_, given) = with_daemon(ROOM, lambda node: [*(node.ask(*call, timeout=120) for call in calls), refusal(node, endless)])
    roomy, libraries = dict(zip(keys, answers)), ROOM - given
    # One of the stored models: what is streamed is the same code for all. The least that each call takes differs, so that each has a
    # daemon of its own then.
    streamed = {key: call for key, call in zip(keys, calls) if key[0] in ("llama", *reference["inference"])}
    least = with_daemon(1 << 10, lambda node: {key: refusal(node, call)[0] for key, call in streamed.items()})
    least = {key: bytes_ + (libraries if key[2] == "generate" else 0) for key, bytes_ in least.items()}
    for name, precision, kind in keys:
        what, e = f"{kind} {name} {precision}", next(m[3] for m in models if m[0] == name)
        answers, key = {"all on the device": roomy[name, precision, kind]}, (name, precision, kind)
        if key in least:
            answers[f"streamed, {least[key]} bytes"] = with_daemon(least[key], lambda node, key=key: node.ask(*streamed[key], timeout=120))
        for where, answer in answers.items():
            if kind == "eval":
                off = abs(answer["loss"] / e["eval_loss"] - 1)
                tally.say(off < LIMITS[precision][0] and int(answer["tokens"]) == e["eval_tokens"],
                          f"{what}, {where}: {answer['tokens']} tokens, loss within {off:.1e}")
            else:
                same, total = same_tokens(answer["texts"], e["texts"])
                exact = [t.split() for t in answer["texts"]] == [t.split() for t in e["texts"]]
                tally.say(exact if precision == "fp32" else same >= LEAST_SAME_BF16 * total, f"{what}, {where}: {same} of {total} tokens before a difference")


def ending(texts):
    """A token that ends most texts early, so that their rows are given up, and each text's length before it; None where there is none."""
    for word in sorted({w for t in texts for w in t}):
        at = [t.index(word) if word in t else len(t) for t in texts]
        live = sum(a == len(t) for a, t in zip(at, texts))
        if 0 < live <= len(texts) // 2 and min(at) > 0:
            return word, at
    return None


def ends(tally, binary, out):
    """Texts that end early, and give up their rows for those that go on, are as they are without an end, up to there."""
    bin_folder, shortened = os.path.dirname(os.path.abspath(binary)), 0

    def texts(node, folder, e, precision):
        return [t.split() for t in node.ask(*greedy(folder, e, precision, 3 * e["max_new_tokens"]), timeout=120)["texts"]]

    def ending_at(folder, word, copy):
        """A copy of a model in which a token ends texts; tokens of the fixtures' tokenizer are named by their ids."""
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        with open(os.path.join(folder, "config.json")) as f:
            config = json.load(f)
        with open(os.path.join(copy, "config.json"), "w") as f:
            json.dump({**config, "eos_token_id": int(word[1:])}, f)
        return copy

    with open(os.path.join(out, "ends.log"), "a") as log, Node(bin_folder, DEVICE, log, None, ("--device-memory", str(ROOM))) as node:
        for (name, folder, e), precision in itertools.product(stored_models(), LIMITS):
            endless = texts(node, folder, e, precision)
            found = ending(endless)
            if found is None:
                continue
            word, lengths = found
            ended = texts(node, ending_at(folder, word, os.path.join(out, f"ends-{name}-{precision}")), e, precision)
            wanted, shortened = [t[:n] for t, n in zip(endless, lengths)], shortened + 1
            tally.say(ended == wanted, f"texts of {name} {precision} that end at {word}: {[len(t) for t in ended]} tokens of {lengths}")
    tally.say(shortened > 0, f"{shortened} runs with texts that end early")


def main():
    binary, out, chosen = sys.argv[1], os.path.abspath(sys.argv[2]), sys.argv[3:]
    os.makedirs(out, exist_ok=True)
    tally = Tally()
    for path in sorted(glob.glob(os.path.join(FIXTURES, "expected", "*.json"))):
        name = os.path.basename(path)[:-5]
        if chosen and name not in chosen:
            continue
        with open(path) as f:
            expected = json.load(f)
        if "grad_norm" not in expected or "sequence_length" not in expected or name.startswith("stack"):
            continue
        for precision in LIMITS:
            compare(tally, binary, out, name, expected, precision)
    if not chosen or "llama" in chosen:
        with open(os.path.join(FIXTURES, "expected", "llama.json")) as f:
            compare(tally, binary, out, "llama", json.load(f), "fp32", "deterministic = false")
    for name, check in dict(bf16=bf16, wide=wide, inference=inference, ends=ends).items():
        if not chosen or name in chosen:
            try:
                check(tally, binary, out)
            except Exception as e:  # the other checks are worth their time all the same
                tally.say(False, f"{name}: {e!r}")
    print(f"{tally.passed} passed, {tally.failed} failed")
    return tally.failed > 0


if __name__ == "__main__":
    sys.exit(main())
