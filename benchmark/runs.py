"""What the benchmarks share: run the scripts through their command lines, one CSV row per evaluation, and read them again.

Rows are appended when a run has ended, and a run whose rows are there is not repeated: an interrupted sweep goes on.
"""

import csv
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the modules that the benchmarks import
RESULTS = ROOT / "benchmark" / "results"
FIELDS = ["script", "n_agents", "seed", "options", "episode", "return", "score", "cost_ratio", "best_fit", "random", "seconds", "peak_mib"]
T_975 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78}  # quantile 0.975 of Student's t by degrees of freedom


@dataclass
class Args:
    workers: int = 2
    """runs side by side, one thread each"""
    only_show: bool = False
    """only what is made of the runs that are there"""


def read(path):
    """Rows of a CSV file, numbers as numbers; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{name: value if name in ("script", "options") else float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def run(script, n_agents, seed, options):
    """One run in a folder of its own. Returns a row per evaluation; peak memory and seconds are the whole command's.

    {root} in the options stands for the repository's folder.
    """
    command = [sys.executable, str(ROOT / script), "--n-agents", str(n_agents), "--seed", str(seed), *shlex.split(options.format(root=ROOT))]
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        with open(f"{folder}/out", "w+") as out:
            process = subprocess.Popen(command, cwd=folder, stdout=out, env={**os.environ, "OMP_NUM_THREADS": "1"})
            _, status, usage = os.wait4(process.pid, 0)  # the memory of this process alone
            process.returncode = os.waitstatus_to_exitcode(status)
            out.seek(0)
            lines = out.read().splitlines()
    if process.returncode:
        raise RuntimeError(f"{shlex.join(command)} ended with status {process.returncode}")
    final = dict(word.split("=") for word in lines[-1].split()[1:])
    common = dict(script=script, n_agents=n_agents, seed=seed, options=options, best_fit=final["best_fit"], random=final["random"])
    common.update(seconds=f"{time.time() - start:.1f}", peak_mib=usage.ru_maxrss // 1024)
    table = [line.split() for line in lines if line.split()[0].isdigit()]
    return [{**common, **dict(zip(("episode", "return", "score", "cost_ratio", "sps"), row))} for row in table]


def sweep(name, jobs, workers):
    """Run every job (script, n_agents, seed, options) that results/{name}.csv does not have; return all its rows."""
    path = RESULTS / f"{name}.csv"
    RESULTS.mkdir(exist_ok=True)
    done = {(row["script"], row["n_agents"], row["seed"], row["options"]) for row in read(path)}
    missing = [job for job in jobs if job not in done]
    print(f"{name}: {len(jobs) - len(missing)} of {len(jobs)} runs are there", flush=True)
    start, ended, lock = time.time(), [], threading.Lock()

    def record(job):
        rows = run(*job)
        with lock:  # rows are written when their run ends, whatever else still runs
            new = not path.exists()
            with path.open("a", newline="") as file:
                writer = csv.DictWriter(file, FIELDS, extrasaction="ignore")  # speed depends on what else runs
                if new:
                    writer.writeheader()
                writer.writerows(rows)
            ended.append(job)
            left = (time.time() - start) / len(ended) * (len(missing) - len(ended))
            script, n_agents, seed, options = job
            last = rows[-1]
            print(
                f"{len(ended):4d}/{len(missing)} {script} N={n_agents} seed={seed} {options}: cost ratio {last['cost_ratio']} "
                f"after {last['episode']} episodes, {last['seconds']} s; {left / 60:.0f} min left",
                flush=True,
            )

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(record, missing))
    wanted = set(jobs)
    return [row for row in read(path) if (row["script"], row["n_agents"], row["seed"], row["options"]) in wanted]


def curves(rows):
    """{(script, n_agents, options): {seed: (episodes [P], cost ratios [P])}}."""
    found = {}
    for row in rows:
        points = found.setdefault((row["script"], int(row["n_agents"]), row["options"]), {}).setdefault(int(row["seed"]), [])
        points.append((row["episode"], row["cost_ratio"]))
    return {key: {seed: np.array(points).T for seed, points in seeds.items()} for key, seeds in found.items()}


def reached(episodes, ratios, stays=True):
    """Episodes at the first evaluation at or above Best-Fit (cost ratio ≤ 1), from which on all are if it `stays`; NaN: never."""
    below = np.logical_and.accumulate(ratios[::-1] <= 1)[::-1] if stays else ratios <= 1
    return episodes[below.argmax()] if below.any() else np.nan


def listed(episodes):
    """Numbers of episodes as text, NaN as never."""
    return ", ".join("never" if np.isnan(episode) else f"{episode:.0f}" for episode in episodes)


def interval(values):
    """Mean and half the width of its 95 % confidence interval (Student's t); the latter NaN for one value."""
    values = np.asarray(values, dtype=float)
    half = T_975[len(values) - 1] * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return values.mean(), half


def shown(values):
    """Their `interval` as text; the mean alone of one value."""
    mean, half = interval(values)
    return f"{mean:.2f} ± {half:.2f}" if len(values) > 1 else f"{mean:.2f}"


def slope(x, y):
    """Slope of the least-squares line through (log x, log y), and its standard error."""
    x, y = np.log(x), np.log(y)
    dx = x - x.mean()
    beta = dx @ y / (dx @ dx)
    residuals = y - y.mean() - beta * dx
    return beta, (residuals @ residuals / max(1, len(x) - 2) / (dx @ dx)) ** 0.5


def save(figure, name):
    """Write benchmark/{name}.svg, the same bytes for the same figure."""
    import matplotlib  # the tests do without

    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(ROOT / "benchmark" / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
