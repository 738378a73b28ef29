"""MAPPO and IPPO, one actor for all and one per agent, beside DG-PG: episodes until first at Best-Fit, over N.

Writes results/baselines.csv (a run that is there is not repeated), baselines.svg and learning.svg, and prints the
table. DG-PG's runs come from results/scaling.csv.
"""

import matplotlib.pyplot as plt
import numpy as np
import tyro
from runs import RESULTS, Args, counted, curves, head, listed, reached, read, save, slope, sweep

SHARED, OWN = "", "--no-share-parameters --ent-coef 0"
FASTER = "--learning-rate 1e-2"  # earlier at N = 5, later and unsteady at N = 10 (tuning.py)
GUIDED = "--num-envs 8 --num-steps 100 --num-minibatches 4 --learning-rate 1e-2 --ent-coef 0.01 --alpha-end 0"
NAMES = {"dgpg.py": "DG-PG", "mappo.py": "MAPPO", "ippo.py": "IPPO"}
PLAN = [  # script, options, N, episodes, seeds; 504 is the paper's 500 as a multiple of 8
    *(("mappo.py", SHARED, n, episodes, (1, 2, 3)) for n, episodes in ((2, 640), (10, 4000), (20, 4000))),
    *(("mappo.py", options, 5, 1600, range(1, 11)) for options in (SHARED, FASTER)),
    ("mappo.py", FASTER, 2, 640, (1, 2, 3)),
    ("mappo.py", FASTER, 10, 4000, (1,)),
    ("mappo.py", OWN, 5, 8000, (1, 2, 3)),
    ("dgpg.py", GUIDED, 5, 1600, (1, 2, 3)),  # with MAPPO's data and settings
    *(("mappo.py", SHARED, n, episodes, (1, 2, 3)) for n, episodes in ((50, 4000), (200, 504))),
    *(("ippo.py", SHARED, n, episodes, (1, 2, 3)) for n, episodes in ((2, 640), (5, 1600), (10, 4000), (20, 4000))),
    *(("ippo.py", SHARED, n, episodes, (1, 2, 3)) for n, episodes in ((50, 4000), (200, 504))),
]


def main(args):
    jobs = [
        (script, n, seed, f"--episodes {episodes} --eval-every 80 {options}".strip())
        for script, options, n, episodes, seeds in PLAN
        for seed in seeds
    ]
    if not args.only_show:
        sweep("baselines", jobs, args.workers)
    rows = read(RESULTS / "baselines.csv") + read(RESULTS / "scaling.csv")
    argmax = {
        (row["script"], row["n_agents"], row["options"], row["seed"]): row["argmax"] / row["best_fit"] for row in rows
    }
    columns = [
        "actor",
        "N",
        "first at Best-Fit",
        "median",
        "stays there from",
        "cost ratio at the end",
        "argmax",
        "after",
    ]
    head("", *columns)
    points, found = {}, curves(rows)
    order = {key: (list(NAMES).index(key[0]), "share" in key[2], key[1], len(key[2])) for key in found}
    for script, n, options in sorted(found, key=order.get):
        seeds = sorted(found[script, n, options].items())
        first, stays = ([reached(*curve, stays=stays) for _, curve in seeds] for stays in (False, True))
        actor = "one per agent" if "share" in options else "shared"
        variant = {"dgpg.py": GUIDED, "mappo.py": FASTER}.get(script, "none")
        settings = variant if variant in options else ""
        budget = seeds[0][1][0][-1]
        ratios = ", ".join(f"{ratios[-1]:.2f}" for _, (_, ratios) in seeds)
        best = ", ".join(f"{argmax[script, n, options, seed]:.2f}" for seed, _ in seeds)
        median = listed([np.median(np.nan_to_num(first, nan=np.inf))]).replace("inf", "never")
        if script != "dgpg.py" or settings:  # scaling.py has the others
            cells = f"{counted(first)} | {median} | {counted(stays)} | {ratios} | {best} | {budget:.0f}"
            print(f"| {NAMES[script]} `{settings}` | {actor} | {n} | {cells} |".replace(" `` ", " "))
        if not settings:
            points.setdefault(f"{NAMES[script]}, {actor}", []).extend(
                zip([n] * len(seeds), first, [budget] * len(seeds))
            )

    figure, axes = plt.subplots(figsize=(7, 4))
    for k, (label, group) in enumerate(points.items()):
        n, episodes, budget = np.array(group).T
        there = ~np.isnan(episodes)
        beside = n * 1.07 ** (k - 2)  # so that no algorithm hides another
        axes.loglog(beside[there], episodes[there], "o", ms=4, color=f"C{k}", label=label)
        axes.loglog(beside[~there], budget[~there], "x", ms=6, color=f"C{k}")
        if there.all() and len(set(n)) > 2:
            beta, error = slope(n, episodes)
            print(f"{label}: N^{beta:.2f} ± {error:.2f} (standard error, {len(n)} runs)")
    axes.set(xlabel="agents N", ylabel="episodes until first at Best-Fit")
    axes.set_title("× : not reached within that many episodes")
    axes.set_ylim(0.8, 1e5)  # room for the legend
    axes.legend(fontsize=8, ncols=2, loc="upper center")
    save(figure, "baselines")

    figure, axes = plt.subplots(figsize=(7, 4))
    for color, n in enumerate((5, 50, 200)):
        for style, script, options in (("-", "dgpg.py", "--eval-every 1"), (":", "mappo.py", "")):
            for key, seeds in found.items():
                plain = key[2] == options if options else "--episodes" in key[2] and key[2].endswith("80")
                if key[:2] != (script, n) or not plain:
                    continue
                for k, (episodes, ratios) in enumerate(seeds.values()):
                    label = None if k else f"{NAMES[script]}, N = {n}"
                    axes.loglog(episodes, ratios, style, lw=1, color=f"C{color}", label=label)
    axes.axhline(1, color="black", lw=0.8)
    axes.set(
        xlabel="episodes", ylabel="cost ratio R / R_best_fit", title="one curve per seed; 1: Best-Fit", ylim=(0.4, 200)
    )
    axes.legend(fontsize=8, ncols=3)
    save(figure, "learning")


if __name__ == "__main__":
    main(tyro.cli(Args))
