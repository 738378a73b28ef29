"""With the same information DG-PG's actor beats Best-Fit, least loaded and the greedy use of the model.

Two blocks of policies: in turn, where an agent sees the placements of its own round that were made before; and at
once, where it sees what it is shown at the round's start. In the cloud at several N and K, and on traces: two
artificial ones and those given, `python benchmark/yardsticks.py --files FILE …`.
Writes measured/yardsticks.csv, and prints two tables. The actors are those of scaling.py and ablations.py,
trained again where runs/benchmark/ does not have them.
"""

import tempfile
from dataclasses import dataclass

import numpy as np
import runs
import torch
import tyro
from runs import MEASURED, append, by_content, head, line, read, scenarios, shown, trained
from scaling import BUDGETS, baseline, guided

from cloud_env import load_trace
from dgpg import evaluate, network

SEEDS = 3
SETTINGS = [(5, 8), (20, 8), (50, 8), (200, 8), (1500, 8), (50, 16), (50, 32), (50, 50)]  # N, K
TRACE_SIZES = (20, 50, 100)


@dataclass
class Args(runs.Args):
    files: tuple[str, ...] = ()  # CSV files of real workload


def in_turn(env, decide):
    """A policy of agents that act one after another, each seeing the placements made before its own in this round.

    decide: the policy of agents that act at once, observations [E, G, K, F] to actions [E, G].
    """

    def policy(obs):
        obs, x = obs.copy(), env.x.copy()
        actions = np.empty(obs.shape[:2], dtype=np.int64)
        for agents in env.turns:  # no two agents of a turn reach the same server
            obs[:, agents, :, 0:2] = np.log1p(x[:, env.reach[agents]])
            choice = decide(obs[:, agents])
            server = env.reach[agents, choice]  # [E, G]
            x[np.arange(len(x))[:, None], server] += env.demand[env.t][:, agents] / env.capacity[server]
            actions[:, agents] = choice
        return actions

    return policy


def seen(obs):
    """Utilisation x, what the task adds to it z, and capacity [E, G, K, 2] of the servers that an agent reaches."""
    obs = obs.astype(float)
    return np.expm1(obs[..., 0:2]), obs[..., 2:4], np.exp(obs[..., 4:6])


def best_fit(env):
    """Of the servers that the task fits on, the one with the least capacity left (see `CloudEnv.heuristic`)."""

    def decide(obs):
        x, z, capacity = seen(obs)
        left = (1 - x - z) * capacity
        summed = (left @ (1 / env.capacity.mean(0))).round(4)  # obs is float32: what is equal stays equal
        tightest = np.where((left >= 0).all(-1), summed, np.inf)
        return np.where(np.isfinite(tightest).any(-1), tightest.argmin(-1), (x + z).max(-1).argmin(-1))

    return decide


def least_loaded(env):
    """The server whose scarcer resource is then the least used."""

    def decide(obs):
        x, z, _ = seen(obs)
        return (x + z).max(-1).argmin(-1)

    return decide


def model(env):
    """The action of the least g_i(a) = ⟨x + z_i(a) − x̃, z_i(a)⟩."""

    def decide(obs):
        x, z, _ = seen(obs)
        x_ref = (env.offered_load[env.t] / env.capacity.sum(0))[:, None, None]
        return ((x + z - x_ref) * z).sum(-1).argmin(-1)

    return decide


def learnt(file, argmax):
    """The actor of a run; its most likely actions, or sampled ones."""
    weights = torch.load(file, weights_only=True)["actor"]
    actor = network(weights["0.weight"].shape[1], len(weights["0.weight"]), 0.01)
    actor.load_state_dict(weights)

    @torch.inference_mode()
    def decide(obs):
        logits = actor(torch.tensor(obs))
        chosen = logits if argmax else torch.distributions.Categorical(logits=logits)
        return (chosen.argmax(-1) if argmax else chosen.sample()).numpy()

    return decide


RULES = {"Best-Fit": best_fit, "least loaded": least_loaded, "model": model}


def artificial(file, duration):
    """Write a trace of Poisson arrivals, one a second, of these durations [rows] in s, vCPU and GiB equally likely."""
    rng, rows = np.random.default_rng(1), len(duration)
    columns = rng.exponential(1, rows).cumsum(), duration, rng.choice([1, 2, 4], rows), rng.choice([2, 4, 8], rows)
    title = "arrival_s,duration_s,cpu,memory_gib"
    np.savetxt(file, np.stack(columns, 1), fmt="%.3f", delimiter=",", header=title, comments="")


