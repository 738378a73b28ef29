"""What the benchmarks share: run the scripts by their command lines, a CSV row per evaluation, and read them again.

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
FIELDS = ["script", "n_agents", "seed", "options", "episode", "return", "score", "cost_ratio"]
FIELDS += ["best_fit", "random", "argmax", "seconds", "peak_mib"]
# quantile 0.975 of Student's t for 1 … 19 degrees of freedom; above, the last one is at most 7 % too large
T_975 = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23]
T_975 += [2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09]


@dataclass
class Args:
    workers: int = 2  # runs side by side, one thread each
    only_show: bool = False  # only what is made of the runs that are there


def read(path):
    """Rows of a CSV file, numbers as numbers; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            {
                name: value if name in ("script", "options", "case") else float(value or "nan")
                for name, value in row.items()
            }
            for row in csv.DictReader(file)
        ]


def run(script, n_agents, seed, options):
    """One run in a folder of its own. Returns a row per evaluation; peak memory and seconds are the whole command's.

    A script examples/<system>/<name> is the one of that name with the system's modules. {root} in the options stands
    for the repository's folder.
    """
    options_of_run = f"--n-agents {n_agents} --seed {seed} {options}".format(root=ROOT)
    system = script.rpartition("/")[0] if script.startswith("examples/") else ""
    command = [sys.executable, "-P", str(ROOT / script.removeprefix(f"{system}/")), *shlex.split(options_of_run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / system}:{ROOT / 'benchmark'}"}
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        with open(f"{folder}/out", "w+") as out:
            process = subprocess.Popen(command, cwd=folder, stdout=out, env=environment)
            _, status, usage = os.wait4(process.pid, 0)  # the memory of this process alone
            process.returncode = os.waitstatus_to_exitcode(status)
            out.seek(0)
            lines = out.read().splitlines()
    if process.returncode:
        raise RuntimeError(f"{shlex.join(command)} ended with status {process.returncode}")
    final = dict(word.split("=") for word in lines[-1].split()[1:])
    common = dict(script=script, n_agents=n_agents, seed=seed, options=options)
    common.update({name: final[name] for name in ("best_fit", "random", "argmax")})
    common.update(seconds=f"{time.time() - start:.1f}", peak_mib=usage.ru_maxrss // 1024)
    table = [words for words in map(str.split, lines) if words and words[0].isdigit()]
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
                f"{len(ended):4d}/{len(missing)} {script} N={n_agents} seed={seed} {options}: "
                f"cost ratio {last['cost_ratio']} after {last['episode']} episodes, {last['seconds']} s; "
                f"{left / 60:.0f} min left",
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
        seeds = found.setdefault((row["script"], int(row["n_agents"]), row["options"]), {})
        seeds.setdefault(int(row["seed"]), []).append((row["episode"], row["cost_ratio"]))
    return {key: {seed: np.array(points).T for seed, points in seeds.items()} for key, seeds in found.items()}


def reached(episodes, ratios, stays=True):
    """Episodes at the first evaluation with cost ratio ≤ 1, from where on all have it if it `stays`; NaN: never."""
    below = np.logical_and.accumulate(ratios[::-1] <= 1)[::-1] if stays else ratios <= 1
    return episodes[below.argmax()] if below.any() else np.nan


def listed(episodes):
    """Numbers of episodes as text, NaN as never."""
    return ", ".join("never" if np.isnan(episode) else f"{episode:.0f}" for episode in episodes)


def counted(episodes):
    """Numbers of episodes as text in ascending order, each with how often it occurs; NaN as never."""
    values, counts = np.unique(episodes, return_counts=True)  # NaN last
    return ", ".join(listed([value]) + (f" ({count})" if count > 1 else "") for value, count in zip(values, counts))


def interval(values):
    """Mean and half the width of its 95 % confidence interval (Student's t); the latter NaN for one value."""
    values = np.asarray(values, dtype=float)
    if len(values) == 1:
        return values[0], np.nan
    quantile = T_975[min(len(values) - 1, len(T_975)) - 1]
    return values.mean(), quantile * values.std(ddof=1) / len(values) ** 0.5


def shown(values):
    """Their `interval` as text; the mean alone of one value."""
    mean, half = interval(values)
    return f"{mean:.2f} ± {half:.2f}" if len(values) > 1 else f"{mean:.2f}"


def head(*columns):
    """Print the head of a Markdown table."""
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)


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
