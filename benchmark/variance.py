"""The noise of one agent's gradient grows with N in the shared return and does not grow in the guidance.

A scenario is held fixed while the actions of all agents are drawn again and again; a sample of agent i's gradient is
Σ_t A_t ∇ log π(a_i,t), by its own decisions alone, with A the discounted team return to go, Σ_tasks instead of the mean
over tasks (so that an agent's own effect does not depend on N), less its mean over the other samples; or A = −g_i,t,
the guidance; or the latter's expectation over the own action, −Σ_t Σ_a g_i,t(a) ∇ π(a). Three cases: an actor at its
initial weights, one trained by DG-PG, and an initial one with another scenario for every sample. Each for several sets
of scenarios; ± is the standard error over the sets.
Writes measured/variance.csv (a row that is there is not repeated), and prints the table.
"""

from dataclasses import dataclass

import numpy as np
import torch
import tyro
from runs import MEASURED, append, head, line, read, slope, trained
from torch.distributions import Categorical
from torch.func import functional_call, jacrev, vmap

from analytic_model import local_influence, reference_state
from cloud_env import CloudEnv, Scenario
from dgpg import gae, guidance, network

TERMS = ("return", "guidance", "expectation")
CASES = ("untrained", "trained", "redrawn")
TRAINED = ("dgpg.py", 50, 1, "--episodes 3")  # the job whose actor the case "trained" has


@dataclass
class Args:
    sizes: tuple[int, ...] = (12, 48, 192, 768)  # agents: as many servers of every one of 12 types
    sets: int = 4  # sets of scenarios
    scenarios: int = 1  # scenarios of a set, each held fixed for all its samples
    samples: int = 256  # samples of all agents' actions for one scenario
    rounds: int = 20  # rounds of one sample
    alpha: float = 0.5  # the fixed weight of the guidance in the mixture


def gradients(n_agents, samples, rounds, seed, redrawn=False, weights=None, gamma=0.97):
    """Yields for each sample the three gradients of every agent, [N, 3, P] in the order of `TERMS`.

    All samples are of one scenario, or each of its own if it is `redrawn`. weights: the actor's; None: initial ones.
    """
    torch.manual_seed(seed)
    env = CloudEnv(samples, n_agents, rounds)
    obs, _ = env.reset(seed=1000 * seed)
    if not redrawn:
        scenario = Scenario(env.demand[:, 0], env.duration[:, 0], env.delta[:, 0])
        obs, _ = env.reset(options={"scenarios": [scenario] * samples})
    actor = network(obs.shape[-1], 32, output_gain=0.01)
    if weights is not None:
        actor.load_state_dict(weights)
    constants = {name: torch.tensor(value) for name, value in env.constants.items()}
    steps, rewards = [], []
    for _ in range(rounds):
        obs = torch.tensor(obs)
        with torch.no_grad():
            actions = Categorical(logits=actor(obs)).sample()
        next_obs, reward, _, _, info = env.step(actions.numpy())
        played = {name: torch.tensor(value) for name, value in info["played"].items()} | constants
        g = guidance(played["x"], reference_state(**played), *local_influence(**played), actions).float()
        steps.append((obs, actions, g))
        rewards.append(torch.tensor(reward) * n_agents)
        obs = next_obs
    obs, actions, g = (torch.stack(parts, 2) for parts in zip(*steps))  # [S, N, T, …]
    to_go = gae(torch.stack(rewards), torch.zeros(rounds + 1, samples), gamma, 1.0)  # of a critic that knows nothing
    advantage = (to_go - to_go.mean(1, keepdim=True)) * samples / (samples - 1)  # less the mean over the other samples

    def objectives(parameters, obs, actions, g, advantage):
        """Of one agent in one sample, obs [T, K, F]: what the three gradients are of."""
        log_probs = functional_call(actor, parameters, obs).log_softmax(-1)  # [T, K]
        taken = actions.unsqueeze(-1)
        log_prob = log_probs.gather(-1, taken).squeeze(-1)
        g_taken = g.gather(-1, taken).squeeze(-1)
        return torch.stack([advantage @ log_prob, -(g_taken @ log_prob), -(g * log_probs.exp()).sum()])

    parameters = {name: part.detach() for name, part in actor.named_parameters()}
    of_agents = vmap(jacrev(objectives), (None, 0, 0, 0, None))
    for s in range(samples):
        parts = of_agents(parameters, obs[s], actions[s], g[s], advantage[:, s].float())
        yield torch.cat([part.flatten(2) for part in parts.values()], 2)


