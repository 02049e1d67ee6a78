"""A daemon of a benchmark's own, on a socket that nobody else knows."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time

START_LIMIT = 90


def stop(process, grace=60):
    """Ends a process that was started here."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Node:
    """`ramtorchd start`, for as long as the `with` block lasts. Raises RuntimeError where it does not start."""

    def __init__(self, folder, device, log, state=None, more=()):
        self.short = tempfile.mkdtemp(prefix="rt-")  # paths of sockets are short
        self.socket = os.path.join(self.short, "s")
        self.client = os.path.join(folder, "ramtorch")
        command = [os.path.join(folder, "ramtorchd"), "start", "--socket", self.socket, "--devices", device,
                   "--state-dir", state or os.path.join(self.short, "state"), *more]
        self.log = log
        self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def __enter__(self):
        end = time.time() + START_LIMIT
        while not os.path.exists(self.socket):
            if self.process.poll() is not None or time.time() > end:
                self.__exit__()
                raise RuntimeError(f"the daemon did not start; see {os.path.basename(self.log.name)}")
            time.sleep(0.05)
        return self

    def __exit__(self, *_):
        stop(self.process)
        shutil.rmtree(self.short, ignore_errors=True)

    def ask(self, *arguments, timeout=None):
        """The client's JSON; RuntimeError with what it said where it failed."""
        command = [self.client, "--socket", self.socket, "--output", "json", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        if done.returncode != 0:
            raise RuntimeError(done.stderr.strip() or f"exit code {done.returncode}")
        return json.loads(done.stdout)
