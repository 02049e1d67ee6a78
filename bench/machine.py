"""Makes a virtual machine's memory be there before a benchmark asks for it.

Some virtual machines have their memory grow on demand: MemTotal is small after the boot, and grows as processes use it. What is
admitted by the memory that is free then is refused, though it would fit. Used once, memory stays."""

import os
import shutil
import subprocess
import sys

CHUNK = 64 << 20


def meminfo(key):
    """Bytes."""
    with open("/proc/meminfo") as f:
        return next(int(line.split()[1]) << 10 for line in f if line.startswith(key + ":"))


def fill(size, ready, go):
    """A child: takes and writes `size` bytes, says so, and holds them until the parent closes its end of `go`."""
    with open("/proc/self/oom_score_adj", "w") as f:
        f.write("1000")  # where there is not so much, this process goes and nobody else
    block, held = b"\1" * CHUNK, []
    for left in range(size, 0, -CHUNK):
        held.append(bytearray(block[:left]))
    os.write(ready, b"x")
    os.read(go, 1)


def touch(gib, processes=None):
    """Fills `gib` GiB with several processes at once and frees them; False where the machine does not have so much."""
    processes = processes or max(1, min(16, os.cpu_count() or 1))
    before, size = meminfo("MemTotal"), int(gib * 2**30) // processes
    sys.stdout.flush()
    waiting, release = os.pipe()
    children = []
    for _ in range(processes):
        said, say = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.close(release)
                os.close(said)
                fill(size, say, waiting)
                code = 0
            except (MemoryError, OSError) as e:
                print(f"touch: {e!r}", file=sys.stderr, flush=True)
            finally:
                os._exit(code)
        os.close(say)
        children.append((pid, said))
    # A child that dies closes its end.
    filled = [os.read(said, 1) == b"x" for _, said in children]
    os.close(release)
    os.close(waiting)
    for pid, said in children:
        os.close(said)
        os.waitpid(pid, 0)
    print(f"touched {gib:g} GiB with {processes} processes, {sum(filled)} of them had room: MemTotal {before / 2**30:.1f} GiB before, "
          f"{meminfo('MemTotal') / 2**30:.1f} GiB now", flush=True)
    return all(filled)


def enlarge_shm(gib):
    """Remounts /dev/shm with at least `gib` GiB; what it says where it may not, and nothing where it did."""
    if shutil.disk_usage("/dev/shm").total >= gib * 2**30:
        return None
    done = subprocess.run(["mount", "-o", f"remount,size={int(gib * 2**20)}k", "/dev/shm"], capture_output=True, text=True)
    if done.returncode == 0:
        print(f"/dev/shm has {shutil.disk_usage('/dev/shm').total / 2**30:.1f} GiB now", flush=True)
        return None
    return f"/dev/shm cannot be made larger: {done.stderr.strip()}"
