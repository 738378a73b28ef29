"""What each part of DG-PG brings, at N = 50.

Writes results/ablations.csv (a run that is there is not repeated), and prints the table.
"""

import numpy as np
import tyro
from altered import VARIANTS
from runs import RESULTS, Args, counted, curves, head, reached, read, shown, sweep

SAMPLED, OWN = "--no-own-action-expectation", "--no-share-parameters"
# the form that the project had before: an update per episode
ONE_UPDATE = (
    "--num-steps 100 --num-minibatches 4 --update-epochs 20 --learning-rate 1e-2 --clip-coef 0.3 --no-anneal-lr"
)
CHANGES = [
    "",
    *(f"--alpha-start {alpha} --alpha-end {alpha}" for alpha in (0, 0.2, 0.4, 0.6, 0.8, 1)),
    "--alpha-start 0.9 --alpha-end 0.2",
    SAMPLED,
    f"{SAMPLED} --alpha-start 0.9 --alpha-end 0.2",
    *(f"--num-steps {5 * count} --num-minibatches {count}" for count in (1, 5, 20)),  # minibatches of 5 states, too
    f"{SAMPLED} {ONE_UPDATE}",
    "--no-anneal-lr",
    "--update-epochs 20",
    "--episodes 20",
    OWN,
    f"{OWN} {SAMPLED}",
    f"{OWN} {SAMPLED} {ONE_UPDATE}",
    *(f"--servers-per-agent {servers}" for servers in (4, 16, 32, 50)),
    *VARIANTS,
]


def main(args):
    jobs = [
        ("benchmark/altered.py" if change in VARIANTS else "dgpg.py", 50, seed, f"--eval-every 1 {change}".strip())
        for seed in (1, 2, 3)
        for change in CHANGES
    ]
    rows = read(RESULTS / "ablations.csv") if args.only_show else sweep("ablations", jobs, args.workers)
    best_fit = {row["options"]: row["best_fit"] for row in rows}
    head("change", "first at Best-Fit", "cost ratio after 1 episode", "2", "5", "at the end", "Best-Fit's return")
    for (_, _, options), seeds in curves(rows).items():
        ratios = np.array([ratios for _, ratios in seeds.values()])
        first = counted([reached(*curve, stays=False) for curve in seeds.values()])
        change = options.removeprefix("--eval-every 1").strip() or "none"
        means = " | ".join(shown(ratios[:, k - 1]) for k in (1, 2, 5, 0))
        print(f"| `{change}` | {first} | {means} | {best_fit[options]:.1f} |")


if __name__ == "__main__":
    main(tyro.cli(Args))
