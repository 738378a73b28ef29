"""With all else alike, the episodes that MAPPO needs grow with N, and DG-PG's do not.

Every agent reaches 4 servers, and the target is a return 97 % of the way from random placement to the greedy use of
the model in turn. A run that does not get there enters the fit with its whole budget, so that the slope is then a
lower bound. Writes measured/growth.csv, and prints the table.
"""

import numpy as np
import tyro
from runs import Args, head, line, scenarios, shown, slope, sweep, until
from yardsticks import in_turn, model

from dgpg import evaluate

SIZES, SEEDS, TARGET = (4, 8, 16, 32), (1, 2, 3), 0.97
KINDS = {  # script, episodes at each N (MAPPO's rate does not fall: a longer run begins as a shorter one does), options
    "MAPPO": ("mappo.py", {4: 1200, 8: 1200, 16: 2000, 32: 2400}, "--eval-every 40 --servers-per-agent 4"),
    "DG-PG": ("dgpg.py", dict.fromkeys(SIZES, 10), "--eval-every 1 --servers-per-agent 4"),
}


def jobs(name, n):
    script, episodes, options = KINDS[name]
    return [(script, n, seed, f"--episodes {episodes[n]} {options}") for seed in SEEDS]


def main(args):
    found = sweep("growth", [job for n in SIZES for name in KINDS for job in jobs(name, n)], args)
    head("episodes", *(f"N = {n}" for n in SIZES), "slope")
    targets = {n: [] for n in SIZES}  # as cost ratios
    for name, (_, budget, _) in KINDS.items():
        points, cells = [], []  # N, episodes until the target or NaN
        for n in SIZES:
            env = scenarios(n, servers_per_agent=4)
            high = evaluate(env, in_turn(env, model(env)))
            there = []
            for rows in (found[job] for job in jobs(name, n) if job in found):
                target = rows[0]["random"] + TARGET * (high - rows[0]["random"])
                targets[n].append(target / rows[0]["heuristic"])
                there.append(min((row["episodes"] for row in rows if row["return"] >= target), default=np.nan))
            points += [(n, episodes) for episodes in there]
            cells.append(until(there, budget[n]) if there else "not run")
        if not points:
            continue
        n, episodes = np.array(points).T
        never = np.isnan(episodes)
        episodes = np.where(never, [budget[size] for size in n], episodes)
        beta, error = slope(n, episodes)
        line(name, *cells, f"{'≥ ' if never.any() else ''}{beta:.2f} ± {error:.2f}")
    line("target, as a cost ratio", *map(shown, targets.values()), "")


if __name__ == "__main__":
    main(tyro.cli(Args))
