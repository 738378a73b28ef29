"""How the episodes that MAPPO needs grow with N, all else alike: 4 servers in reach of every agent, one target.

The target is a return 90 % (then 97 %) of the way from random placement to the greedy use of the model in turn. Writes
results/growth.csv (a run that is there is not repeated) and growth.svg, and prints the table. A run that does not get
there enters the fit with its whole budget, so that the slope is then a lower bound.
"""

import matplotlib.pyplot as plt
import numpy as np
import tyro
from runs import RESULTS, Args, counted, head, read, save, slope, sweep
from yardsticks import POLICIES

from cloud_env import CloudEnv
from dgpg import evaluate

SIZES, SEEDS, TARGETS = (4, 8, 16, 32, 48), (1, 2, 3), (0.9, 0.97)
COMMON, OWN = "--servers-per-agent 4 --eval-scenarios 20", "--no-share-parameters"
# name: script, episodes at each N (MAPPO's rate does not fall: a longer run begins as a shorter one does), options
KINDS = {
    "MAPPO, shared actor": (
        "mappo.py",
        {4: 1200, 8: 1200, 16: 4000, 32: 4000, 48: 4000},
        f"--eval-every 40 {COMMON}",
    ),
    "MAPPO, one per agent": ("mappo.py", dict.fromkeys(SIZES, 2400), f"--eval-every 40 {COMMON} {OWN} --ent-coef 0"),
    "DG-PG, shared actor": ("dgpg.py", dict.fromkeys(SIZES, 10), f"--eval-every 1 {COMMON}"),
    "DG-PG, one per agent": ("dgpg.py", dict.fromkeys(SIZES, 10), f"--eval-every 1 {COMMON} {OWN}"),
}


def main(args):
    jobs = {
        (name, n, seed): (script, n, seed, f"--episodes {episodes[n]} {options}")
        for n in SIZES
        for name, (script, episodes, options) in KINDS.items()
        for seed in SEEDS
    }
    rows = read(RESULTS / "growth.csv") if args.only_show else sweep("growth", list(jobs.values()), args.workers)
    runs = {}  # job: its rows
    for row in rows:
        runs.setdefault((row["script"], row["n_agents"], row["seed"], row["options"]), []).append(row)
    span = {}  # N: returns of random placement and of the greedy use of the model
    for n in SIZES:
        env = CloudEnv(20, n, servers_per_agent=4)  # the scenarios of the runs
        span[n] = [evaluate(env, POLICIES[name]) for name in ("random", "greedy on the model, in turn")]
    figure, axes = plt.subplots(1, len(TARGETS), figsize=(9, 4), sharey=True)
    for target, axis in zip(TARGETS, axes):
        print()
        head(f"{target:.0%} of the way: episodes", *(f"N = {n}" for n in SIZES), "slope", "runs not there")
        for k, (name, (_, budget, _)) in enumerate(KINDS.items()):
            points, cells = [], []  # N, episodes until the target or NaN; runs that are not there yet are left out
            for n in SIZES:
                low, high = span[n]
                there = [runs[jobs[name, n, seed]] for seed in SEEDS if jobs[name, n, seed] in runs]
                far = [[row["episode"] for row in run if row["return"] >= low + target * (high - low)] for run in there]
                first = [min(episodes, default=np.nan) for episodes in far]
                points += [(n, episode) for episode in first]
                cells.append(counted(first))
            n, episodes = np.array(points).T
            never = np.isnan(episodes)
            episodes = np.where(never, [budget[m] for m in n], episodes)
            beta, error = slope(n, episodes)
            sign = "≥ " if never.any() else ""
            print(f"| {name} | {' | '.join(cells)} | {sign}{beta:.2f} ± {error:.2f} | {never.sum()} |")
            beside = n * 1.05 ** (k - 1.5)  # so that none hides another
            axis.loglog(beside[~never], episodes[~never], "o", ms=4, color=f"C{k}", label=name)
            axis.loglog(beside[never], episodes[never], "x", ms=6, color=f"C{k}")
        axis.set_xticks(SIZES, SIZES)
        axis.minorticks_off()
        axis.set(xlabel="agents N", title=f"{target:.0%} of the way from random to greedy")
    axes[0].set(ylabel="episodes; ×: not reached within that many", ylim=(0.8, 2e4))
    axes[0].legend(fontsize=8)
    save(figure, "growth")


if __name__ == "__main__":
    main(tyro.cli(Args))
