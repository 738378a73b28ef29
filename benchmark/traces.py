"""DG-PG and the reference policies on traces: two artificial ones, and the real ones that are given.

`python benchmark/traces.py --files FILE …` (columns in the README). Writes results/traces.csv (a run that is there is
not repeated) and prints the table; the artificial traces go to runs/traces/. An episode has as many rounds as the trace
has room for, from 30 to 100.
"""

import pathlib
from dataclasses import dataclass

import numpy as np
import tyro
from runs import ROOT, head, interval, sweep
from yardsticks import POLICIES

from cloud_env import MEAN_DURATION, CloudEnv, load_trace
from dgpg import evaluate

FOLDER = ROOT / "runs" / "traces"
SIZES, SEEDS = (20, 50, 100), (1, 2, 3)
SETTINGS = ("--eval-every 10", "--num-envs 4 --episodes 40 --eval-every 40")  # as many updates, four times the data


@dataclass
class Args:
    files: tuple[str, ...] = ()  # CSV files of real workload
    workers: int = 2  # runs side by side, one thread each


def write(name, duration):
    """A trace of Poisson arrivals, one a second, with these durations [rows] in s and equally likely vCPU and GiB."""
    rng, rows = np.random.default_rng(1), len(duration)
    columns = rng.exponential(1, rows).cumsum(), duration, rng.choice([1, 2, 4], rows), rng.choice([2, 4, 8], rows)
    title = "arrival_s,duration_s,cpu,memory_gib"
    np.savetxt(FOLDER / name, np.stack(columns, 1), fmt="%.3f", delimiter=",", header=title, comments="")


def main(args):
    FOLDER.mkdir(parents=True, exist_ok=True)
    rng, rows = np.random.default_rng(0), 100_000
    write("exponential.csv", rng.exponential(600, rows))
    write("pareto.csv", (10 * (1 + rng.pareto(0.9, rows))).clip(max=1e5))
    names = ["exponential.csv", "pareto.csv"]
    for file in map(pathlib.Path, args.files):  # under their names alone, so that the results do not depend on folders
        names.append(file.name)
        (FOLDER / file.name).unlink(missing_ok=True)
        (FOLDER / file.name).symlink_to(file.resolve())
    settings = []
    for name in names:
        duration = load_trace(FOLDER / name)[:, 1]
        duration *= MEAN_DURATION / duration.mean()  # rounds, as the environment scales them
        print(
            f"{name}: {len(duration)} tasks, median {np.median(duration):.2f}, {(duration < 1).mean():.0%} below 1 round"
        )
        for n in SIZES:
            rounds = min(100, (len(duration) // (5 * n) - 1) // 10 * 10)
            if rounds >= 30:
                settings.append((name, n, rounds, f"--trace {{root}}/runs/traces/{name} --rounds {rounds}"))
    jobs = [("dgpg.py", n, seed, f"{s} {trace}") for _, n, _, trace in settings for s in SETTINGS for seed in SEEDS]
    found = sweep("traces", jobs, args.workers)
    yardsticks = ("least loaded, in turn", "greedy on the model, in turn", "greedy on the model, all at once")
    head("trace", "N", "rounds", "stretches", "Best-Fit", *yardsticks, "DG-PG", "argmax", "4 environments", "argmax")
    for name, n, rounds, trace in settings:
        env = CloudEnv(max(2, min(40, 2_000 // n)), n, rounds, trace=FOLDER / name, held_out=True)
        best = evaluate(env, POLICIES["Best-Fit, in turn"])
        apart = min(env.num_envs, len(env.trace) // (n * (rounds + 1)))
        cells = [
            f"{env.num_envs}, {apart} apart",
            f"{best:.2f}",
            *(f"{evaluate(env, POLICIES[key]) / best:.2f}" for key in yardsticks),
        ]
        for setting in SETTINGS:
            runs = [r for r in found if (r["n_agents"], r["options"]) == (n, f"{setting} {trace}")]
            for figure in ("return", "argmax"):
                mean, half = interval([r[figure] / r["best_fit"] for r in runs])
                cells.append(f"{mean:.2f} ± {half:.2f}")
        print(f"| {name.removesuffix('.csv')} | {n} | {rounds} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
