"""Several GPUs against one, against themselves, with a worker killed, and without peer access. See gpus.sh.

With DEVICES=cpu in the environment it goes through the same with CPU devices and a tiny model, to test itself."""
import array
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time

STEPS = 12
SEQUENCE = 512
TOKENS = 400_000
# A quarter of a billion parameters with odd sizes; blocks of very different lengths.
CONFIG = dict(model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=50_021, hidden_size=1024, intermediate_size=2816,
              num_hidden_layers=10, num_attention_heads=16, num_key_value_heads=4, head_dim=64, tie_word_embeddings=False,
              hidden_act="silu", rms_norm_eps=1e-5, rope_theta=500000.0, max_position_embeddings=4096, initializer_range=0.02,
              bos_token_id=1, eos_token_id=2)


CPU = os.environ.get("DEVICES") == "cpu"
if CPU:
    CONFIG.update(vocab_size=211, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, head_dim=12)
    SEQUENCE = 16


class Rig:
    def __init__(self, binary, out, gpus):
        self.binary, self.out, self.gpus = os.path.abspath(binary), os.path.abspath(out), gpus
        self.failed = 0
        os.makedirs(self.out, exist_ok=True)
        with open(os.path.join(self.out, "config.json"), "w") as f:
            json.dump(CONFIG, f)
        values = array.array("I")
        values.frombytes(random.Random(0).randbytes(4 * TOKENS))
        top = CONFIG["vocab_size"] - 100
        with open(os.path.join(self.out, "tokens.bin"), "wb") as f:
            array.array("I", (v % top for v in values)).tofile(f)

    def job(self, name, train="", steps=STEPS, batch=4, optimizer=""):
        """Sequences of a step: not a multiple of the number of GPUs, so that shares differ."""
        folder = os.path.join(self.out, name)
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, "job.toml")
        with open(path, "w") as f:
            f.write(f"""name = "{name}"
[model]
config = "{self.out}/config.json"
[data]
format = "tokens"
train = "{self.out}/tokens.bin"
sequence_length = {SEQUENCE}
[train]
steps = {steps}
batch_size = {batch * self.gpus + 1}
{train}
[optimizer]
lr = 3e-4
{optimizer}
[output]
metrics = "metrics.jsonl"
""")
        for old in ("metrics.jsonl", "log.txt"):
            if os.path.exists(os.path.join(folder, old)):
                os.remove(os.path.join(folder, old))
        return folder, path

    def start(self, folder, path, gpus, env=None):
        devices = f"cpu:{gpus}" if CPU else ",".join(f"cuda:{i}" for i in range(gpus))
        command = [self.binary, "run", path, "--state-dir", os.path.join(self.out, "state"), "--devices", devices]
        log = open(os.path.join(folder, "log.txt"), "w")
        return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **(env or {})})

    def run(self, name, gpus, train="", steps=STEPS, env=None, limit=150, optimizer=""):
        folder, path = self.job(name, train, steps, optimizer=optimizer)
        begin = time.time()
        process = self.start(folder, path, gpus, env)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            code = "time limit"
        lines = read(folder)
        if code != 0 or len(lines) != steps:
            print(f"     {name}: exit {code}, {len(lines)} of {steps} steps\n{tail(folder)}")
            return None
        usual = statistics.median(x["step_seconds"] for x in lines[2:])
        print(f"     {name}: {time.time() - begin:.1f} s in all, {usual:.3f} s a step, loss {lines[0]['loss']:.5f} to {lines[-1]['loss']:.5f}",
              flush=True)
        return lines

    def say(self, good, text):
        self.failed += not good
        print(f"{'ok  ' if good else 'FAIL'} {text}", flush=True)


def read(folder):
    try:
        with open(os.path.join(folder, "metrics.jsonl")) as f:
            return [json.loads(line) for line in f if line.endswith("\n")]
    except OSError:
        return []


def tail(folder):
    """The last of what was said, by the program and by workers."""
    try:
        with open(os.path.join(folder, "log.txt")) as f:
            return "".join("       " + line for line in f.readlines()[-12:])
    except OSError:
        return ""



# Plans may differ in what is updated where, and not in the order of sums.
ONE_ORDER = "micro_batch_size = 1\ngroups = 1\n"


def bits(lines):
    """JSON keeps every bit of a float."""
    return [(x["step"], x["loss"], x["grad_norm"], x["tokens"]) for x in lines]


def off(a, b, key):
    return max(abs(x[key] / y[key] - 1) for x, y in zip(a, b))


def parity(rig):
    """What another order of summation on one GPU changes is what several GPUs may change."""
    for precision in ("fp32", "bf16"):
        base = f'precision = "{precision}"\n'
        one = rig.run(f"one-{precision}", 1, base + "micro_batch_size = 4")
        other = rig.run(f"one-{precision}-other-order", 1, base + "micro_batch_size = 1")
        many = rig.run(f"many-{precision}", rig.gpus, base + "micro_batch_size = 4")
        if not (one and other and many):
            rig.say(False, f"parity {precision}: a run failed")
            continue
        noise, loss, norm = off(one, other, "loss"), off(one, many, "loss"), off(one, many, "grad_norm")
        limit = max(5 * noise, 1e-5 if precision == "fp32" else 5e-4)
        rig.say(loss <= limit, f"parity {precision}: loss within {loss:.1e} of one GPU's, norm within {norm:.1e}; "
                               f"another order of summation on one GPU changes the loss by {noise:.1e}")


def repeat(rig):
    a, b = rig.run("first", rig.gpus), rig.run("second", rig.gpus)
    rig.say(bool(a and b) and bits(a) == bits(b), f"{rig.gpus} GPUs give the same bits twice")


