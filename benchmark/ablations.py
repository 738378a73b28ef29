"""The guidance, its short batches and a right reference state make DG-PG; the actor carries over to other N and loads.

At N = 50; with `--trace FILE` also from and to real workload. Writes measured/ablations.csv, and prints two tables.
"""

from dataclasses import dataclass

import runs
import tyro
from runs import FILES, actor_file, by_content, first, head, line, ratios, shown, sweep, trained, until
from variants import REFERENCES

N, SEEDS = 50, (1, 2, 3)
SAMPLED = "--no-own-action-expectation"
CHANGES = [
    "",
    *(f"--alpha-start {alpha} --alpha-end {alpha}" for alpha in (0, 0.2, 0.4, 0.6, 0.8, 1)),
    "--alpha-start 0.9 --alpha-end 0.2",
    SAMPLED,
    f"{SAMPLED} --alpha-start 0.9 --alpha-end 0.2",
    *(f"--num-steps {5 * count} --num-minibatches {count}" for count in (2, 5, 20)),  # minibatches of 5 states, too
    "--no-anneal-lr",
    "--update-epochs 5",
    "--update-epochs 20",
    "--episodes 20",
    *(f"--servers-per-agent {servers}" for servers in (4, 16, 32, 50)),
    *REFERENCES,
]
SIZES = (5, 10, 20, 50, 100, 200, 500, 1000, 1500)
LOADS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)


@dataclass
class Args(runs.Args):
    trace: str | None = None  # a CSV file of real workload


def ablation(change):
    """The jobs of a change: options of dgpg.py, or a reference state of variants.py."""
    if change in REFERENCES:
        return [(f"benchmark/variants.py dgpg {change}", N, seed, "--eval-every 1") for seed in SEEDS]
    return [("dgpg.py", N, seed, f"--eval-every 1 {change}".strip()) for seed in SEEDS]


def elsewhere(job, n, options):
    """The job that evaluates the actor of another job, without training."""
    file = actor_file(job)
    FILES[f"actor_{file.stem}"] = str(file)
    return "dgpg.py", n, job[2], f"--episodes 0 --init-actor {{actor_{file.stem}}} {options}".strip()


def main(args):
    found = sweep("ablations", [job for change in CHANGES for job in ablation(change)], args)
    columns = [f"cost ratio after {k}" for k in (1, 2, 5)]
    head("change", "episodes until Best-Fit", *columns, "at the end", "argmax", "Best-Fit's return")
    for change in CHANGES:
        there = [found[job] for job in ablation(change) if job in found]
        if there:
            episodes = until([first(rows) for rows in there], there[0][-1]["episodes"])
            after = [shown([rows[k]["cost_ratio"] for rows in there]) for k in (1, 2, 5)]  # row 0 is the untrained one
            ends = shown(ratios(there)), shown(ratios(there, argmax=True))
            line(f"`{change or 'none'}`", episodes, *after, *ends, f"{there[0][0]['heuristic']:.2f}")

    actors = {"synthetic": ablation("")}
    settings = [(f"synthetic → synthetic, N = {n}", "synthetic", n, "") for n in SIZES]
    settings += [(f"synthetic → synthetic, load {load}", "synthetic", N, f"--load {load}") for load in LOADS]
    if args.trace:
        trace = f"--trace {by_content(args.trace)}"
        actors["trace"] = [("dgpg.py", N, seed, f"--eval-every 10 {trace}") for seed in SEEDS]
        settings += [(f"synthetic → trace, N = {n}", "synthetic", n, trace) for n in (50, 200)]
        settings += [(f"trace → trace, N = {n}", "trace", n, trace) for n in (5, 20, 50, 100, 200)]
        settings += [(f"trace → synthetic, N = {n}", "trace", n, "") for n in (50, 200)]
    jobs = {name: [elsewhere(job, n, options) for job in actors[on]] for name, on, n, options in settings}
    if not args.only_show:
        for job in sum(actors.values(), []):
            trained(job)
    found = sweep("ablations", [job for group in jobs.values() for job in group], args)
    print()
    head("trained at N = 50 on → evaluated on", "cost ratio", "argmax")
    for name, group in jobs.items():
        there = [found[job] for job in group if job in found]
        line(name, shown(ratios(there)), shown(ratios(there, argmax=True)))


if __name__ == "__main__":
    main(tyro.cli(Args))
