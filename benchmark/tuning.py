"""MAPPO's learning rate, entropy bonus and batch where it is slow, at N = 20 and 50: first episode at Best-Fit and the cost ratio.

Writes results/tuning.csv (a run that is there is not repeated), and prints the table.
"""

import numpy as np
import tyro
from runs import RESULTS, Args, curves, reached, read, sweep

RUN = "--episodes 1600 --eval-every 160"
SETTINGS = {  # N: learning rate, weight of the entropy bonus, other changes
    20: [
        *((rate, bonus, "") for rate in ("1e-3", "3e-3", "1e-2") for bonus in ("0", "0.01")),
        *(("1e-2", "0.03", ""), ("3e-2", "0.01", "")),
        *(("1e-3", "0", other) for other in ("--num-minibatches 16", "--num-envs 32")),
        ("3e-3", "0", "--num-envs 32"),
    ],
    50: [("1e-3", "0", ""), *((rate, bonus, "") for rate in ("3e-3", "1e-2") for bonus in ("0", "0.01")), ("3e-3", "0", "--num-minibatches 16")],
}


def main(args):
    jobs = [
        ("mappo.py", n, 1, f"{RUN} --learning-rate {rate} --ent-coef {bonus} {other}".strip())
        for n, settings in SETTINGS.items()
        for rate, bonus, other in settings
    ]
    rows = read(RESULTS / "tuning.csv") if args.only_show else sweep("tuning", jobs, args.workers)
    found = curves(rows)
    print("| N | settings | first at Best-Fit | cost ratio after 480 episodes | 800 | 1,600 |\n|---|---|---|---|---|---|")
    for script, n, _, options in jobs:
        for episodes, ratios in found.get((script, n, options), {}).values():
            first = reached(episodes, ratios, stays=False)
            at = [f"{ratios[episodes == k][0]:.2f}" for k in (480, 800, 1600)]
            print(f"| {n} | `{options.removeprefix(RUN).strip()}` | {'never' if np.isnan(first) else f'{first:.0f}'} | {' | '.join(at)} |")


if __name__ == "__main__":
    main(tyro.cli(Args))
