"""DG-PG at N = 2 … 1500, one actor for all and one per agent: episodes until Best-Fit, cost ratio, seconds and memory.

Writes results/scaling.csv (a run that is there is not repeated) and scaling.svg, and prints the table.
"""

import matplotlib.pyplot as plt
import numpy as np
import tyro
from runs import RESULTS, Args, counted, curves, head, reached, read, save, shown, slope, sweep

SEEDS = {2: 5, 5: 20, 10: 5, 20: 5, 50: 5, 100: 5, 200: 5, 500: 3, 1000: 3, 1500: 3}  # seeds 1, 2, … of each N
EPISODES = (1, 2, 5)
SHARED = "--eval-every 1"
OWN = f"{SHARED} --no-share-parameters --episodes 20 --update-epochs 20 --learning-rate 1e-2"  # each has one sample


def main(args):
    jobs = [("dgpg.py", n, seed, SHARED) for n, seeds in SEEDS.items() for seed in range(1, seeds + 1)]
    jobs += [("dgpg.py", n, seed, OWN) for n in (2, 5, 10, 20, 50, 200) for seed in (1, 2, 3)]
    rows = read(RESULTS / "scaling.csv") if args.only_show else sweep("scaling", jobs, args.workers)
    ends = {(row["options"], int(row["n_agents"]), int(row["seed"])): row for row in rows}
    at = [f"cost ratio after {EPISODES[0]}", *map(str, EPISODES[1:]), "at the end"]
    head(
        "actor",
        "N",
        "seeds",
        "first at Best-Fit",
        "stays there from",
        *at,
        "largest at the end",
        "argmax",
        "seconds",
        "MiB",
    )
    points = []
    figure, axes = plt.subplots(figsize=(7, 4))
    for (_, n, options), seeds in sorted(curves(rows).items(), key=lambda item: (item[0][2], item[0][1])):
        first, stays = ([reached(*seeds[seed], stays=stays) for seed in sorted(seeds)] for stays in (False, True))
        ratios = np.array([ratios for _, ratios in seeds.values()])  # [seeds, episodes], one evaluation per episode
        last = [row for (*of, _), row in ends.items() if of == [options, n]]
        cells = [shown(ratios[:, k - 1]) for k in (*EPISODES, 0)] + [f"{ratios[:, -1].max():.2f}"]
        cells.append(shown([row["argmax"] / row["best_fit"] for row in last]))
        cells += [f"{np.median([row[name] for row in last]):.0f}" for name in ("seconds", "peak_mib")]
        cells = [str(n), str(len(last)), counted(first), counted(stays), *cells]
        print(f"| {'shared' if options == SHARED else 'own'} | {' | '.join(cells)} |")
        if options == OWN:
            continue
        points += [(n, episode) for episode in first]
        means = np.exp(np.log(ratios).mean(0))
        axes.plot(1 + np.arange(len(means)), means, label=f"N = {n}", color=plt.cm.viridis(list(SEEDS).index(n) / 10))
    points = np.array([point for point in points if not np.isnan(point[1])])
    for least in (5, 2):  # the paper's sizes begin at 5
        some = points[points[:, 0] >= least]
        beta, error = slope(*some.T)
        print(
            f"slope of log(episodes until first at Best-Fit) over log(N) from N = {least} on: "
            f"{beta:.3f} ± {error:.3f} (standard error, {len(some)} runs)"
        )
    axes.axhline(1, color="black", lw=0.8, ls=":")
    axes.text(9.8, 1.01, "Best-Fit", ha="right", va="bottom")
    axes.set(yscale="log", xscale="log", xlabel="episodes", ylabel="cost ratio R / R_best_fit", xlim=(1, 10))
    axes.set_xticks((*EPISODES, 10), (*EPISODES, 10))
    axes.set_yticks((0.5, 0.6, 0.7, 0.8, 1), ("0.5", "0.6", "0.7", "0.8", "1"))
    axes.minorticks_off()
    axes.set_title("DG-PG: geometric mean over seeds")
    axes.legend(ncols=2, fontsize=8)
    save(figure, "scaling")


if __name__ == "__main__":
    main(tyro.cli(Args))
