"""Several GPUs against one, against themselves, with workers killed and stopped, with little memory, and without peer access. See
gpus.sh.

With DEVICES=cpu in the environment it goes through the same with CPU devices and a tiny model, to test itself. With DEVICES=shared all
ranks share the first GPU and talk through sockets: slowly, with a smaller model, and through the same code as with GPUs of their own."""
import array
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "bench"))
from node import Node  # noqa: E402

STEPS = 12
SEQUENCE = 512
TOKENS = 400_000
# A quarter of a billion parameters with odd sizes; blocks of very different lengths.
CONFIG = dict(model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=50_021, hidden_size=1024, intermediate_size=2816,
              num_hidden_layers=10, num_attention_heads=16, num_key_value_heads=4, head_dim=64, tie_word_embeddings=False,
              hidden_act="silu", rms_norm_eps=1e-5, rope_theta=500000.0, max_position_embeddings=4096, initializer_range=0.02,
              bos_token_id=1, eos_token_id=2)


CPU, SHARED = (os.environ.get("DEVICES") == x for x in ("cpu", "shared"))
if SHARED:
    os.environ["RAMTORCH_SHARE_GPUS"] = "1"
    CONFIG.update(vocab_size=9_011, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
if CPU:
    CONFIG.update(vocab_size=211, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, head_dim=12)
    SEQUENCE = 16
# Nearly all of it in layers: in half of a layer's sum of gradients there is room for the state of a page, a sixteenth of all.
LARGE_LAYERS = {**CONFIG, "vocab_size": 211 if CPU else 8_009, "hidden_size": 256 if CPU else 1024 if SHARED else 2048, "head_dim": 64,
                "intermediate_size": 512 if CPU else 12_288, "num_hidden_layers": 2}


def devices_of(gpus):
    """The devices of `gpus` ranks, as the daemon is told of them."""
    return f"cpu:{gpus}" if CPU else ",".join(f"cuda:{0 if SHARED else i}" for i in range(gpus))


class Rig:
    def __init__(self, binary, out, gpus):
        self.binary, self.out, self.gpus = os.path.abspath(binary), os.path.abspath(out), gpus
        self.failed, self.batch = 0, 4
        os.makedirs(self.out, exist_ok=True)
        self.use(CONFIG, "config.json")
        values = array.array("I")
        values.frombytes(random.Random(0).randbytes(4 * TOKENS))
        top = LARGE_LAYERS["vocab_size"] - 100
        with open(os.path.join(self.out, "tokens.bin"), "wb") as f:
            array.array("I", (v % top for v in values)).tofile(f)

    def use(self, config, name):
        """The model of the jobs that are made from here on."""
        self.config = os.path.join(self.out, name)
        with open(self.config, "w") as f:
            json.dump(config, f)

    def job(self, name, train="", steps=STEPS, optimizer="", more="", fresh=True):
        """Sequences of a step: not a multiple of the number of GPUs, so that shares differ. Checkpoints and metrics of an earlier
        job of this name go, unless it is to go on (`fresh`)."""
        folder = os.path.join(self.out, name)
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, "job.toml")
        with open(path, "w") as f:
            f.write(f"""name = "{name}"
[model]
config = "{self.config}"
[data]
format = "tokens"
train = "{self.out}/tokens.bin"
sequence_length = {SEQUENCE}
[train]
steps = {steps}
batch_size = {self.batch * self.gpus + 1}
{train}
[optimizer]
lr = 3e-4
{optimizer}
[output]
metrics = "metrics.jsonl"
{more}
""")
        if fresh:
            shutil.rmtree(os.path.join(folder, "checkpoints"), ignore_errors=True)
        for old in ("metrics.jsonl", "log.txt") if fresh else ("log.txt",):
            if os.path.exists(os.path.join(folder, old)):
                os.remove(os.path.join(folder, old))
        return folder, path

    def start(self, folder, path, gpus, env=None, options=()):
        command = [self.binary, "run", path, "--state-dir", os.path.join(self.out, "state"), "--devices", devices_of(gpus), *options]
        log = open(os.path.join(folder, "log.txt"), "w")
        return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **(env or {})})

    def run(self, name, gpus, train="", steps=STEPS, env=None, limit=150, optimizer="", more="", fresh=True):
        folder, path = self.job(name, train, steps, optimizer=optimizer, more=more, fresh=fresh)
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
        limit = max(5 * noise, 1e-5 if precision == "fp32" else 5e-5)
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


