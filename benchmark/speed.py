"""Where the time goes: environment, policy, update, evaluation; the update beside its matrix products; other MAPPOs.

One thread, so that CPU seconds, which other work on the machine disturbs less, are those of the clock. Prints medians.
"""

import contextlib
import os
import tempfile
import time
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
import tyro
from runs import head, run

import dgpg
from cloud_env import CloudEnv, best_fit, random_policy

FEATURES = CloudEnv(1, 1).reset()[0].shape[-1]
PEERS = {5: 9_600, 50: 38_000, 200: 41_000}  # agent-steps per second of the fastest, BenchMARL, by N


@dataclass
class Args:
    sizes: tuple[int, ...] = (5, 50, 200, 1500, 10_000)  # numbers of agents
    episodes: int = 6  # training episodes to time, the first left out
    peers: bool = True  # also time mappo.py in other libraries' setting


def phases(n_agents, episodes, products_alone):
    """CPU seconds per episode of DG-PG: rollout, advantages and guidance, update (with logging and the checkpoint).

    Told apart by the calls that begin them: the training environment's first `step` of a batch, `gae`, and `deviation`
    after the guidance. There `products_alone()` is timed, too, next to the update because the machine's speed changes:
    "products", and their "ratio".
    """
    marks, bare = [], []
    step, gae, deviation = CloudEnv.step, dgpg.gae, dgpg.deviation

    def marked_step(self, actions):
        if not marks or marks[-1][0] == "update":
            marks.append(("rollout", time.process_time()))
        return step(self, actions)

    def marked_gae(*args):
        marks.append(("advantages", time.process_time()))
        return gae(*args)

    def marked_deviation(x, x_ref):
        marks.append(("products", time.process_time()))
        bare.append(products_alone())
        marks.append(("update", time.process_time()))
        return deviation(x, x_ref)

    hooks = {"gae": marked_gae, "deviation": marked_deviation, "evaluate": lambda env, policy: 0.0}
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        os.chdir(folder)
        with mock.patch.object(CloudEnv, "step", marked_step), mock.patch.multiple(dgpg, **hooks):
            dgpg.train(dgpg.Args(n_agents=n_agents, episodes=episodes + 1, eval_every=episodes + 1))
        os.chdir(here)
    spent = {}
    for (name, begin), (_, end) in zip(marks, marks[1:]):  # the last update has no end: it holds the final evaluation
        spent.setdefault(name, []).append(end - begin)
    spent["products"] = bare[:-1]
    spent["ratio"] = np.divide(spent["update"], spent["products"])
    updates = dgpg.Args().rounds // dgpg.Args().num_steps  # of an episode
    medians = {name: np.median(seconds[updates:]) for name, seconds in spent.items()}
    return {name: value if name == "ratio" else updates * value for name, value in medians.items()}


def products(rows, sizes, repeats):
    """Seconds of an MLP's matrix products alone, forward and backward: x W; then W's and, but for the first, x's."""
    pairs = [(torch.randn(rows, a), torch.randn(a, b), torch.randn(rows, b)) for a, b in zip(sizes, sizes[1:])]
    times = []
    for _ in range(repeats):
        start = time.process_time()
        for layer, (x, weight, gradient) in enumerate(pairs):
            x @ weight
            x.T @ gradient
            if layer:
                gradient @ weight.T
        times.append(time.process_time() - start)
    return np.median(times)


def main(args):
    torch.set_num_threads(1)
    # whole commands first: the memory of a process counts that of the one that started it
    if args.peers:
        print(
            "mappo.py, 10 environments x 100 rounds an update, 10 epochs x 1 minibatch of all states, "
            "two hidden layers of 64, one thread"
        )
        columns = ("rows scored for a decision", "agents in a minibatch", "agent-steps/s", "peak MiB", "fastest peer")
        head("N", *columns, "ratio")
        setting = "--num-envs 10 --hidden 64 --num-minibatches 1 --update-epochs 10 --episodes 40 --eval-every 40"
        for n, speed in PEERS.items():
            for rows in (8, 1):  # servers in reach; the peers' actors score an observation at once
                for agents in sorted({n, min(n, dgpg.Args().minibatch_agents)}):
                    row = run("mappo.py", n, 1, f"{setting} --minibatch-agents {agents} --servers-per-agent {rows}")[-1]
                    ratio = float(row["sps"]) / speed
                    figures = f"{row['sps']} | {row['peak_mib']} | BenchMARL {speed:,} | {ratio:.2f}"
                    print(f"| {n} | {min(rows, n)} | {agents} | {figures} |", flush=True)
        print()

    columns = ("evaluation, s", "Best-Fit on them, s", "default run, s", "peak MiB")
    head("N", *columns, "evaluation and Best-Fit / run")
    for n in (size for size in args.sizes if size <= 1000):  # above, evaluation takes longer than training
        row = run("dgpg.py", n, 1, "")[-1]
        env = CloudEnv(max(4, min(40, 4_000 // n)), n)
        actor = dgpg.MLP(1, FEATURES, dgpg.Args().hidden, 0.01)

        @torch.inference_mode()
        def policy(env, obs):
            logits = actor(torch.tensor(obs).transpose(0, 1))
            return torch.distributions.Categorical(logits=logits).sample().T.numpy()

        seconds = []
        for chosen in (policy, best_fit):
            start = time.process_time()
            dgpg.evaluate(env, chosen)
            seconds.append(time.process_time() - start)
        share = sum(seconds) / float(row["seconds"])
        figures = f"{seconds[0]:.1f} | {seconds[1]:.1f} | {row['seconds']} | {row['peak_mib']} | {share:.0%}"
        print(f"| {n} | {figures} |", flush=True)

    print()
    speeds = ("environment only, agent-steps/s", "rollout", "training")
    head("N", *speeds, "s per episode: rollout", "advantages", "update", "products alone", "update / products")
    for n in args.sizes:
        env, times = CloudEnv(1, n), []
        for _ in range(args.episodes):
            start = time.process_time()
            dgpg.evaluate(env, random_policy)
            times.append(time.process_time() - start)
        options = dgpg.Args()
        states = options.num_steps // options.num_minibatches
        rows = min(n, options.minibatch_agents) * states * env.reach.shape[1]

        def products_alone():
            minibatch = products(rows, [FEATURES, options.hidden, options.hidden, 1], repeats=10)
            minibatch += products(states, [5 * n + 2, 64, 64, 1], repeats=10)
            return minibatch * options.update_epochs * options.num_minibatches

        steps, spent = n * env.rounds, phases(n, args.episodes, products_alone)
        training = spent["rollout"] + spent["advantages"] + spent["update"]
        speeds = [f"{steps / seconds:,.0f}" for seconds in (np.median(times), spent["rollout"], training)]
        seconds = [f"{spent[name]:.3f}" for name in ("rollout", "advantages", "update", "products")]
        print(f"| {n} | {' | '.join(speeds + seconds)} | {spent['ratio']:.2f} |", flush=True)

    if args.peers:
        print("\nagent-steps/s that the actor's matrix products alone would allow in the other libraries' setting")
        head("N", "8 rows for a decision", "1")
        for n in PEERS:
            seconds = [10 * products(n * 1000 * min(rows, n), [FEATURES, 64, 64, 1], repeats=3) for rows in (8, 1)]
            print(f"| {n} | " + " | ".join(f"{n * 1000 / s:,.0f}" for s in seconds) + " |")


if __name__ == "__main__":
    main(tyro.cli(Args))
