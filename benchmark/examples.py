"""The two other systems: DG-PG, unguided and MAPPO beside the reference policies, at N = 20, 100 and 500.

Writes results/examples.csv (a run that is there is not repeated), traffic.svg and power.svg, and prints the table.
"""

import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from runs import RESULTS, ROOT, Args, curves, head, listed, read, save, sweep
from torch.distributions import Categorical

from dgpg import MLP, evaluate

SIZES, SEEDS = (20, 100, 500), (1, 2, 3)
METHODS = {  # script, options
    "DG-PG": ("dgpg.py", "--eval-scenarios 8 --eval-every 1"),
    "α = 0": ("dgpg.py", "--eval-scenarios 8 --alpha-start 0 --alpha-end 0"),
    "MAPPO, 200 episodes": ("mappo.py", "--eval-scenarios 8 --episodes 200 --learning-rate 1e-2"),
}


def load(system, name):
    """A module of the example, under a name of its own: the project has one of the same name."""
    spec = importlib.util.spec_from_file_location(f"{system}_{name}", ROOT / "examples" / system / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def played(system, n_agents=100, seed=1):
    """A held-out episode of the uncoordinated policy and of DG-PG, trained here: {name: every round's tensors}."""
    module, model = load(system, "cloud_env"), load(system, "analytic_model")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-P", str(ROOT / "dgpg.py"), "--n-agents", str(n_agents), "--seed", str(seed)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "examples" / system), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=folder, env=environment, check=True)
        (path,) = pathlib.Path(folder).glob("runs/*/checkpoint.pt")
        weights = torch.load(path, weights_only=True)["actor"]
    env = module.CloudEnv(1, n_agents, held_out=True)
    actor = MLP(1, env.reset(seed=0)[0].shape[-1], 32, 0.01)
    actor.load_state_dict(weights)
    torch.manual_seed(seed)

    @torch.inference_mode()
    def sampled(env, obs):
        return Categorical(logits=actor(torch.tensor(obs).transpose(0, 1))).sample().T.numpy()

    episodes = {}
    for name, policy in (("uncoordinated", module.uncoordinated), ("DG-PG", sampled)):
        (obs, _), episodes[name] = env.reset(seed=10**12), []
        for _ in range(env.rounds):
            obs, _, _, _, info = env.step(policy(env, obs))
            tensors = {key: torch.as_tensor(value) for key, value in (info["played"] | env.constants).items()}
            episodes[name].append({**tensors, "x_ref": model.reference_state(**tensors)})
    return episodes


def draw_traffic():
    figure, axes = plt.subplots(figsize=(4.5, 4))
    for name, rounds in played("traffic").items():
        flow, optimum = (sum(r[key].squeeze() * r["unit"] for r in rounds) / len(rounds) for key in ("x", "x_ref"))
        axes.plot(optimum / 1000, flow / 1000, "o", ms=4, alpha=0.7, label=name)
    axes.axline((0, 0), slope=1, color="black", lw=0.8)
    axes.set(xlabel="system optimum, 1000 vehicles/h", ylabel="flow on the link, 1000 vehicles/h")
    axes.set_title("76 links, mean of an episode, N = 100", fontsize=10)
    axes.legend()
    save(figure, "traffic")


def draw_power(last=49):
    """The last round of a night."""
    figure, axes = plt.subplots(figsize=(4.5, 4))
    hours = 19 + np.arange(24) / 2
    for name, rounds in played("power").items():
        r = rounds[last]
        axes.step(hours, r["x"][0, :24, 0] / r["weight"][0], where="post", label=name)
    axes.step(hours, r["x_ref"][0, :24, 0] / r["weight"][0], "k--", where="post", label="water level")
    axes.fill_between(hours, r["base"][0, 0], step="post", color="0.85", label="base load")
    axes.set(xlabel="hour", ylabel="load of the feeder per rating")
    axes.set_xticks(range(19, 32, 3), [f"{hour % 24}:00" for hour in range(19, 32, 3)])
    axes.set_title("a night's cars, N = 100", fontsize=10)
    axes.legend(fontsize=8)
    save(figure, "power")


def main(args):
    jobs = [
        (f"examples/{system}/{script}", n, seed, options)
        for system in ("traffic", "power")
        for n in SIZES
        for script, options in METHODS.values()
        for seed in SEEDS
    ]
    rows = read(RESULTS / "examples.csv") if args.only_show else sweep("examples", jobs, args.workers)
    found = curves(rows)
    for system in ("traffic", "power"):
        module = load(system, "cloud_env")
        print(f"\n{system}: cost in units of the sequential greedy one's")
        head("N", "random", "uncoordinated", *METHODS, "DG-PG: first below the uncoordinated one", "argmax")
        for n in SIZES:
            of_n = [row for row in rows if row["script"].startswith(f"examples/{system}/") and row["n_agents"] == n]
            env = module.CloudEnv(8, n, held_out=True)  # the scenarios of the runs
            uncoordinated = evaluate(env, module.uncoordinated) / of_n[0]["best_fit"]
            cells = [f"{of_n[0]['random'] / of_n[0]['best_fit']:.2f}", f"{uncoordinated:.2f}"]
            for script, options in METHODS.values():
                seeds = found[f"examples/{system}/{script}", n, options]
                cells.append(", ".join(f"{ratios[-1]:.3g}" for _, (_, ratios) in sorted(seeds.items())))
            seeds = found[f"examples/{system}/dgpg.py", n, METHODS["DG-PG"][1]]
            below = [ratios < uncoordinated for _, ratios in seeds.values()]
            cells.append(listed([k.argmax() + 1 if k.any() else np.nan for k in below]))
            argmax = {
                row["seed"]: row["argmax"] / row["best_fit"]
                for row in of_n
                if row["options"] == METHODS["DG-PG"][1] and "dgpg" in row["script"]
            }
            print(
                f"| {n} | {' | '.join(cells)} | {', '.join(f'{ratio:.3g}' for _, ratio in sorted(argmax.items()))} |",
                flush=True,
            )
    if not args.only_show:  # they train a run each
        draw_traffic()
        draw_power()


if __name__ == "__main__":
    main(tyro.cli(Args))
