"""Variance and noise of one agent's gradient, over N: the shared return's, the guidance's and their mixture's.

Every agent has its own actor. A scenario is held fixed while the actions of all agents are drawn again and again; a
sample of agent i's gradient is Σ_t A_t ∇ log π_i(a_i,t), with A the discounted team return to go, Σ_tasks instead of
the mean over tasks (so that an agent's own effect does not depend on N), less its mean over the other samples; or
A = −g_i,t, the guidance; or the latter's expectation over the own action, −Σ_t Σ_a π_i(a) g_i,t(a) ∇ log π_i(a).
Writes results/variance.csv and variance.svg, and prints the table.
"""

import csv
import time
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from runs import RESULTS, head, read, save, slope
from torch.distributions import Categorical

from analytic_model import local_influence, reference_state
from cloud_env import CloudEnv, Scenario
from dgpg import MLP, gae, guidance

TERMS = ("return", "guidance", "expectation")


@dataclass
class Args:
    sizes: tuple[int, ...] = (12, 24, 48, 96, 192, 384, 768, 1536)  # agents: as many servers of every one of 12 types
    scenarios: int = 3  # scenarios, each held fixed for all its samples
    samples: int = 256  # samples of all agents' actions for one scenario
    rounds: int = 20  # rounds of one sample
    alpha: float = 0.5  # the fixed weight of the guidance in the mixture


def gradients(n_agents, samples, rounds, seed, gamma=0.97):
    """Yields for each sample the three gradients of all agents, [3, N, P] in the order of `TERMS`, for one scenario."""
    torch.manual_seed(seed)
    env = CloudEnv(1, n_agents, rounds)
    env.reset(seed=seed)
    scenario = Scenario(env.demand[:, 0], env.duration[:, 0], env.delta[:, 0])
    env = CloudEnv(samples, n_agents, rounds)
    obs, _ = env.reset(options={"scenarios": [scenario] * samples})
    actor = MLP(n_agents, obs.shape[-1], 32, output_gain=0.01)
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


def measure(n_agents, scenarios, samples, rounds, alpha):
    """Means over agents and scenarios of a gradient's variance V (trace of its covariance), squared signal and so on.

    Returns {"return_variance", "return_noise", …}: noise-to-signal V/‖mean‖² with the mean's own noise V/S taken out,
    NaN where ‖mean‖² is not at least two standard errors (over agents and scenarios) above zero; and of the mixture
    (1−α) return + α guidance "covariance", "mixture_variance" at the given α, "alpha_star" = V_J/(V_J + V_G),
    "alpha_measured" (of a grid of step 0.001 the one with the least variance) and "optimum_variance" there.
    """
    variance, signals, covariance = np.zeros(3), [], 0.0
    for scenario in range(scenarios):
        total = square = cross = 0.0
        for sample in gradients(n_agents, samples, rounds, seed=1000 + scenario):
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
    there = {int(row["n_agents"]) for row in read(path)}
    missing = [n for n in args.sizes if n not in there]
    start = time.time()
    for k, n in enumerate(missing, 1):
        row = measure(n, args.scenarios, args.samples, args.rounds, args.alpha)
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if not file.tell():
                writer.writeheader()
            writer.writerow(row)
        left = (time.time() - start) * sum(missing[k:]) / sum(missing[:k])  # the work grows like N
        print(f"N = {n} done, {k} of {len(missing)}, {time.time() - start:.0f} s; {left / 60:.0f} min left", flush=True)
    rows = [row for row in read(path) if row["n_agents"] in args.sizes]
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    shown = [f"{term}_{kind}" for term in TERMS for kind in ("variance", "noise")]
    shown += ["mixture_variance", "optimum_variance"]
    head("N", *shown, "α*", "α measured")
    for row in rows:
        figures = ["unknown" if np.isnan(row[name]) else f"{row[name]:.3g}" for name in shown]
        figures += [f"{row['alpha_star']:.4f}", f"{row['alpha_measured']:.3f}"]
        print(f"| {row['n_agents']:.0f} | {' | '.join(figures)} |")
    known = {name: ~np.isnan(columns[name]) for name in shown}
    slopes = {name: slope(columns["n_agents"][known[name]], columns[name][known[name]]) for name in shown}
    print("| slope | " + " | ".join(f"{beta:.2f} ± {error:.2f}" for beta, error in slopes.values()) + " | | |")

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6))
    names = ["return_variance", "guidance_variance", "expectation_variance", "mixture_variance", "optimum_variance"]
    for axes, names, title in (
        (panels[0], names, "variance of one agent's gradient"),
        (panels[1], ["return_noise", "guidance_noise"], "squared noise-to-signal ratio"),
    ):
        for name in names:
            label = name.split("_")[0]
            label = {"mixture": f"mixture, α = {args.alpha}", "optimum": "mixture, best α"}.get(label, label)
            axes.loglog(columns["n_agents"], columns[name], "o-", ms=3, label=f"{label}: N^{slopes[name][0]:.2f}")
        axes.set(xlabel="agents N", title=title)
        axes.legend(fontsize=8)
    save(figure, "variance")


if __name__ == "__main__":
    main(tyro.cli(Args))
