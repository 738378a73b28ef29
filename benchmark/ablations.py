"""What each part of DG-PG brings, at N = 50 and 200.

Writes results/ablations.csv (a run that is there is not repeated), and prints the table.
"""

from dataclasses import dataclass

import tyro
from altered import VARIANTS
from runs import RESULTS, curves, head, read, shown, sweep

CHANGES = [
    "",
    "--alpha-start 0.9 --alpha-end 0.2",
    *(f"--alpha-start {alpha} --alpha-end {alpha}" for alpha in (0, 0.2, 0.4, 0.6, 0.8, 1)),
    "--no-own-action-baseline",
    "--no-share-parameters",
    "--no-share-parameters --no-own-action-baseline",
    *(f"--servers-per-agent {servers}" for servers in (4, 16, 50)),
    *(f"{variant}" for variant in VARIANTS),
]


@dataclass
class Args:
    seeds: tuple[int, int] = (3, 3)  # seeds at N = 50 and at N = 200
    workers: int = 2  # runs side by side, one thread each
    only_show: bool = False  # only the table, of the runs that are there


def main(args):
    changes = {50: CHANGES, 200: [change for change in CHANGES if change != "--servers-per-agent 50"]}
    jobs = [
        ("benchmark/altered.py" if change in VARIANTS else "dgpg.py", n, seed, f"--eval-every 10 {change}".strip())
        for n, seeds in zip((50, 200), args.seeds)
        for change in changes[n]
        for seed in range(1, seeds + 1)
    ]
    rows = read(RESULTS / "ablations.csv") if args.only_show else sweep("ablations", jobs, args.workers)
    best_fit = {(row["n_agents"], row["options"]): row["best_fit"] for row in rows}
    found = {(n, options): seeds for (_, n, options), seeds in curves(rows).items()}
    head("N", "change", "cost ratio after 10 episodes", "20", "Best-Fit's return")
    for (n, options), seeds in sorted(found.items(), key=lambda item: item[0][0]):
        means = [shown([ratios[k] for _, ratios in seeds.values()]) for k in (0, 1)]
        change = options.removeprefix("--eval-every 10").strip() or "none"
        print(f"| {n} | `{change}` | {' | '.join(means)} | {best_fit[n, options]:.1f} |")


if __name__ == "__main__":
    main(tyro.cli(Args))
