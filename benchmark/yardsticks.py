"""Why learn, if the model is there? Policies that use the model, or nothing, beside DG-PG, on the same scenarios.

Prints the table: returns at N = 5 … 1500, and at N = 50 with more servers in reach. DG-PG's runs come from
results/scaling.csv and results/ablations.csv.
"""

import numpy as np
import tyro
from runs import RESULTS, head, interval, read

from cloud_env import CloudEnv, best_fit, random_policy
from dgpg import evaluate

SIZES, REACHES = (5, 20, 50, 200, 1500), (16, 32, 50)


def load(x, z, x_ref):
    """Utilisation of the scarcer resource after the action [E, ..., K]."""
    return (x + z).max(-1)


def model(x, z, x_ref):
    """g_i(a) = ⟨x + z_i(a) − x̃, z_i(a)⟩ [E, ..., K]."""
    return ((x + z - x_ref) * z).sum(-1)


def greedy(score, in_turn):
    """The policy of least score: agents act in turn and see the placements before their own, or all at once."""

    def policy(env, obs):
        x, every = env.x.copy(), np.arange(env.num_envs)[:, None]
        x_ref = (env.offered_load[env.t] / env.capacity.sum(0))[:, None, None]
        actions = np.empty((env.num_envs, env.n_agents), dtype=int)
        for agents in env.turns if in_turn else [np.arange(env.n_agents)]:
            near = env.reach[agents]  # [G, K]
            z = env.demand[env.t][:, agents, None] / env.capacity[near]  # [E, G, K, 2]
            actions[:, agents] = choice = score(x[:, near], z, x_ref).argmin(-1)
            if in_turn:  # no two agents of a turn share a server
                x[every, near[np.arange(len(agents)), choice]] += np.take_along_axis(z, choice[..., None, None], 2)[
                    :, :, 0
                ]
        return actions

    return policy


POLICIES = {
    "random": random_policy,
    "Best-Fit, in turn": best_fit,
    "least loaded, in turn": greedy(load, in_turn=True),
    "greedy on the model, in turn": greedy(model, in_turn=True),
    "greedy on the model, all at once": greedy(model, in_turn=False),
}


def main():
    rows = [row for name in ("scaling", "ablations") for row in read(RESULTS / f"{name}.csv")]
    settings = [(n, 8, "--eval-every 1") for n in SIZES]
    settings += [(50, reach, f"--eval-every 1 --servers-per-agent {reach}") for reach in REACHES]
    returns = {}
    for n, reach, _ in settings:
        env = CloudEnv(max(2, min(40, 2_000 // n)), n, servers_per_agent=reach)  # the scenarios of the runs
        for name, policy in POLICIES.items():
            returns.setdefault(name, []).append(f"{evaluate(env, policy):.2f}")
        print(f"N = {n}, K = {reach} measured", flush=True)
    for name in ("return", "argmax"):
        for n, _, options in settings:
            last = {r["seed"]: r[name] for r in rows if (r["n_agents"], r["options"]) == (n, options)}
            mean, half = interval(list(last.values())) if last else (np.nan, np.nan)
            key = "DG-PG, 10 episodes, all at once" + (", argmax" if name == "argmax" else "")
            returns.setdefault(key, []).append(f"{mean:.2f} ± {half:.2f}")
    head("mean return", *(f"N = {n}" + (f", K = {reach}" if reach > 8 else "") for n, reach, _ in settings))
    for name, cells in returns.items():
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    tyro.cli(main)