def measure(case, n, options, actors, env):
    """Rows of the returns of every policy, in turn and at once, that measured/yardsticks.csv does not have.

    case: the name of the workload. options: what beside N a job of this setting says. actors: {name: jobs}.
    """
    path = MEASURED / "yardsticks.csv"
    common = dict(case=case, n_agents=n, options=options)
    there = {tuple(row.values())[:-1] for row in read(path)}
    wanted = [(name, 0, None) for name in RULES]
    wanted += [(name + how, job[2], job) for name, jobs in actors.items() for how in ("", ", argmax") for job in jobs]
    for name, seed, job in wanted:
        for turns in ("in turn", "at once"):
            row = common | dict(policy=name, seed=seed, acts=turns)
            if tuple(row.values()) in there:
                continue
            decide = RULES[name](env) if job is None else learnt(trained(job), name.endswith("argmax"))
            policies = {"in turn": in_turn(env, decide), "at once": decide}
            if name == "Best-Fit":
                policies["in turn"] = lambda obs: env.heuristic()  # the yardstick itself, to the last bit
            torch.manual_seed(seed)  # as in the scripts
            append(path, [row | {"return": evaluate(env, policies[turns])}])


def table(settings):
    """Print the two blocks, a column for each of the settings {title: (case, N, options)}."""
    cells = {(turns, title): {} for turns in ("in turn", "at once") for title in settings}  # {policy: returns [seeds]}
    for row in read(MEASURED / "yardsticks.csv"):
        for title, setting in settings.items():
            if (row["case"], row["n_agents"], row["options"]) == setting:
                cells[row["acts"], title].setdefault(row["policy"], []).append(row["return"])
    best = {title: cells["in turn", title].get("Best-Fit", [np.nan])[0] for title in settings}
    head("cost in units of Best-Fit's in turn", *settings)
    line("return of Best-Fit in turn", *(f"{value:.2f}" for value in best.values()))
    for turns in ("in turn", "at once"):
        for policy in dict.fromkeys(policy for title in settings for policy in cells[turns, title]):
            values = [np.array(cells[turns, title].get(policy, [])) / best[title] for title in settings]
            line(f"{policy}, {turns}", *map(shown, values))


def main(args):
    columns = {}
    for n, reach in SETTINGS:
        changed = "" if reach == 8 else f"--servers-per-agent {reach}"
        actors = {"DG-PG": guided(n, changed)[:SEEDS]}
        if reach == 8 and n in BUDGETS:
            actors["MAPPO"] = baseline("mappo.py", n)[:SEEDS]
        if not args.only_show:
            measure("cloud", n, changed, actors, scenarios(n, servers_per_agent=reach))
        columns[f"N = {n}" + (f", K = {reach}" if changed else "")] = "cloud", n, changed
    table(columns)

    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        artificial(f"{folder}/exponential.csv", rng.exponential(600, 100_000))
        artificial(f"{folder}/pareto.csv", (10 * (1 + rng.pareto(0.9, 100_000))).clip(max=1e5))
        columns = {}
        files = {name: f"{folder}/{name}.csv" for name in ("exponential", "pareto")} | {
            file: file for file in args.files
        }
        for name, file in files.items():
            for n in TRACE_SIZES:
                rounds = min(100, (len(load_trace(file)) // (5 * n) - 1) // 10 * 10)  # as many as it has room for
                if rounds < 30:
                    continue
                options = f"--trace {by_content(file)} --rounds {rounds}"
                jobs = [("dgpg.py", n, seed, f"--eval-every 10 {options}") for seed in range(1, SEEDS + 1)]
                more = [(*job[:3], f"--num-envs 4 --episodes 40 --eval-every 40 {options}") for job in jobs]
                if not args.only_show:
                    env = scenarios(n, rounds=rounds, trace=file)
                    measure("trace", n, options, {"DG-PG": jobs, "DG-PG, 4 environments": more}, env)
                columns[f"{name}, N = {n}"] = "trace", n, options
        print()
        table(columns)


if __name__ == "__main__":
    main(tyro.cli(Args))
