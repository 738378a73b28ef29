"""A run takes seconds on one core, and is never silent for long.

Runs `python dgpg.py` with its defaults at each N, and prints the table; nothing else should be running.
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import numpy as np
import tyro
from runs import ROOT, head, line


@dataclass
class Args:
    sizes: tuple[int, ...] = (5, 50, 200, 1500, 10_000)  # numbers of agents


def measure(n_agents):
    """Seconds at which a run's lines came [lines], from its start; and its peak memory in MiB."""
    times = [time.perf_counter()]
    command = [sys.executable, ROOT / "dgpg.py", "--n-agents", str(n_agents)]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
        for _ in process.stdout:
            times.append(time.perf_counter())
        _, status, usage = os.wait4(process.pid, 0)  # the memory of this process alone
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
    return np.array(times) - times[0], usage.ru_maxrss // 1024


def main(args):
    head("N", "whole run, s", "first line after, s", "longest silence, s", "peak memory, MiB")
    for n in args.sizes:
        times, memory = measure(n)
        line(n, *(f"{seconds:.1f}" for seconds in (times[-1], times[1], np.diff(times).max())), memory)


if __name__ == "__main__":
    main(tyro.cli(Args))
