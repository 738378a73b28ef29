"""DG-PG at N = 2 … 1500: episodes until Best-Fit, cost ratio, seconds and memory.

Writes results/scaling.csv (a run that is there is not repeated) and scaling.svg, and prints the table.
"""

from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import tyro
from runs import curves, head, listed, reached, save, shown, slope, sweep

SIZES = (2, 5, 10, 20, 50, 100, 200, 500, 1000, 1500)


@dataclass
class Args:
    seeds: int = 5  # seeds 1, 2, … at N up to 200
    seeds_large: int = 3  # seeds above that
    workers: int = 2  # runs side by side, one thread each


def main(args):
    many = [("dgpg.py", n, seed, "--eval-every 1") for n in SIZES if n <= 200 for seed in range(1, args.seeds + 1)]
    seeds = range(1, args.seeds_large + 1)
    large = [("dgpg.py", n, seed, "--eval-every 2") for n in SIZES if n > 200 for seed in seeds]
    rows = sweep("scaling", many + large, args.workers)
    ends = {(row["n_agents"], row["seed"]): row for row in rows}
    head("N", "episodes until Best-Fit", "cost ratio after 10", "20", "seconds", "peak MiB")
    points = []
    figure, axes = plt.subplots(figsize=(7, 4))
    for (_, n, _), seeds in curves(rows).items():
        first = [reached(*seeds[seed]) for seed in sorted(seeds)]
        points += [(n, episode) for episode in first]
        at = [shown([ratios[episodes == k][0] for episodes, ratios in seeds.values()]) for k in (10, 20)]
        last = [row for key, row in ends.items() if key[0] == n]
        seconds, memory = (np.median([row[name] for row in last]) for name in ("seconds", "peak_mib"))
        print(f"| {n} | {listed(first)} | {' | '.join(at)} | {seconds:.0f} | {memory:.0f} |")
        episodes = next(iter(seeds.values()))[0]
        ratios = np.exp(np.mean([np.log(ratios) for _, ratios in seeds.values()], 0))
        axes.plot(episodes, ratios, label=f"N = {n}", color=plt.cm.viridis(SIZES.index(n) / len(SIZES)))
    points = np.array([point for point in points if not np.isnan(point[1])])
    for least in (5, 2):  # the paper's sizes begin at 5
        some = points[points[:, 0] >= least]
        beta, error = slope(*some.T)
        print(
            f"slope of log(episodes until Best-Fit) over log(N) from N = {least} on: "
            f"{beta:.3f} ± {error:.3f} (standard error, {len(some)} runs)"
        )
    axes.axhline(1, color="black", lw=0.8, ls=":")
    axes.text(20, 1.03, "Best-Fit", ha="right", va="bottom")
    axes.set(yscale="log", xlabel="episodes", ylabel="cost ratio R / R_best_fit", xlim=(0, 20))
    axes.set_title("DG-PG: geometric mean over seeds")
    axes.set_xticks(range(0, 21, 5))
    axes.legend(ncols=2, fontsize=8)
    save(figure, "scaling")


if __name__ == "__main__":
    main(tyro.cli(Args))
