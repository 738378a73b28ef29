"""How good the policy is that DG-PG ends with, at N = 5: α_end = 0 and 0.2, its own budget and MAPPO's, over the load.

Writes results/equilibria.csv (a run that is there is not repeated).
"""

from dataclasses import dataclass

import tyro
from runs import curves, head, shown, sweep

BUDGET = "--eval-every 1600 --anneal-lr"  # MAPPO's 1,600 episodes
SAME = "--num-envs 8 --episodes 1600 --update-epochs 10 --clip-coef 0.2 --ent-coef 0.01"  # and MAPPO's settings
SETTINGS = [
    ("dgpg.py", "--eval-every 20 --alpha-end 0.2"),
    ("dgpg.py", "--eval-every 20 --alpha-end 0"),
    ("mappo.py", BUDGET),
    ("dgpg.py", f"{BUDGET} {SAME} --alpha-end 0"),
    ("dgpg.py", f"{BUDGET} {SAME} --alpha-end 0.2"),
]


@dataclass
class Args:
    seeds: int = 3  # seeds 1, 2, …
    workers: int = 2  # runs side by side, one thread each


def main(args):
    loads = (0.6, 0.7, 0.8, 0.9)
    jobs = [
        (script, 5, seed, f"{options} --load {load}")
        for seed in range(1, args.seeds + 1)
        for script, options in SETTINGS
        for load in loads
    ]
    found = curves(sweep("equilibria", jobs, args.workers))
    head("cost ratio at the end", *(f"load {load}" for load in loads))
    for script, options in SETTINGS:
        runs = [found[script, 5, f"{options} --load {load}"].values() for load in loads]
        ends = [shown([ratios[-1] for _, ratios in seeds]) for seeds in runs]
        print(f"| `{script} {options}` | {' | '.join(ends)} |")


if __name__ == "__main__":
    main(tyro.cli(Args))