def measure(n_agents, scenarios, samples, rounds, alpha, first_seed=0, **case):
    """Means over agents and scenarios of a gradient's variance V (trace of its covariance), squared signal and so on.

    Returns {"return_variance", "return_noise", …}: noise-to-signal V/‖mean‖² with the mean's own noise V/S taken out,
    NaN where ‖mean‖² is not at least two standard errors (over agents and scenarios) above zero; and of the mixture
    (1−α) return + α guidance "mixture_variance" at the given α, "alpha_star" = V_J/(V_J + V_G), "alpha_measured" (of a
    grid of step 0.001 the one with the least variance) and "optimum_variance" there.
    """
    variance, covariance, signals = np.zeros(3), 0.0, []
    for scenario in range(scenarios):
        total = square = cross = 0.0
        for sample in gradients(n_agents, samples, rounds, first_seed + scenario, **case):
            sample = sample.double()
            total, square = total + sample, square + sample**2
            cross = cross + sample[:, 0] * sample[:, 1]
        mean, unbiased = total / samples, samples / (samples - 1)
        v = (square / samples - mean**2) * unbiased  # [N, 3, P]
        variance += v.sum(2).mean(0).numpy() / scenarios
        covariance += (cross / samples - mean[:, 0] * mean[:, 1]).sum(1).mean().item() * unbiased / scenarios
        signals.append((mean**2 - v / samples).sum(2).numpy())

    def mixture(a):
        return (1 - a) ** 2 * variance[0] + a**2 * variance[1] + 2 * a * (1 - a) * covariance

    signals = np.concatenate(signals)  # [scenarios N, 3]
    signal, error = signals.mean(0), signals.std(0) / len(signals) ** 0.5
    signal[signal < 2 * error] = np.nan
    grid = np.linspace(0, 1, 1001)
    row = {"n_agents": n_agents}
    for term, v, s in zip(TERMS, variance, signal):
        row |= {f"{term}_variance": v, f"{term}_noise": v / s}
    row |= {"mixture_variance": mixture(alpha), "optimum_variance": mixture(grid).min()}
    return row | {"alpha_star": variance[0] / variance[:2].sum(), "alpha_measured": grid[mixture(grid).argmin()]}


def spread(values):
    """Mean ± standard error over the first axis as text."""
    return f"{np.mean(values):.3g} ± {np.std(values, ddof=1) / len(values) ** 0.5:.1g}"


def main(args):
    torch.set_num_threads(1)
    path = MEASURED / "variance.csv"
    there = {(row["case"], row["n_agents"], row["set"]) for row in read(path)}
    for k in range(args.sets):
        for case in CASES:
            for n in args.sizes if case == "untrained" else args.sizes[:-1]:
                if (case, n, k) in there:
                    continue
                options = {"redrawn": case == "redrawn"}
                if case == "trained":
                    options["weights"] = torch.load(trained(TRAINED), weights_only=True)["actor"]
                seed = 1000 + k * args.scenarios
                row = measure(n, args.scenarios, args.samples, args.rounds, args.alpha, seed, **options)
                append(path, [{"case": case, "set": k} | row])
                print(f"set {k}, {case}, N = {n} measured", flush=True)

    rows = read(path)
    names = [name for name in rows[0] if name not in ("case", "set", "n_agents", "alpha_measured")]
    head("", "N", *names)
    for case in CASES:
        table = {(row["n_agents"], row["set"]): row for row in rows if row["case"] == case}
        sizes, sets = (np.array(sorted({key[k] for key in table})) for k in (0, 1))
        values = {name: np.array([[table[n, k][name] for n in sizes] for k in sets]) for name in names}  # [sets, sizes]
        for column, n in enumerate(sizes):
            line(case, f"{n:.0f}", *(spread(values[name][:, column]) for name in names))
        slopes = {name: [slope(sizes, value)[0] for value in values[name]] for name in names}
        line(case, "slope", *(spread(slopes[name]) for name in names))


if __name__ == "__main__":
    main(tyro.cli(Args))