def log(rig):
    """State that is written back at every few steps: the bits of state in RAM alone, also when workers are killed."""
    plain = rig.run("unlogged", rig.gpus, f"{ONE_ORDER}held_state_gib = 0\n", 60)
    logged = f"{ONE_ORDER}held_state_gib = 64\nwrite_back_steps = 4\n"
    whole = rig.run("logged", rig.gpus, logged, 60)
    rig.say(bool(whole and plain) and bits(whole) == bits(plain), "state that is written back at every fourth step changes no bit")
    killed(rig, "logged-killed", whole, 60, logged)


def visit(rig):
    """State that comes and goes where sums of gradients were: the bits of state in RAM alone, also when workers are killed. The plan
    chooses so by the rates of GPUs that do nothing else: not beside other work."""
    rig.use(LARGE_LAYERS, "large-layers.json")
    if not CPU:
        rig.batch = 64  # a step of arithmetic enough for state to come and go
    two_groups = f'micro_batch_size = {1 if CPU else 4}\ngroups = 2\nprecision = "bf16"\n' + ("gather_weights = true\nreduce = \"bf16\"\n" if rig.gpus > 1 else "")
    visits = f"{two_groups}held_state_gib = {0.002 if CPU else 0.15 if SHARED else 0.3}\nwrite_back_steps = 1\n"
    _, path = rig.job("visited", visits, 60)
    with open(os.path.join(rig.out, "plan.txt"), "w") as log, Node(os.path.dirname(rig.binary), devices_of(rig.gpus), log) as node:
        text = node.ask("plan", path)["text"]
        log.write(text)
    rig.say("comes with the backward pass" in text, "the plan has state come and go")
    plain = rig.run("unvisited", rig.gpus, f"{two_groups}held_state_gib = 0\n", 60)
    whole = rig.run("visited", rig.gpus, visits, 60)
    rig.say(bool(whole and plain) and bits(whole) == bits(plain), "state that comes and goes where sums were changes no bit")
    killed(rig, "visited-killed", whole, 60, visits)
    rig.use(CONFIG, "config.json")
    rig.batch = 4


def nop2p(rig):
    """Without peer access the plan has each rank pull everything, and sums go through the host."""
    off_p2p = {"NCCL_P2P_DISABLE": "1"}
    a, b = rig.run("no-peer-access", rig.gpus, env=off_p2p), rig.run("no-peer-access-again", rig.gpus, env=off_p2p)
    rig.say(bool(a and b) and bits(a) == bits(b), "without peer access: the same bits twice")
    c = rig.run("peer-access", rig.gpus)
    if a and c:
        rig.say(off(a, c, "loss") < 5e-3, f"without peer access: loss within {off(a, c, 'loss'):.1e} of that with it")


def least_memory(rig, name, more=""):
    """The least device memory with which a plan is made for a job, as the refusal of one with less tells it."""
    least = 1 << 10
    for _ in range(4):
        folder, path = rig.job(name, ONE_ORDER, more=f"[device]\nmemory_bytes = {least}\n{more}")
        process = rig.start(folder, path, rig.gpus)
        end = time.time() + 60
        while process.poll() is None and not read(folder) and time.time() < end:
            time.sleep(0.05)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
            return least  # it trains
        with open(os.path.join(folder, "log.txt")) as f:
            said = f.read()
        found = re.search(r"needs at least (\d+) bytes on each device", said)
        if not found or int(found.group(1)) <= least:
            return least if process.returncode == 0 else None
        least = int(found.group(1))
    return least


def stream(rig):
    """Nothing stays on the GPUs that could come again: the bits of a job with room for everything, in one order of sums."""
    roomy = rig.run("roomy", rig.gpus, ONE_ORDER)
    least = least_memory(rig, "streamed")
    if least is None:
        rig.say(False, f"stream: no refusal names the least memory\n{tail(os.path.join(rig.out, 'streamed'))}")
        return
    tight = rig.run("streamed", rig.gpus, ONE_ORDER, more=f"[device]\nmemory_bytes = {least}\n")
    same = bool(roomy and tight) and bits(roomy) == bits(tight)
    rig.say(same, f"with the least device memory, {least} bytes: {'the same bits' if same else 'other numbers'}")
    if roomy and tight:
        moved = [statistics.median(x["bytes_to_device"] for x in lines) for lines in (roomy, tight)]
        rig.say(CPU or moved[1] > moved[0], f"{moved[1] / 1e6:.0f} MB a step went to each device, with room for all {moved[0] / 1e6:.0f}")


