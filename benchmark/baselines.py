"""MAPPO and IPPO, one actor for all and one per agent, beside DG-PG: episodes until first at Best-Fit, over N.

Writes results/baselines.csv (a run that is there is not repeated), baselines.svg and learning.svg, and prints the
table. DG-PG's runs come from results/scaling.csv.
"""

import matplotlib.pyplot as plt
import numpy as np
import tyro
from runs import RESULTS, Args, curves, head, listed, reached, read, save, slope, sweep

SHARED, OWN = "", "--no-share-parameters"
ANNEALED = "--anneal-lr"
EARLIER = "--learning-rate 1e-3 --ent-coef 0"  # slower with a shared actor, better from N = 10 on with one per agent
BOTH = ("mappo.py", "ippo.py")
NAMES = {"dgpg": "DG-PG", "mappo": "MAPPO", "ippo": "IPPO"}
# script, options, N, episodes, seeds; 504 is the paper's 500 as a multiple of 8
FORMER = [  # with the settings EARLIER
    *((script, SHARED, n, episodes, (1, 2, 3)) for n, episodes in ((2, 640), (5, 1600), (200, 504)) for script in BOTH),
    *(
        (script, OWN, n, episodes, (1, 2, 3))
        for n, episodes in ((2, 1600), (5, 8000), (10, 10_000), (20, 4000), (50, 4000), (200, 504))
        for script in BOTH
    ),
    *((script, SHARED, 10, 4000, (1,)) for script in BOTH),
    *(("mappo.py", SHARED, n, episodes, (1,)) for n, episodes in ((20, 4000), (50, 10_000))),
    ("mappo.py", SHARED, 10, 2400, (2, 3)),
    ("mappo.py", SHARED, 50, 504, (2, 3)),
    ("ippo.py", SHARED, 10, 504, (2, 3)),
    ("ippo.py", SHARED, 50, 504, (1, 2, 3)),
]
PLAN = [
    *(
        (script, SHARED, n, episodes, (1, 2, 3))
        for n, episodes in ((2, 640), (5, 1600), (10, 4000), (20, 4000), (200, 504))
        for script in BOTH
    ),
    ("mappo.py", SHARED, 50, 10_000, (1, 2, 3)),
    ("ippo.py", SHARED, 50, 4000, (1, 2, 3)),
    *((script, OWN, 5, 1600, (1, 2, 3)) for script in BOTH),
    *((script, OWN, n, 4000, (1,)) for n in (10, 20) for script in BOTH),
    *(
        ("mappo.py", ANNEALED, n, episodes, (1, 2, 3))
        for n, episodes in ((2, 640), (5, 1600), (10, 2400), (20, 4000), (50, 4000))
    ),
    ("ippo.py", ANNEALED, 50, 4000, (1,)),
    *((script, f"{options} {EARLIER}".strip(), *rest) for script, options, *rest in FORMER),
]


def main(args):
    jobs = [
        (script, n, seed, f"--episodes {episodes} --eval-every 80 {options}".strip())
        for script, options, n, episodes, seeds in PLAN
        for seed in seeds
    ]
    if not args.only_show:
        sweep("baselines", jobs, args.workers)
    groups = {}  # (settings, script, own actors, N): {seed: its curve}
    found = curves(read(RESULTS / "baselines.csv") + read(RESULTS / "scaling.csv"))
    for (script, n, options), seeds in found.items():
        settings = next((settings for settings in (ANNEALED, EARLIER) if settings in options), "defaults")
        groups.setdefault((settings, script[: -len(".py")], OWN in options, n), {}).update(seeds)

    columns = ["actor", "N", "first at Best-Fit", "stays there from", "cost ratio after 480 episodes", "1,600", "4,000"]
    points = {}
    for settings in ("defaults", ANNEALED, EARLIER):
        title = settings if settings == "defaults" else f"`{settings}`"
        print()
        head(title, *columns, "at the end", "after")
        for (_, name, own, n), seeds in sorted(item for item in groups.items() if item[0][0] == settings):
            seeds = [seeds[seed] for seed in sorted(seeds)]
            actor = "one per agent" if own else "shared"
            first, stays = ([reached(*curve, stays=stays) for curve in seeds] for stays in (False, True))
            budgets = [episodes[-1] for episodes, _ in seeds]
            if settings == (EARLIER if own and name != "dgpg" else "defaults"):  # the better ones of the two
                points.setdefault(f"{NAMES[name]}, {actor}", []).extend(zip([n] * len(seeds), first, budgets))
            ratios = [", ".join(f"{ratio:.2f}" for e, r in seeds for ratio in r[e == k]) for k in (480, 1600, 4000)]
            ratios.append(", ".join(f"{r[-1]:.2f}" for _, r in seeds))
            budget = listed(budgets if len(set(budgets)) > 1 else budgets[:1])
            cells = (NAMES[name], actor, str(n), listed(first), listed(stays), *ratios, budget)
            print(f"| {' | '.join(cells)} |")

    figure, axes = plt.subplots(figsize=(7, 4))
    for k, (label, group) in enumerate(points.items()):
        n, episodes, budget = np.array(group).T
        there = ~np.isnan(episodes)
        if len(set(n[there])) > 2:
            beta, error = slope(n[there], episodes[there])
            middle = np.exp(np.log(np.stack((n, episodes))[:, there]).mean(1))  # the fitted line goes through it
            axes.loglog(n[there], middle[1] * (n[there] / middle[0]) ** beta, lw=0.8, color=f"C{k}")
            label += f": N^{beta:.2f} ± {error:.2f}"
            print(f"{label} (standard error, {there.sum()} runs that got there, {(~there).sum()} that did not)")
        beside = n * 1.07 ** (k - 2)  # so that no algorithm hides another
        axes.loglog(beside[there], episodes[there], "o", ms=4, color=f"C{k}", label=label)
        axes.loglog(beside[~there], budget[~there], "x", ms=6, color=f"C{k}")
    axes.set(xlabel="agents N", ylabel="episodes until first at Best-Fit")
    axes.set_title("× : not reached within that many episodes")
    axes.set_ylim(1, 2e5)  # room for the legend
    axes.legend(fontsize=8, ncols=2, loc="upper center")
    save(figure, "baselines")

    figure, axes = plt.subplots(figsize=(7, 4))
    for color, n in enumerate((5, 50, 200)):
        for style, name in (("-", "dgpg"), (":", "mappo")):
            for k, (episodes, ratios) in enumerate(groups["defaults", name, False, n].values()):
                label = None if k else f"{NAMES[name]}, N = {n}"
                axes.loglog(episodes, ratios, style, lw=1, color=f"C{color}", label=label)
    axes.axhline(1, color="black", lw=0.8)
    axes.set(
        xlabel="episodes", ylabel="cost ratio R / R_best_fit", title="one curve per seed; 1: Best-Fit", ylim=(0.4, 200)
    )
    axes.legend(fontsize=8, ncols=3)
    save(figure, "learning")


if __name__ == "__main__":
    main(tyro.cli(Args))
