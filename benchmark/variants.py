"""The scripts, unchanged, with another reward, another reference state or another system.

`python benchmark/variants.py SCRIPT VARIANT [the script's options]`, as in `… ippo own-model --n-agents 20`.
"""

import importlib
import sys
from dataclasses import make_dataclass
from types import SimpleNamespace

import torch
from runs import ROOT  # noqa: F401  (the path to the scripts)

import analytic_model
import dgpg
from cloud_env import CloudEnv


def distance(x, x_ref, z, touched, actions):
    """d/N = ½‖x − x̃‖²/N [E]."""
    return (x - x_ref).square().sum((-2, -1)) / 2 / actions.shape[1]


def own(x, x_ref, z, touched, actions):
    """g_i of the action taken [E, N]."""
    return dgpg.guidance(x, x_ref, z, touched, actions).take_along_dim(actions.unsqueeze(-1), 2).squeeze(-1)


REWARDS = {  # of the environment's reward r [E] and of what the model says of the round
    "shared-model": lambda r, *model: -distance(*model),
    "added-model": lambda r, *model: r - distance(*model),
    "own-model": lambda r, *model: -own(*model),
}
REFERENCES = {  # the offered load [B, 2] that the reference state is told
    "zero-reference": lambda load: 0 * load,
    "stale-reference": lambda load: load[torch.arange(len(load)) // 5 * 5],  # held for a batch of 5 rounds
    "demand-30-percent-low": lambda load: 0.7 * load,
    "demand-30-percent-high": lambda load: 1.3 * load,
}


class Rewarded(CloudEnv):
    """The cloud that pays another reward, [E] for all agents or [E, N] to each its own."""

    def __init__(self, reward, *args):
        super().__init__(*args)
        self.reward = reward

    def step(self, actions):
        obs, reward, terminated, truncated, info = super().step(actions)
        played = {name: torch.tensor(value) for name, value in (info["played"] | self.constants).items()}
        x_ref = analytic_model.reference_state(**played)
        z, touched = analytic_model.local_influence(**played)
        paid = self.reward(torch.tensor(reward), played["x"], x_ref, z, touched, torch.tensor(actions))
        return obs, paid.numpy(), terminated, truncated, info


def rewarded(variant):
    """make_env of a cloud that pays another reward in training; held out, the usual one."""

    def make_env(args, num_envs, held_out=False):
        if held_out:
            return dgpg.cloud(args, num_envs, held_out)
        of_args = args.n_agents, args.rounds, args.load, args.servers_per_agent, args.trace
        return Rewarded(REWARDS[variant], num_envs, *of_args)

    return make_env


def altered(variant):
    """The analytical model with another reference state."""

    def reference_state(offered_load, **rest):
        return analytic_model.reference_state(REFERENCES[variant](offered_load), **rest)

    return SimpleNamespace(reference_state=reference_state, local_influence=analytic_model.local_influence)


if __name__ == "__main__":
    script, variant = importlib.import_module(sys.argv.pop(1)), sys.argv.pop(1)
    if variant in REWARDS:
        script.main(script.Args, rewarded(variant))
    elif variant in REFERENCES:
        script.main(script.Args, dgpg.cloud, altered(variant))
    else:
        system = importlib.import_module(f"examples.{variant}.__main__")
        options = make_dataclass("Args", [], bases=(script.Args, system.Args))  # the script's defaults
        script.main(options, system.make_env)