def place(rig):
    """Gradients that stay on one GPU are those in the segment; a death goes back to a checkpoint, and nobody sees it either."""
    segment, device = (rig.run(f"gradients-in-{where}", 1, f'{ONE_ORDER}gradients_in = "{where}"\n') for where in ("segment", "device"))
    same = bool(segment and device) and [x["loss"] for x in segment] == [x["loss"] for x in device]
    # The device may add up squares in another order, in fp64.
    norm = off(segment, device, "grad_norm") if same else float("inf")
    rig.say(same and norm < 1e-12, f"gradients on the device: {'the same losses, bit by bit' if same else 'other losses'}, norm within {norm:.0e}")
    steps, train = 600 if CPU else 60, ONE_ORDER + 'gradients_in = "device"\n'
    more = '[checkpoint]\npath = "checkpoints"\nevery_steps = 10\nkeep = 2\n'
    whole = rig.run("gradients-on-device", 1, train, steps=steps, more=more)
    killed(rig, "killed-on-device", whole, steps, train, more=more, gpus=1)


def resize(rig):
    """A checkpoint of all GPUs, gone on with on half of them: no farther off than the order of sums makes it."""
    if rig.gpus < 2:
        print("     resize: skipped, for several GPUs")
        return
    half, fewer = STEPS // 2, max(1, rig.gpus // 2)
    more = '[checkpoint]\npath = "checkpoints"\nat_end = true\n'
    whole, small = rig.run("whole", rig.gpus), rig.run("whole-fewer", fewer)
    first = rig.run("resized", rig.gpus, steps=half, more=more)
    if first:
        # The job that goes on counts steps as the first did, and reads its metrics file again.
        folder, path = rig.job("resized", more=more, fresh=False)
        code = rig.start(folder, path, fewer).wait(150)
        second = [x for x in read(folder) if x["step"] > half]
    if not (whole and small and first) or code != 0 or len(second) != STEPS - half:
        rig.say(False, f"resize: a run failed\n{tail(os.path.join(rig.out, 'resized'))}")
        return
    noise, loss = off(small, whole, "loss"), off(second, whole[half:], "loss")
    limit = max(5 * noise, 5e-5)
    rig.say(bits(first) == bits(whole[:half]), "the first half has the bits of the whole")
    rig.say(loss <= limit, f"{half} steps on {rig.gpus} GPUs and {half} on {fewer}: loss within {loss:.1e} of that on {rig.gpus} all the time; "
                           f"all the time on {fewer} it is within {noise:.1e}")


