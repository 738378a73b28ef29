"""What the benchmarks share: run the scripts by their command lines, keep a row per evaluation, summarise and draw.

A job is (script, N, seed, options). Its rows are appended to measured/*.csv when its run has ended, and a job whose
rows are there is not run again: an interrupted sweep goes on. Its actor stays in runs/benchmark/.
"""

import csv
import hashlib
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
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the modules that the benchmarks import

from cloud_env import CloudEnv  # noqa: E402

MEASURED = ROOT / "benchmark" / "measured"
ACTORS = ROOT / "runs" / "benchmark"
KEY = ("script", "n_agents", "seed", "options")
FIGURES = ("episodes", "heuristic", "random", "return", "argmax", "cost_ratio", "seconds")
FILES = {}  # the path that {name} in a job's options stands for
# quantile 0.975 of Student's t for 1 … 19 degrees of freedom; above, the last one is at most 7 % too large
T_975 = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23]
T_975 += [2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09]


@dataclass
class Args:
    workers: int = 2  # runs side by side, one thread each
    only_show: bool = False  # only what is made of the runs that are there


def number(text):
    """A cell of a CSV file: a float where it is one, else the text."""
    try:
        return float(text)
    except ValueError:
        return text


def read(path):
    """The rows of a CSV file as dictionaries, numbers as numbers; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{name: number(text) for name, text in row.items()} for row in csv.DictReader(file)]


def append(path, rows):
    """Append rows, dictionaries of the same names, to a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if not file.tell():
            writer.writeheader()
        writer.writerows(rows)


def by_content(path):
    """What a job's options say instead of a file's path: results know it by its bytes, wherever it lies."""
    name = f"file_{hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()[:12]}"
    FILES[name] = str(pathlib.Path(path).resolve())
    return f"{{{name}}}"


def actor_file(job):
    """The file for the actor that a job trains."""
    return ACTORS / f"{hashlib.sha256(repr(job).encode()).hexdigest()[:12]}.pt"


def trained(job):
    """The file of the actor that the job trained; it is trained now if it is not there."""
    if not actor_file(job).exists():
        print(f"training {job}", flush=True)
        run(*job)
    return actor_file(job)


def run(script, n_agents, seed, options):
    """Run one job in a folder of its own and keep its actor. Returns a row per evaluation; only the last has an argmax.

    script: a file of the project, with words that follow it, or "-m" and a module.
    """
    options_of_run = options.format_map({name: shlex.quote(path) for name, path in FILES.items()})
    words = shlex.split(f"{script} --n-agents {n_agents} --seed {seed} {options_of_run}")
    command = [sys.executable, *words] if words[0] == "-m" else [sys.executable, ROOT / words[0], *words[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/out", "w+") as out:
            process = subprocess.Popen(command, cwd=folder, stdout=out, env=environment)
            _, status, usage = os.wait4(process.pid, 0)  # the memory of this process alone
            process.returncode = os.waitstatus_to_exitcode(status)
            out.seek(0)
            lines = [line for line in out.read().splitlines() if "cost_ratio=" in line]
        if process.returncode:
            raise RuntimeError(f"{shlex.join(map(str, command))} ended with status {process.returncode}")
        for checkpoint in pathlib.Path(folder).glob("runs/*/checkpoint.pt"):  # none of a run without training
            saved = torch.load(checkpoint, weights_only=True)
            ACTORS.mkdir(parents=True, exist_ok=True)
            new = actor_file((script, n_agents, seed, options)).with_suffix(".new")
            torch.save({name: saved[name] for name in ("actor", "script", "system", "args")}, new)
            os.replace(new, new.with_suffix(".pt"))
    key = dict(zip(KEY, (script, n_agents, seed, options)))
    parsed = [dict(word.split("=") for word in line.split()) for line in lines]
    return [
        key | {name: row.get(name, "") for name in FIGURES} | {"peak_mib": usage.ru_maxrss // 1024} for row in parsed
    ]


def sweep(name, jobs, args):
    """Run every job that measured/{name}.csv does not have. Returns {job: its rows}, of the jobs that are there."""
    path, jobs = MEASURED / f"{name}.csv", dict.fromkeys(jobs)

    def there():
        found = {}
        for row in read(path):
            found.setdefault(tuple(row[column] for column in KEY), []).append(row)
        return {job: found[job] for job in jobs if job in found}

    missing = [] if args.only_show else [job for job in jobs if job not in there()]
    print(f"{name}: {len(missing)} of {len(jobs)} runs to do", flush=True)
    start, ended, lock = time.time(), [], threading.Lock()

    def record(job):
        rows = run(*job)
        with lock:  # rows are written when their run ends, whatever else still runs
            append(path, rows)
            ended.append(job)
            left = (time.time() - start) / len(ended) * (len(missing) - len(ended)) / 60
            last = f"{rows[-1]['cost_ratio']} after {rows[-1]['episodes']} episodes, {rows[-1]['seconds']} s"
            print(f"{len(ended)}/{len(missing)} {job}: cost ratio {last}; {left:.0f} min left", flush=True)

    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(record, missing))
    return there()


def num_scenarios(n_agents):
    """Of an evaluation, as in the scripts."""
    return min(40, int(np.ceil(2_000 / n_agents)))


def scenarios(n_agents, **options):
    """The environment that a run is evaluated on."""
    return CloudEnv(num_scenarios(n_agents), n_agents, held_out=True, **options)


def first(rows, limit=1.0):
    """Episodes at a run's first evaluation with a cost ratio of at most `limit`; NaN if there is none."""
    return min((row["episodes"] for row in rows if row["cost_ratio"] <= limit), default=np.nan)


def until(episodes, budget):
    """Median of runs' numbers of episodes as text, NaN as never; with how many runs are never there."""
    never = int(np.isnan(episodes).sum())
    median = np.median(np.nan_to_num(episodes, nan=np.inf))
    text = "never" if np.isinf(median) else f"{median:,.0f}"
    return f"{text} ({never} of {len(episodes)} not in {budget:,.0f})" if never else text


def ratios(runs, argmax=False):
    """Cost ratios at the ends of runs [seeds], of sampled actions or of the most likely ones."""
    return [rows[-1]["argmax"] / rows[-1]["heuristic"] if argmax else rows[-1]["cost_ratio"] for rows in runs]


def shown(values):
    """Mean and half the width of its 95 % confidence interval (Student's t) as text; the mean alone of one value."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return f"{values[0]:.2f}" if len(values) else "not run"
    quantile = T_975[min(len(values) - 1, len(T_975)) - 1]
    return f"{values.mean():.2f} ± {quantile * values.std(ddof=1) / len(values) ** 0.5:.2f}"


def slope(x, y):
    """Slope of the least-squares line through (log x, log y), and its standard error."""
    x, y = np.log(x), np.log(y)
    dx = x - x.mean()
    beta = dx @ y / (dx @ dx)
    residuals = y - y.mean() - beta * dx
    return beta, (residuals @ residuals / max(1, len(x) - 2) / (dx @ dx)) ** 0.5


def line(*cells):
    """Print a row of a Markdown table."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def head(*columns):
    """Print the head of a Markdown table."""
    line(*columns)
    print("|---" * len(columns) + "|", flush=True)


def save(figure, name):
    """Write benchmark/{name}.svg, the same bytes for the same figure."""
    import matplotlib  # the tests do without

    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(ROOT / "benchmark" / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
