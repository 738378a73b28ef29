"""In the two other systems DG-PG is below the uncoordinated policy after few episodes, at every N.

Costs are in units of the heuristic's, which acts in turn. Writes measured/systems.csv and systems.svg (the state that
DG-PG brings about, beside the reference state), and prints the table.
"""

import importlib

import torch
import tyro
from runs import Args, first, head, line, ratios, save, shown, sweep, trained, until
from yardsticks import learnt

from dgpg import evaluate

SIZES, SEEDS, SYSTEMS = (20, 100, 500), (1, 2, 3), ("traffic", "power")
METHODS = {  # script, options
    "DG-PG": ("-m examples.{}", "--eval-every 1"),
    "α = 0": ("-m examples.{}", "--alpha-start 0 --alpha-end 0 --eval-every 10"),
    "MAPPO, 200 episodes": ("benchmark/variants.py mappo {}", "--episodes 200 --eval-every 40 --learning-rate 1e-2"),
}


def jobs(system, method, n):
    script, options = METHODS[method]
    return [(script.format(system), n, seed, options) for seed in SEEDS]


def environment(system, n, num_envs):
    """The held-out environment of a system, as its own command makes it."""
    program = importlib.import_module(f"examples.{system}.__main__")
    return program.make_env(program.Args(n_agents=n), num_envs, held_out=True)


def states(system, n, policy):
    """x and x̃ [T, M] of a held-out episode, R = 1. policy: of an environment and its observations."""
    model = importlib.import_module(f"examples.{system}.{system}_model")
    env = environment(system, n, 1)
    obs, _ = env.reset(seed=10**12)
    pairs = []
    for _ in range(env.rounds):
        obs, _, _, _, info = env.step(policy(env, obs))
        played = {name: torch.as_tensor(value) for name, value in (info["played"] | env.constants).items()}
        pairs.append((played["x"][0], model.reference_state(**played)[0]))
    return [torch.stack(part).squeeze(-1).numpy() for part in zip(*pairs)]


def draw(n=100):
    """Traffic: each link's flow over x̃, means over an episode. Power: the feeder's load after the last whole night."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 4))
    for system, axes in zip(SYSTEMS, panels):
        decide = learnt(trained(jobs(system, "DG-PG", n)[0]), argmax=False)
        torch.manual_seed(1)
        for name, policy in (
            ("uncoordinated", lambda env, obs: env.uncoordinated()),
            ("DG-PG", lambda env, obs: decide(obs)),
        ):
            x, x_ref = states(system, n, policy)
            if system == "traffic":
                axes.plot(x_ref.mean(0), x.mean(0), "o", ms=4, alpha=0.7, label=name)
            else:
                axes.step(range(24), x[-1, :24], where="post", label=name)
        if system == "traffic":
            axes.axline((0, 0), slope=1, color="black", lw=0.8, label="reference state")
        else:
            axes.step(range(24), x_ref[-1, :24], "k--", where="post", label="reference state")
        axes.set_title(f"{system}, N = {n}")
        axes.legend(fontsize=8)
    panels[0].set(xlabel="x̃ of each link", ylabel="x")
    panels[1].set(xlabel="half hours since 19:00", ylabel="x of the feeder")
    save(figure, "systems")


def main(args):
    found = sweep("systems", [job for s in SYSTEMS for n in SIZES for m in METHODS for job in jobs(s, m, n)], args)
    head("", "N", "random", "uncoordinated", *METHODS, "DG-PG: argmax", "first below the uncoordinated one")
    for system in SYSTEMS:
        for n in SIZES:
            runs = {m: [found[job] for job in jobs(system, m, n) if job in found] for m in METHODS}
            if not runs["DG-PG"]:
                continue
            env = environment(system, n, max(2, min(40, 2_000 // n)))  # the scenarios of the runs
            row = runs["DG-PG"][0][0]
            uncoordinated = evaluate(env, lambda obs: env.uncoordinated()) / row["heuristic"]
            cells = [f"{row['random'] / row['heuristic']:.1f}", f"{uncoordinated:.2f}"]
            cells += [shown(ratios(runs[method])) for method in METHODS]
            below = [first(rows, limit=uncoordinated) for rows in runs["DG-PG"]]
            budget = runs["DG-PG"][0][-1]["episodes"]
            line(system, n, *cells, shown(ratios(runs["DG-PG"], argmax=True)), until(below, budget))
    if not args.only_show:
        draw()


if __name__ == "__main__":
    main(tyro.cli(Args))