def on_gpus():
    """Processes that have memory of a GPU, as nvidia-smi tells it; empty where it does not."""
    try:
        done = subprocess.run(["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return set()
    return {int(x) for x in done.stdout.split() if x.isdigit()} if done.returncode == 0 else set()


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


def hang(rig):
    """A worker that is stopped sends no heartbeat: the gang goes on without it, from the segment, with the same bits."""
    steps, heartbeat = 600 if CPU else 60, 3
    config = os.path.join(rig.out, "impatient.toml")
    with open(config, "w") as f:
        f.write(f"[supervision]\nheartbeat_timeout_seconds = {heartbeat}\n")
    whole = rig.run("undisturbed", rig.gpus, steps=steps)
    # Who is stopped does not hear SIGTERM either, and gets SIGKILL 2 s after it.
    killed(rig, "hung", whole, steps, options=("--config", config), blows=((15, -1),), sign=signal.SIGSTOP, limit=heartbeat + 2 + GONE)


def await_step(folder, step, process, end):
    """Until so many steps are in the metrics, the process ends, or it is `end`."""
    while len(read(folder)) < step and process.poll() is None and time.time() < end:
        time.sleep(0.01)


def nothing_left(rig, before):
    """No segments but those of `before`."""
    left = [n for n in os.listdir("/dev/shm") if n.startswith(("ramtorch", "nccl")) and n not in before]
    rig.say(not left, f"nothing is left in /dev/shm{': ' + ', '.join(left) if left else ''}")


def service(rig):
    """What an operator does: starts the daemon, submits a job, watches it, asks for a checkpoint, loses a worker, exports and tests
    the result. The curve is that of a run which nobody disturbed."""
    steps = 600 if CPU else 60
    whole = rig.run("alone", rig.gpus, ONE_ORDER, steps=steps)
    folder, path = rig.job("served", ONE_ORDER, steps, more='[checkpoint]\npath = "checkpoints"\nat_end = true\n')
    segments = set(os.listdir("/dev/shm"))
    with open(os.path.join(folder, "log.txt"), "w") as log, \
            Node(os.path.dirname(rig.binary), devices_of(rig.gpus), log, state=os.path.join(rig.out, "served-state")) as node:
        job = node.ask("submit", path)["id"]
        seen = open(os.path.join(folder, "watch.jsonl"), "w")
        watch = subprocess.Popen([node.client, "--socket", node.socket, "--output", "json", "watch", job], stdout=seen, stderr=log)
        end = time.time() + 200
        await_step(folder, 10, watch, end)
        saved = node.ask("checkpoint", job)
        await_step(folder, 25, watch, end)
        gang = workers(node.process.pid)
        rig.say(len(gang) == rig.gpus, f"service: {len(gang)} workers at step {len(read(folder))}")
        if gang:
            os.kill(gang[len(gang) // 2], signal.SIGKILL)
        try:
            code = watch.wait(max(1, end - time.time()))
        except subprocess.TimeoutExpired:
            watch.kill()
            code = "time limit"
        same = bool(whole) and bits(read(folder)) == bits(whole)
        rig.say(code == 0 and same, f"service: watched to its end, exit {code}, a worker killed, {'the same bits' if same else 'other numbers'}")
        seen.close()
        with open(seen.name) as f:
            events = [json.loads(line) for line in f]
        steps_seen = {e["metrics"]["step"] for e in events if e["event"] == "metrics"}
        told = node.ask("describe", job)
        good = steps_seen == set(range(1, steps + 1)) and told["world_size"] == rig.gpus and told["restarts"] == 1
        rig.say(good, f"service: {len(steps_seen)} steps watched, {told['world_size']} ranks, {told['restarts']} restart, a checkpoint at step {saved['step']}")
        checkpoints, exported = os.path.join(folder, "checkpoints"), os.path.join(folder, "exported")
        count = sum(n.startswith("step-") for n in os.listdir(checkpoints))
        node.ask("export", checkpoints, exported, "--overwrite")
        data = ("--data", os.path.join(rig.out, "tokens.bin"), "--format", "tokens", "--sequence-length", str(SEQUENCE), "--max-tokens", str(40 * SEQUENCE))
        losses = [node.ask("eval", source, *data)["loss"] for source in (checkpoints, exported)]
        rig.say(losses[0] == losses[1], f"service: {count} checkpoints; the last one and what was exported of it have the loss {losses}")
    nothing_left(rig, segments)


# Seconds in which all workers of a gang are to be gone after one of them.
GONE = 3


def killed(rig, name, whole, steps, train="", optimizer="", more="", gpus=None, options=(), blows=((15, -1), (35, 0)), sign=signal.SIGKILL,
           limit=GONE):
    """A run of which a worker is killed twice, against the `whole` one. `blows`: steps and ranks; `sign`: what they get."""
    folder, path = rig.job(name, train, steps, optimizer=optimizer, more=more)
    segments = set(os.listdir("/dev/shm"))
    gpus, what = gpus or rig.gpus, "kill" if sign == signal.SIGKILL else "hang"
    process = rig.start(folder, path, gpus, options=options)
    end = time.time() + 200
    for at, rank in blows:
        await_step(folder, at, process, end)
        gang = workers(process.pid)
        if len(gang) < gpus:
            rig.say(False, f"{what}: {len(gang)} workers at step {at}\n{tail(folder)}")
            break
        before, begin = len(read(folder)), time.time()
        os.kill(gang[rank], sign)
        gone = None
        # Steps of the old gang may still be written within a moment.
        while process.poll() is None and time.time() < end:
            if gone is None and not set(gang) & set(workers(process.pid)):
                gone, before = time.time() - begin, len(read(folder))
            if gone is not None and len(read(folder)) > before:
                break
            time.sleep(0.01)
        if gone is None:
            rig.say(False, f"{what} at step {at}: the other workers were not gone in time\n{tail(folder)}")
            break
        rig.say(gone < limit, f"{what} at step {at}: all workers gone after {gone:.2f} s, first new step after {time.time() - begin:.2f} s")
        # In some containers nvidia-smi tells of no process, or calls them by other numbers.
        here, old = on_gpus(), set(gang)
        if here & set(workers(process.pid)):
            rig.say(not here & old, f"{what} at step {at}: {len(here & old)} of the old workers have memory of a GPU")
        elif not CPU:
            print("     nvidia-smi does not tell who has memory of the GPUs")
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
    rig.say(code == 0 and same, f"{name}: exit {code}, {'the same bits' if same else 'other numbers'}")
    nothing_left(rig, segments)


CHECKS = dict(repeat=repeat, parity=parity, kill=kill, hang=hang, early=early, hold=hold, log=log, visit=visit, stream=stream, place=place, resize=resize, pull=pull, service=service,
              nop2p=nop2p)


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
