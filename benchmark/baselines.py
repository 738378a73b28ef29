"""MAPPO and IPPO, one actor for all and one per agent, beside DG-PG: episodes until the first evaluation at Best-Fit over N.

Writes results/baselines.csv (a run that is there is not repeated) and baselines.svg, and prints the table. DG-PG's points come
from results/scaling.csv.
"""

from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import tyro
from runs import RESULTS, ROOT, curves, reached, read, slope, sweep

SHARED, OWN = "", "--no-share-parameters"
# script, options, {N: (episodes, seeds)}
PLAN = [
    ("mappo.py", SHARED, {2: (640, 3), 5: (1600, 3), 10: (2400, 3), 50: (504, 1), 200: (504, 1)}),
    ("ippo.py", SHARED, {2: (640, 3), 5: (1600, 3)}),
    ("mappo.py", OWN, {2: (1600, 3), 5: (1600, 2)}),
    ("ippo.py", SHARED, {50: (504, 1), 200: (504, 1), 10: (2400, 1)}),
    ("mappo.py", OWN, {50: (504, 1), 200: (504, 1)}),
    ("ippo.py", OWN, {2: (1600, 1), 5: (1600, 1), 50: (504, 1), 200: (504, 1)}),
    ("mappo.py", SHARED, {20: (4000, 1)}),
]


@dataclass
class Args:
    workers: int = 2
    """runs side by side, one thread each"""
    only_show: bool = False
    """only the table and the figure, of the runs that are there"""


def main(args):
    jobs = [
        (script, n, seed, f"--episodes {episodes} --eval-every 80 {options}".strip())
        for script, options, sizes in PLAN
        for n, (episodes, seeds) in sizes.items()
        for seed in range(1, seeds + 1)
    ]
    if not args.only_show:
        sweep("baselines", jobs, args.workers)
    print("| algorithm | actor | N | first at Best-Fit | stays there from | last cost ratio | after episodes |\n|---|---|---|---|---|---|---|")
    points = {}
    found = curves(read(RESULTS / "baselines.csv") + read(RESULTS / "scaling.csv"))
    for (script, n, options), seeds in sorted(found.items(), key=lambda item: (item[0][0], OWN in item[0][2], item[0][1])):
        first, stays = ([reached(*curve, stays=stays) for curve in seeds.values()] for stays in (False, True))
        group = points.setdefault((script[: -len(".py")], "one per agent" if OWN in options else "shared"), [])
        group += [(n, episodes, curve[0][-1]) for episodes, curve in zip(first, seeds.values())]
        if script != "dgpg.py":
            shown = [", ".join("never" if np.isnan(e) else f"{e:.0f}" for e in group) for group in (first, stays)]
            last = ", ".join(f"{ratios[-1]:.2f}" for _, ratios in seeds.values())
            budget = max(episodes[-1] for episodes, _ in seeds.values())
            actor = "one per agent" if OWN in options else "shared"
            print(f"| {script[: -len('.py')].upper()} | {actor} | {n} | {shown[0]} | {shown[1]} | {last} | {budget:.0f} |")

    figure, axes = plt.subplots(figsize=(7, 4))
    for color, ((name, actor), group) in zip(plt.cm.tab10.colors, points.items()):
        n, episodes, budget = np.array(group).T
        there = ~np.isnan(episodes)
        label = f"{name}, {actor}"
        if len(set(n[there])) > 2:
            beta, error = slope(n[there], episodes[there])
            label += f": N^{beta:.2f} ± {error:.2f}"
            print(f"{label} (standard error, {there.sum()} runs that got there, {(~there).sum()} that did not)")
        axes.loglog(n[there], episodes[there], "o", ms=4, color=color, label=label)
        axes.loglog(n[~there], budget[~there], "x", ms=6, color=color)
    axes.set(xlabel="agents N", ylabel="episodes until first at Best-Fit", title="× : not reached within that many episodes")
    axes.legend(fontsize=8)
    figure.savefig(ROOT / "benchmark" / "baselines.svg", bbox_inches="tight")


if __name__ == "__main__":
    main(tyro.cli(Args))