def pull(rig):
    """The same bits, wherever weights come from: with room for everything plans differ in nothing else."""
    base = 'precision = "bf16"\ngroups = 1\n'
    a = rig.run("gathered", rig.gpus, base + "gather_weights = true")
    b = rig.run("pulled", rig.gpus, base + "gather_weights = false")
    rig.say(bool(a and b) and bits(a) == bits(b), "weights that are gathered are those that are pulled")
    c = rig.run("bf16-sums", rig.gpus, base + 'reduce = "bf16"')
    rig.say(bool(a and c) and bits(a) != bits(c) and off(a, c, "loss") < 5e-3, "sums may travel in bf16")


def hold(rig):
    """Optimizer state that stays on the GPUs is that in RAM: the same bits, with room for everything and one order of sums."""
    held, plain = (rig.run(f"held-{gib}", rig.gpus, f"{ONE_ORDER}held_state_gib = {gib}") for gib in ("64", "0"))
    rig.say(bool(held and plain) and bits(held) == bits(plain), "state that stays on the GPUs changes no bit")


def nop2p(rig):
    """Without peer access the plan has each rank pull everything, and sums go through the host."""
    off_p2p = {"NCCL_P2P_DISABLE": "1"}
    a, b = rig.run("no-peer-access", rig.gpus, env=off_p2p), rig.run("no-peer-access-again", rig.gpus, env=off_p2p)
    rig.say(bool(a and b) and bits(a) == bits(b), "without peer access: the same bits twice")
    c = rig.run("peer-access", rig.gpus)
    if a and c:
        rig.say(off(a, c, "loss") < 5e-3, f"without peer access: loss within {off(a, c, 'loss'):.1e} of that with it")


def workers(pid):
    """Worker processes of a daemon, oldest first."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as f:
                fields = f.read().rsplit(")", 1)[1].split()
            with open(f"/proc/{name}/cmdline", "rb") as f:
                words = f.read().split(b"\0")
        except OSError:
            continue
        if int(fields[1]) == pid and b"worker" in words:
            found.append((int(fields[19]), int(name)))
    return [pid for _, pid in sorted(found)]


def kill(rig):
    """kill -9 of one worker in the middle: the gang goes on from the segment, and nobody sees it in the numbers."""
    steps = 600 if CPU else 60
    killed(rig, "killed", rig.run("undisturbed", rig.gpus, steps=steps), steps)


def early(rig):
    """Without clipping, pages that are updated beside the backward pass are those that wait for its end, deaths or not."""
    steps = 600 if CPU else 60
    how = "clip_norm = 0\nearly_updates = "
    late, soon = (rig.run(f"early-updates-{x}", rig.gpus, ONE_ORDER, steps=steps, optimizer=how + x) for x in ("false", "true"))
    rig.say(bool(late and soon) and bits(late) == bits(soon), "pages updated early have the bits of those updated late")
    if late and soon:
        wait = [statistics.median(x["optimizer_wait_seconds"] for x in lines[2:]) for lines in (late, soon)]
        print(f"     compute waited for pages {wait[0]:.4f} s a step, with early updates {wait[1]:.4f} s")
    killed(rig, "killed-early", late, steps, ONE_ORDER, how + "true")


def killed(rig, name, whole, steps, train="", optimizer=""):
    """A run of which a worker is killed twice, against the `whole` one."""
    folder, path = rig.job(name, train, steps, optimizer=optimizer)
    process = rig.start(folder, path, rig.gpus)
    end = time.time() + 200
    for at, rank in ((15, -1), (35, 0)):
        while len(read(folder)) < at and process.poll() is None and time.time() < end:
            time.sleep(0.01)
        gang = workers(process.pid)
        if len(gang) < rig.gpus:
            rig.say(False, f"kill: {len(gang)} workers at step {at}\n{tail(folder)}")
            break
        before, begin = len(read(folder)), time.time()
        os.kill(gang[rank], signal.SIGKILL)
        gone = None
        # Steps of the old gang may still be written within a moment.
        while process.poll() is None and time.time() < end:
            if gone is None and not set(gang) & set(workers(process.pid)):
                gone, before = time.time() - begin, len(read(folder))
            if gone is not None and len(read(folder)) > before:
                break
            time.sleep(0.01)
        if gone is None:
            rig.say(False, f"kill at step {at}: the other workers were not gone in time\n{tail(folder)}")
            break
        rig.say(gone < 15, f"kill at step {at}: all workers gone after {gone:.2f} s, first new step after {time.time() - begin:.2f} s")
    try:
        code = process.wait(max(1, end - time.time()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        code = "time limit"
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
    same = bool(whole) and bits(read(folder)) == bits(whole)
    rig.say(code == 0 and same, f"killed twice: exit {code}, {'the same bits' if same else 'other numbers'}")
    left = [n for n in os.listdir("/dev/shm") if n.startswith(("ramtorch", "nccl"))]
    rig.say(not left, f"nothing is left in /dev/shm{': ' + ', '.join(left) if left else ''}")


CHECKS = dict(repeat=repeat, parity=parity, kill=kill, early=early, hold=hold, pull=pull, nop2p=nop2p)


def main():
    rig = Rig(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    for name in sys.argv[4:] or CHECKS:
        begin = time.time()
        try:
            CHECKS[name](rig)
        except Exception as e:  # the other checks are worth their time all the same
            rig.say(False, f"{name}: {e!r}")
        print(f"     {name} took {time.time() - begin:.0f} s", flush=True)
    print(f"{rig.failed} failed")
    return rig.failed > 0


if __name__ == "__main__":
    sys.exit(main())
