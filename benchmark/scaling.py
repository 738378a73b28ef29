"""DG-PG is at Best-Fit after a few episodes at any N; the episodes that MAPPO and IPPO need grow with N.

Writes measured/scaling.csv, learning.svg (cost ratio over episodes, by script) and scaling.svg (DG-PG's, by N), and
prints the table: runs with the defaults, then the baselines' other batches and rates.
"""

import numpy as np
import tyro
from runs import Args, first, head, line, ratios, save, shown, slope, sweep, until

NAMES = {"dgpg.py": "DG-PG", "mappo.py": "MAPPO", "ippo.py": "IPPO"}
SEEDS = {2: 5, 5: 20, 10: 5, 20: 10, 50: 10, 100: 10, 200: 5, 500: 3, 1000: 3, 1500: 3}  # how many of DG-PG at each N
BUDGETS = {2: 1600, 5: 1600, 10: 4000, 20: 4000, 50: 4000, 200: 504}  # the baselines' episodes, multiples of 8
BASELINES = "mappo.py", "ippo.py"
RATES = "--learning-rate 1e-3", "--learning-rate 3e-3", "--learning-rate 1e-2"  # a script's own is run again
BATCHES = "--num-envs 1 --num-steps 5 --num-minibatches 1"  # DG-PG's
CHANGES = *RATES, "--num-envs 2", "--num-steps 25", *(f"{BATCHES} --learning-rate {rate}" for rate in ("3e-4", "1e-3"))
TUNED, TUNING_SEEDS = (5, 10), (11, 12)  # other seeds than the table's
UNSEEN = range(101, 111)  # seeds that no default was chosen on, for DG-PG at N = 20 and 50
SHOWN = (5, 50, 200)  # in learning.svg


def guided(n, options="", seeds=None):
    """DG-PG's jobs at N agents, of the seeds in `SEEDS` or of others."""
    return [("dgpg.py", n, seed, f"--eval-every 1 {options}".strip()) for seed in seeds or range(1, SEEDS[n] + 1)]


def baseline(script, n):
    """A baseline's jobs at N agents: ten seeds at N = 5, three elsewhere."""
    options = f"--episodes {BUDGETS[n]} --eval-every 40"
    return [(script, n, seed, options) for seed in range(1, 11 if n == 5 else 4)]


def tuning():
    """The baselines' jobs with other batches and rates: {(script, N, change): jobs}."""
    return {
        (script, n, change): [(script, n, seed, f"--episodes 1600 --eval-every 80 {change}") for seed in TUNING_SEEDS]
        for script in BASELINES
        for n in TUNED
        for change in CHANGES
    }


def draw(found):
    """The two figures, of the runs found {job: rows}."""
    import matplotlib.pyplot as plt

    def mean(jobs):
        """Episodes and the geometric mean of the runs' cost ratios."""
        runs = [found[job] for job in jobs if job in found]
        curves = [[row["cost_ratio"] for row in rows] for rows in runs]
        return [row["episodes"] for row in runs[0]], np.exp(np.log(curves).mean(0)), curves

    figure, axes = plt.subplots(figsize=(7, 4))
    for color, n in enumerate(SHOWN):
        for style, script in zip(("-", "--", ":"), NAMES):
            jobs = guided(n) if script == "dgpg.py" else baseline(script, n)
            if not any(job in found for job in jobs):
                continue
            episodes, middle, curves = mean(jobs)
            axes.loglog(episodes, middle, style, color=f"C{color}", label=f"{NAMES[script]}, N = {n}")
            axes.fill_between(episodes, np.min(curves, 0), np.max(curves, 0), color=f"C{color}", alpha=0.15, lw=0)
    axes.axhline(1, color="black", lw=0.8)
    axes.annotate("Best-Fit", (1, 1.05))
    axes.set_xticks((1, 10, 100, 1000), ("1", "10", "100", "1,000"))
    axes.set(xlabel="episodes", ylabel="cost ratio", title="geometric mean over seeds, and their range")
    axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    save(figure, "learning")

    figure, axes = plt.subplots(figsize=(7, 4))
    for k, n in enumerate(SEEDS):
        if any(job in found for job in guided(n)):
            episodes, middle, _ = mean(guided(n))
            axes.semilogy(episodes, middle, color=plt.cm.viridis(k / len(SEEDS)), label=f"N = {n}")
    axes.axhline(1, color="black", lw=0.8)
    axes.set_yticks((0.5, 0.6, 0.8, 1), ("0.5", "0.6", "0.8", "1"))
    axes.minorticks_off()
    axes.set(xlabel="episodes", ylabel="cost ratio", title="DG-PG, geometric mean over seeds; 1: Best-Fit")
    axes.legend(ncols=2, fontsize=8)
    save(figure, "scaling")


def summary(jobs, found):
    """Episodes until Best-Fit; the cost ratio at the end: mean, largest; its mean with the most likely actions."""
    runs = [found[job] for job in jobs if job in found]
    if not runs:
        return ["not run"] * 3
    ends = ratios(runs)
    episodes = until([first(rows) for rows in runs], runs[0][-1]["episodes"])
    return episodes, f"{shown(ends)}, {max(ends):.2f}", shown(ratios(runs, argmax=True))


def main(args):
    table = [(n, f"1 to {seeds}", guided(n), n in BUDGETS) for n, seeds in SEEDS.items()]
    table += [(n, f"{UNSEEN[0]} to {UNSEEN[-1]}", guided(n, seeds=UNSEEN), False) for n in (20, 50)]
    tuned = tuning()
    groups = [jobs for _, _, jobs, _ in table] + [baseline(script, n) for script in BASELINES for n in BUDGETS]
    found = sweep("scaling", [job for jobs in [*groups, *tuned.values()] for job in jobs], args)

    columns = "episodes until Best-Fit", "at the end: mean, largest", "argmax"
    columns = [f"{name}: {column}" for name in NAMES.values() for column in columns]
    head("N", "DG-PG's seeds", "after 1 episode: mean, largest", *columns)
    points = []
    for n, seeds, jobs, compared in table:
        runs = [found[job] for job in jobs if job in found]
        begins = [rows[0]["cost_ratio"] for rows in runs]
        points += [(n, first(rows)) for rows in runs]
        cells = [f"{shown(begins)}, {max(begins, default=np.nan):.2f}", *summary(jobs, found)]
        for script in BASELINES:
            cells += summary(baseline(script, n), found) if compared else [""] * 3
        line(n, seeds, *cells)
    if len({n for n, _ in points}) > 1:
        beta, error = slope(*np.array(points).T)
        print(f"DG-PG's episodes until Best-Fit: N^{beta:.3f} ± {error:.3f} (standard error, {len(points)} runs)")

    print()
    head("episodes until Best-Fit; cost ratio at the end", *(f"`{change}`" for change in CHANGES))
    for script in BASELINES:
        for n in TUNED:
            line(f"{NAMES[script]}, N = {n}", *("; ".join(summary(tuned[script, n, c], found)[:2]) for c in CHANGES))
    if found:
        draw(found)


if __name__ == "__main__":
    main(tyro.cli(Args))
