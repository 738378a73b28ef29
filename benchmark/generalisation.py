"""An actor trained at N = 50, put to work elsewhere: at other N, at other loads, on a real trace and from it.

The trace rows need a trace of real workload (columns in the README): `python benchmark/generalisation.py --trace FILE`.
Writes results/generalisation.csv (a run that is there is not repeated); the actors stay in runs/generalisation/.
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass

import tyro
from runs import ROOT, curves, head, shown, sweep

ACTORS = ROOT / "runs" / "generalisation"
SIZES = (5, 10, 20, 50, 100, 200, 500, 1000, 1500)
LOADS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)


@dataclass
class Args:
    trace: str | None = None  # a CSV file of real workload
    seeds: int = 3  # actors to train, seeds 1, 2, …
    workers: int = 2  # evaluations side by side, one thread each


def trained(seed, trace):
    """The file of an actor trained at N = 50 on synthetic load or on the trace."""
    actor = ACTORS / f"{'trace' if trace else 'synthetic'}_{seed}.pt"
    if not actor.exists():
        print(f"training {actor.name}, some seconds", flush=True)
        ACTORS.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(ROOT / "dgpg.py"), "--seed", str(seed), "--eval-every", "10"]
        command += ["--trace", trace.format(root=ROOT)] if trace else []
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
            shutil.copy(next(pathlib.Path(folder).glob("runs/*/checkpoint.pt")), actor)
    return f"{{root}}/{actor.relative_to(ROOT)}"


def main(args):
    trace = None
    if args.trace:  # under one name wherever it is, so that the results do not depend on it
        trace = "{root}/runs/generalisation/trace.csv"
        ACTORS.mkdir(parents=True, exist_ok=True)
        (ACTORS / "trace.csv").unlink(missing_ok=True)
        (ACTORS / "trace.csv").symlink_to(pathlib.Path(args.trace).resolve())
    settings = [(f"synthetic → synthetic, N = {n}", n, None, "") for n in SIZES]
    settings += [(f"synthetic → synthetic, N = 50, load {load}", 50, None, f"--load {load}") for load in LOADS]
    if trace:
        settings += [(f"synthetic → trace, N = {n}", n, None, f"--trace {trace}") for n in (50, 200)]
        settings += [(f"trace → trace, N = {n}", n, trace, f"--trace {trace}") for n in (5, 20, 50, 100, 200)]
        settings += [(f"trace → synthetic, N = {n}", n, trace, "") for n in (50, 200)]
    jobs = {
        (name, seed): ("dgpg.py", n, seed, f"--episodes 0 --init-actor {trained(seed, on)} {options}".strip())
        for name, n, on, options in settings
        for seed in range(1, args.seeds + 1)
    }
    found = curves(sweep("generalisation", list(jobs.values()), args.workers))
    head("trained at N = 50 on → evaluated on", "cost ratio")
    for name, *_ in settings:
        values = []
        for seed in range(1, args.seeds + 1):
            script, n, seed, options = jobs[name, seed]
            values.append(found[script, n, options][seed][1][-1])
        print(f"| {name} | {shown(values)} |")


if __name__ == "__main__":
    main(tyro.cli(Args))
