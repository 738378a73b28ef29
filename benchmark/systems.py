"""In the two other systems DG-PG is below the uncoordinated policy after few episodes, at every N.

Costs are in units of the heuristic's, which acts in turn. Writes measured/systems.csv, and prints the table.
"""

import importlib

import tyro
from runs import Args, first, head, line, num_scenarios, ratios, shown, sweep, until

from dgpg import evaluate

SIZES, SEEDS, SYSTEMS = (20, 100), (1, 2, 3), ("traffic", "power")
METHODS = {  # script, options
    "DG-PG": ("-m examples.{}", "--eval-every 1"),
    "α = 0": ("-m examples.{}", "--alpha-start 0 --alpha-end 0 --eval-every 10"),
    "MAPPO, 200 episodes": ("benchmark/variants.py mappo {}", "--episodes 200 --eval-every 40 --learning-rate 1e-2"),
}


def jobs(system, method, n):
    script, options = METHODS[method]
    return [(script.format(system), n, seed, options) for seed in SEEDS]


def environment(system, n):
    """The environment that the runs on a system are evaluated on."""
    program = importlib.import_module(f"examples.{system}.__main__")
    return program.make_env(program.Args(n_agents=n), num_scenarios(n), held_out=True)


def main(args):
    found = sweep("systems", [job for s in SYSTEMS for n in SIZES for m in METHODS for job in jobs(s, m, n)], args)
    head("", "N", "random", "uncoordinated", *METHODS, "DG-PG: argmax", "first below the uncoordinated one")
    for system in SYSTEMS:
        for n in SIZES:
            runs = {m: [found[job] for job in jobs(system, m, n) if job in found] for m in METHODS}
            if not runs["DG-PG"]:
                continue
            env = environment(system, n)
            row = runs["DG-PG"][0][0]
            uncoordinated = evaluate(env, lambda obs: env.uncoordinated()) / row["heuristic"]
            cells = [f"{row['random'] / row['heuristic']:.1f}", f"{uncoordinated:.2f}"]
            cells += [", ".join(f"{ratio:.2f}" for ratio in ratios(runs[method])) for method in METHODS]
            below = [first(rows, limit=uncoordinated) for rows in runs["DG-PG"]]
            budget = runs["DG-PG"][0][-1]["episodes"]
            line(system, n, *cells, shown(ratios(runs["DG-PG"], argmax=True)), until(below, budget))


if __name__ == "__main__":
    main(tyro.cli(Args))
