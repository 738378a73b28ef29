"""Variance and noise of one agent's gradient, over N: the shared return's, the guidance's and their mixture's.

Every agent has its own actor. A scenario is held fixed while the actions of all agents are drawn again and again; a
sample of agent i's gradient is Σ_t A_t ∇ log π_i(a_i,t), with A the discounted team return to go, Σ_tasks instead of
the mean over tasks (so that an agent's own effect does not depend on N), less its mean over the other samples; or
A = −g_i,t, the guidance; or the latter's expectation over the own action, −Σ_t Σ_a π_i(a) g_i,t(a) ∇ log π_i(a).
Three cases: actors at their initial weights, actors trained by DG-PG, and initial ones with another scenario for every
sample. Each for several sets of scenarios; ± is the standard error over the sets.
Writes results/variance.csv (a row that is there is not repeated) and variance.svg, and prints the tables.
"""

import contextlib
import csv
import os
import tempfile
import time
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from runs import RESULTS, head, read, save, slope
from torch.distributions import Categorical

from analytic_model import local_influence, reference_state
import dgpg
from cloud_env import CloudEnv, Scenario
from dgpg import MLP, gae, guidance

TERMS = ("return", "guidance", "expectation")
CASES = ("untrained", "trained", "redrawn")


@dataclass
class Args:
    sizes: tuple[int, ...] = (12, 48, 192, 768)  # agents: as many servers of every one of 12 types
    sets: int = 4  # sets of scenarios
    scenarios: int = 1  # scenarios of a set, each held fixed for all its samples
    samples: int = 256  # samples of all agents' actions for one scenario
    rounds: int = 20  # rounds of one sample
    alpha: float = 0.5  # the fixed weight of the guidance in the mixture


def trained():
    """The weights of a shared actor after three episodes of DG-PG at N = 50."""
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        os.chdir(folder)
        dgpg.train(dgpg.Args(episodes=3))
        (run,) = os.listdir("runs")
        weights = torch.load(f"runs/{run}/checkpoint.pt", weights_only=True)["actor"]
        os.chdir(here)
    return weights


def gradients(n_agents, samples, rounds, seed, redrawn=False, weights=None, gamma=0.97):
    """Yields for each sample the three gradients of all agents, [3, N, P] in the order of `TERMS`.

    All samples are of one scenario, or each of its own if it is `redrawn`. weights: what every agent's actor begins
    with, a state dict of one actor; None for initial ones.
    """
    torch.manual_seed(seed)
    env = CloudEnv(samples, n_agents, rounds)
    obs, _ = env.reset(seed=1000 * seed)
    if not redrawn:
        scenario = Scenario(env.demand[:, 0], env.duration[:, 0], env.delta[:, 0])
        obs, _ = env.reset(options={"scenarios": [scenario] * samples})
    actor = MLP(n_agents, obs.shape[-1], 32, output_gain=0.01)
    if weights is not None:
        actor.load_state_dict({name: part.expand(n_agents, *part.shape[1:]) for name, part in weights.items()})
    constants = {name: torch.tensor(value) for name, value in env.constants.items()}
    steps = []
    for _ in range(rounds):
        rows = torch.as_tensor(obs).transpose(0, 1)  # [N, S, K, F]
        with torch.no_grad():
            dist = Categorical(logits=actor(rows))
        actions = dist.sample()
        obs, reward, _, _, info = env.step(actions.T.numpy())
        played = {name: torch.tensor(value) for name, value in info["played"].items()} | constants
        model = played["x"], reference_state(**played), *local_influence(**played)
        g_of_action = guidance(*model, actions)  # [N, S, K]
        steps.append((rows, actions, torch.tensor(reward) * n_agents, g_of_action.float()))
    rows, actions, rewards, g = (torch.stack(parts) for parts in zip(*steps))  # [T, N, S, …], rewards [T, S]
    to_go = gae(rewards, rewards.new_zeros(rounds + 1, samples), gamma, 1.0)  # of a critic that knows nothing
    advantage = (to_go - to_go.mean(1, keepdim=True)) * samples / (samples - 1)  # less the mean over the other samples
    for s in range(samples):
        dist = Categorical(logits=actor(rows[:, :, s].transpose(0, 1)))
        log_prob, of_action = dist.log_prob(actions[:, :, s].T), g[:, :, s].transpose(0, 1)  # [N, T] and [N, T, K]
        of_taken = of_action.gather(-1, actions[:, :, s].T.unsqueeze(-1)).squeeze(-1)
        losses = [(advantage[:, s] * log_prob).sum(), -(of_taken * log_prob).sum(), -(of_action * dist.probs).sum()]
        grads = [torch.autograd.grad(loss, list(actor.parameters()), retain_graph=True) for loss in losses]
        yield torch.stack([torch.cat([part.flatten(1) for part in grad], 1) for grad in grads])


