"""A run takes seconds: where they go, and how they grow with N.

Runs dgpg.py's `train` at each N on one thread, and prints the table; nothing else should be running.
"""

import contextlib
import os
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from unittest import mock

import torch
import tyro
from runs import head, line

import analytic_model
import dgpg
from cloud_env import CloudEnv

PARTS = {  # what is timed: (owner, name)
    "environment": [(CloudEnv, "reset"), (CloudEnv, "step")],
    "guidance": [(dgpg, "guidance"), (analytic_model, "reference_state"), (analytic_model, "local_influence")],
    "forward": [(torch.nn.Sequential, "forward")],
    "backward": [(torch.Tensor, "backward")],
    "optimizer": [(torch.optim.Adam, "step"), (torch.nn.utils, "clip_grad_norm_")],
    "evaluation": [(dgpg, "evaluate")],
}


@dataclass
class Args:
    sizes: tuple[int, ...] = (5, 50, 200, 1500, 10_000)  # numbers of agents
    episodes: int = 4  # episodes of each run


def timed(function, spent, part):
    """The function, its seconds added to spent[part] where it is not called inside another part."""

    def wrapped(*args, **kwargs):
        if spent["inside"]:
            return function(*args, **kwargs)
        spent["inside"], start = True, time.perf_counter()
        result = function(*args, **kwargs)
        spent["inside"] = False
        spent[part] += time.perf_counter() - start
        return result

    return wrapped


def measure(n_agents, episodes):
    """Seconds of a run's parts; what is in none of them is the "rest"."""
    spent, here = Counter(), os.getcwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None), contextlib.ExitStack() as patches:
        os.chdir(folder)
        for part, functions in PARTS.items():
            for owner, name in functions:
                patches.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name), spent, part)))
        start = time.perf_counter()
        dgpg.train(dgpg.Args(n_agents=n_agents, episodes=episodes))
        spent["all"] = time.perf_counter() - start
        os.chdir(here)
    spent["rest"] = spent["all"] - sum(spent[part] for part in PARTS)
    return spent


def main(args):
    torch.set_num_threads(1)
    measure(5, 1)  # what only the first run in a process pays for
    parts = [part for part in PARTS if part != "evaluation"] + ["rest"]
    head("N", "seconds per episode", "agent-steps/s", *(f"{part} %" for part in parts), "evaluations, s")
    for n in args.sizes:
        spent = measure(n, args.episodes)
        training = spent["all"] - spent["evaluation"]
        shares = [f"{100 * spent[part] / training:.0f}" for part in parts]
        steps = dgpg.Args().rounds * n * args.episodes / training
        line(n, f"{training / args.episodes:.2f}", f"{steps:,.0f}", *shares, f"{spent['evaluation']:.1f}")


if __name__ == "__main__":
    main(tyro.cli(Args))
