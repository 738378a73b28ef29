"""The guidance, its short batches and a right reference state make DG-PG; the actor carries over to other N and loads.

At N = 50; with `--trace FILE` also from and to real workload. Writes measured/ablations.csv, and prints three tables.
"""

import itertools
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
TRACE_SIZES = (5, 20, 50, 100, 200)
LOADS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)


@dataclass
class Args(runs.Args):
    trace: str | None = None  # a CSV file of real workload


def ablation(change):
    """The jobs of a change: options of dgpg.py, or a reference state of variants.py."""
    if change in REFERENCES:
        return [(f"benchmark/variants.py dgpg {change}", N, seed, "--eval-every 1") for seed in SEEDS]
    return [("dgpg.py", N, seed, f"--eval-every 1 {change}".strip()) for seed in SEEDS]


def elsewhere(jobs, n, options):
    """The jobs that evaluate the actors of other jobs, without training."""
    files = {job: actor_file(job) for job in jobs}
    FILES.update({f"actor_{file.stem}": str(file) for file in files.values()})
    start = "--episodes 0 --init-actor {{actor_{}}} {}"
    return [("dgpg.py", n, job[2], start.format(file.stem, options).strip()) for job, file in files.items()]


def main(args):
    found = sweep("ablations", [job for change in CHANGES for job in ablation(change)], args)
    columns = [f"cost ratio after {k}" for k in (1, 2, 5)]
    head("change", "episodes until Best-Fit", *columns, "at the end", "argmax", "Best-Fit's return")
    for change in CHANGES:
        there = [found[job] for job in ablation(change) if job in found]
        if there:
            episodes = until([first(rows) for rows in there], there[0][-1]["episodes"])
            after = [shown([rows[k - 1]["cost_ratio"] for rows in there]) for k in (1, 2, 5)]  # a row per episode
            ends = shown(ratios(there)), shown(ratios(there, argmax=True))
            line(f"`{change or 'none'}`", episodes, *after, *ends, f"{there[0][0]['heuristic']:.2f}")

    actors, options = {"synthetic": ablation("")}, {"synthetic": ""}  # by the workload
    if args.trace:
        options["trace"] = f"--trace {by_content(args.trace)}"
        actors["trace"] = [("dgpg.py", N, seed, f"--eval-every 10 {options['trace']}") for seed in SEEDS]
    if not args.only_show:
        for job in sum(actors.values(), []):
            trained(job)
    of_size, of_load = {}, {}  # {trained on → evaluated on: {column: jobs}}
    for (of, jobs), on in itertools.product(actors.items(), options):
        sizes = SIZES if of == on == "synthetic" else TRACE_SIZES
        of_size[f"{of} → {on}"] = {f"N = {n}": elsewhere(jobs, n, options[on]) for n in sizes}
    for name, jobs in actors.items():
        of_load[f"{name} → {name}"] = {
            f"load {load}": elsewhere(jobs, N, f"--load {load} {options[name]}") for load in LOADS
        }
    tables = of_size, of_load
    cells = [jobs for table in tables for row in table.values() for jobs in row.values()]
    found = sweep("ablations", sum(cells, []), args)
    for table in tables:
        columns = list(table["synthetic → synthetic"])
        print()
        head(f"cost ratio, trained at N = {N} on → evaluated on", *columns)
        for name, row in table.items():
            there = [[found[job] for job in row.get(column, []) if job in found] for column in columns]
            line(name, *(shown(ratios(runs)) for runs in there))


if __name__ == "__main__":
    main(tyro.cli(Args))