def measure(n_agents, scenarios, samples, rounds, alpha, first_seed=0, **case):
    """Means over agents and scenarios of a gradient's variance V (trace of its covariance), squared signal and so on.

    Returns {"return_variance", "return_noise", …}: noise-to-signal V/‖mean‖² with the mean's own noise V/S taken out,
    NaN where ‖mean‖² is not at least two standard errors (over agents and scenarios) above zero; and of the mixture
    (1−α) return + α guidance "covariance", "mixture_variance" at the given α, "alpha_star" = V_J/(V_J + V_G),
    "alpha_measured" (of a grid of step 0.001 the one with the least variance) and "optimum_variance" there.
    """
    variance, signals, covariance = np.zeros(3), [], 0.0
    for scenario in range(scenarios):
        total = square = cross = 0.0
        for sample in gradients(n_agents, samples, rounds, first_seed + scenario, **case):
            sample = sample.double()
            total, square = total + sample, square + sample**2
            cross = cross + sample[0] * sample[1]
        mean = total / samples
        v = (square / samples - mean**2) * samples / (samples - 1)  # [3, N, P]
        variance += v.sum(2).mean(1).numpy() / scenarios
        signals.append((mean**2 - v / samples).sum(2).numpy())
        covariance += ((cross / samples - mean[0] * mean[1]) * samples / (samples - 1)).sum(1).mean().item() / scenarios

    def mixture(a):
        return (1 - a) ** 2 * variance[0] + a**2 * variance[1] + 2 * a * (1 - a) * covariance

    signals = np.concatenate(signals, 1)  # [3, scenarios N]
    signal, error = signals.mean(1), signals.std(1) / signals.shape[1] ** 0.5
    signal[signal < 2 * error] = np.nan
    grid = np.linspace(0, 1, 1001)
    row = {"n_agents": n_agents}
    for term, v, s in zip(TERMS, variance, signal):
        row |= {f"{term}_variance": v, f"{term}_noise": v / s}
    row |= {"covariance": covariance, "mixture_variance": mixture(alpha)}
    row["alpha_star"] = variance[0] / (variance[0] + variance[1])
    return row | {"alpha_measured": grid[mixture(grid).argmin()], "optimum_variance": mixture(grid).min()}


def main(args):
    import matplotlib.pyplot as plt

    torch.set_num_threads(1)
    path = RESULTS / "variance.csv"
    there = {(row["case"], row["n_agents"], row["set"]) for row in read(path)}
    jobs = [
        (case, n, k) for k in range(args.sets) for case in CASES for n in args.sizes[: None if case == CASES[0] else -1]
    ]
    missing = [job for job in jobs if job not in there]
    start, weights = time.time(), trained() if missing else None
    for done, (case, n, k) in enumerate(missing, 1):
        options = dict(redrawn=case == "redrawn", weights=weights if case == "trained" else None)
        first_seed = 1000 + k * args.scenarios
        row = measure(n, args.scenarios, args.samples, args.rounds, args.alpha, first_seed, **options)
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, {"case": case, "set": k} | row)
            if not file.tell():
                writer.writeheader()
            writer.writerow({"case": case, "set": k} | row)
        work = [sum(n for _, n, _ in part) for part in (missing[:done], missing[done:])]  # it grows like N
        left = (time.time() - start) * work[1] / work[0] / 60
        print(f"{case}, N = {n}, set {k}: {done} of {len(missing)}; {left:.0f} min left", flush=True)

    names = [f"{term}_{kind}" for term in TERMS for kind in ("variance", "noise")]
    names += ["mixture_variance", "optimum_variance", "alpha_star"]
    rows = read(path)
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6))
    for case in CASES:
        table = {(row["n_agents"], row["set"]): row for row in rows if row["case"] == case}
        sizes, sets = (np.array(sorted({key[k] for key in table})) for k in (0, 1))
        values = {name: np.array([[table[n, k][name] for n in sizes] for k in sets]) for name in names}  # [sets, sizes]
        print()
        head(f"{case}: N", *names)
        for column, n in enumerate(sizes):
            cells = [f"{values[name][:, column].mean():.4g} ± {error(values[name][:, column]):.2g}" for name in names]
            print(f"| {n:.0f} | {' | '.join(cells)} |")
        slopes = {name: [slope(sizes, value)[0] for value in values[name]] for name in names}
        slopes = {name: f"{np.mean(value):.2f} ± {error(np.array(value)):.2f}" for name, value in slopes.items()}
        print(f"| slope | {' | '.join(slopes.values())} |")
        if case == "untrained":
            for axes, shown, title in (
                (panels[0], [name for name in names if "variance" in name], "variance of one agent's gradient"),
                (panels[1], [name for name in names if "noise" in name], "squared noise-to-signal ratio"),
            ):
                for name in shown:
                    label = name.split("_")[0]
                    label = {"mixture": f"mixture, α = {args.alpha}", "optimum": "mixture, best α"}.get(label, label)
                    label = f"{label}: N^{slopes[name].split()[0]}"
                    axes.errorbar(sizes, values[name].mean(0), error(values[name]), fmt="o-", ms=3, label=label)
                axes.set(xlabel="agents N", title=title, xscale="log", yscale="log")
                axes.legend(fontsize=8)
    save(figure, "variance")


def error(values):
    """Standard error of the mean over the first axis."""
    return values.std(0, ddof=1) / len(values) ** 0.5


if __name__ == "__main__":
    main(tyro.cli(Args))
