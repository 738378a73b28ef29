"""What makes DG-PG fast is not that it knows the model but that each agent gets a signal of its own.

The model's knowledge reaches the agents in other ways: as a shared reward −d(x, x̃)/N, alone or added to the
environment's r, or as each agent's own reward −g_i. Cost ratios are of the usual reward on the usual scenarios.
Writes measured/signals.csv, and prints the table. The runs of the unchanged scripts are those of scaling.py.
"""

import tyro
from runs import Args, first, head, line, ratios, shown, sweep, until
from scaling import BATCHES, baseline, guided

SIZES, SEEDS, BUDGET = (5, 20, 50), (1, 2, 3), 1600
LONG = "--eval-every 40"  # the baselines' own batches
SHORT = f"{BATCHES} --learning-rate 1.5e-2 --anneal-lr --ent-coef 0 --episodes 10 --eval-every 1"  # as DG-PG
SIGNALS = {  # what is learnt from, and by what: script with its variant, options
    "−d/N, shared by all: MAPPO": ("benchmark/variants.py mappo shared-model", LONG),
    "r − d/N, shared by all: MAPPO": ("benchmark/variants.py mappo added-model", LONG),
    "−g_i, each its own: IPPO": ("benchmark/variants.py ippo own-model", LONG),
    "−d/N, shared by all: MAPPO, DG-PG's batches": ("benchmark/variants.py mappo shared-model", SHORT),
    "−g_i, each its own: IPPO, DG-PG's batches": ("benchmark/variants.py ippo own-model", SHORT),
    "g_i as a gradient: DG-PG, sampled": ("dgpg.py", "--eval-every 1 --no-own-action-expectation"),
}
UNCHANGED = {
    "r, shared by all: MAPPO": lambda n: baseline("mappo.py", n)[: len(SEEDS)],
    "g_i as a gradient: DG-PG, in expectation": lambda n: guided(n)[: len(SEEDS)],
}


def jobs(name, n):
    """The jobs of a signal at N agents."""
    if name in UNCHANGED:
        return UNCHANGED[name](n)
    script, options = SIGNALS[name]
    options = f"--episodes {BUDGET} {options}" if options == LONG else options
    return [(script, n, seed, options) for seed in SEEDS]


def main(args):
    found = {}
    for file, signals in (("scaling", UNCHANGED), ("signals", SIGNALS)):
        found |= sweep(file, [job for n in SIZES for name in signals for job in jobs(name, n)], args)
    columns = [f"{what}, N = {n}" for n in SIZES for what in ("episodes until Best-Fit", "cost ratio", "argmax")]
    head("learns from", *columns)
    shared, guided_most = UNCHANGED
    for name in (shared, *SIGNALS, guided_most):
        cells = []
        for n in SIZES:
            there = [found[job] for job in jobs(name, n) if job in found]
            episodes = [first(rows) for rows in there]
            cells.append(until(episodes, there[0][-1]["episodes"]) if there else "not run")
            cells += [shown(ratios(there)), shown(ratios(there, argmax=True))]
        line(name, *cells)


if __name__ == "__main__":
    main(tyro.cli(Args))
