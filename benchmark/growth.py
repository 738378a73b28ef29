"""How the episodes that MAPPO needs grow with N, all else alike: 4 servers in reach of every agent, one target.

The target is a return 90 % (then 97 %) of the way from random placement to the greedy use of the model in turn. Writes
results/growth.csv (a run that is there is not repeated) and growth.svg, and prints the table. A run that does not get
there enters the fit with its whole budget, so that the slope is then a lower bound.
"""

import matplotlib.pyplot as plt
import numpy as np
import tyro
from runs import RESULTS, Args, head, listed, read, save, slope, sweep
from yardsticks import POLICIES

from cloud_env import CloudEnv
from dgpg import evaluate

SIZES, SEEDS, TARGETS = (4, 8, 16, 32, 48), (1, 2, 3), (0.9, 0.97)
COMMON, OWN = "--servers-per-agent 4 --eval-scenarios 20", "--no-share-parameters"
KINDS = {  # name: script, options
    "MAPPO, shared actor": ("mappo.py", f"--episodes 1200 --eval-every 40 {COMMON}"),
    "MAPPO, one per agent": (
        "mappo.py",
        f"--episodes 2400 --eval-every 40 {COMMON} {OWN} --ent-coef 0",
    ),
    "DG-PG, shared actor": ("dgpg.py", f"--eval-every 1 {COMMON}"),
    "DG-PG, one per agent": ("dgpg.py", f"--eval-every 1 {COMMON} {OWN}"),
}


def main(args):
    jobs = [(script, n, seed, options) for n in SIZES for script, options in KINDS.values() for seed in SEEDS]
    rows = read(RESULTS / "growth.csv") if args.only_show else sweep("growth", jobs, args.workers)
    span = {}  # N: returns of random placement and of the greedy use of the model
    for n in SIZES:
        env = CloudEnv(20, n, servers_per_agent=4)  # the scenarios of the runs
        span[n] = [evaluate(env, POLICIES[name]) for name in ("random", "greedy on the model, in turn")]
    figure, axes = plt.subplots(1, len(TARGETS), figsize=(9, 4), sharey=True)
    for target, axis in zip(TARGETS, axes):
        print()
        head(f"{target:.0%} of the way: episodes", *(f"N = {n}" for n in SIZES), "slope", "runs not there")
        for k, (name, (script, options)) in enumerate(KINDS.items()):
            budget, cells, points = 0, [], []
            for n in SIZES:
                low, high = span[n]
                firsts = []
                for seed in SEEDS:
                    run = [
                        r
                        for r in rows
                        if (r["script"], r["n_agents"], r["seed"], r["options"]) == (script, n, seed, options)
                    ]
                    there = [r["episode"] for r in run if r["return"] >= low + target * (high - low)]
                    firsts.append(min(there, default=np.nan))
                    budget = max([budget, *(r["episode"] for r in run)])
                cells.append(listed(sorted(firsts)))
                points += [(n, first) for first in firsts]
            n, episodes = np.array(points).T
            never = np.isnan(episodes)
            beta, error = slope(n, np.where(never, budget, episodes))
            sign = "≥ " if never.any() else ""
            print(f"| {name} | {' | '.join(cells)} | N^{sign}{beta:.2f} ± {error:.2f} | {never.sum()} |")
            beside = n * 1.05 ** (k - 1.5)
            axis.loglog(beside[~never], episodes[~never], "o", ms=4, color=f"C{k}", label=name)
            axis.loglog(beside[never], np.full(never.sum(), budget), "x", ms=6, color=f"C{k}")
        axis.set(xlabel="agents N", title=f"{target:.0%} of the way from random to greedy")
    axes[0].set(ylabel="episodes; ×: not reached within that many", ylim=(0.8, 2e4))
    axes[0].legend(fontsize=8)
    save(figure, "growth")


if __name__ == "__main__":
    main(tyro.cli(Args))
