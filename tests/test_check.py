"""examples/check.py, on a system with one mistake and on those without any; and what both examples have in common."""

import pathlib
import runpy
import sys
import types

import numpy as np
import pytest
import torch

import analytic_model
import dgpg
import ippo
import mappo
from cloud_env import InputError
from examples.check import check, lowering
from examples.power import __main__ as power
from examples.power import power_model
from examples.power.power_env import PowerEnv
from examples.traffic import __main__ as traffic
from examples.traffic import traffic_model
from examples.traffic.traffic_env import TrafficEnv


def played(**change):
    """A change of `step` in what was played: of each name, by a function of the environment and all that was played."""

    def changed(env, result):
        info = result[-1]
        given = info["played"] | {name: function(env, info["played"]) for name, function in change.items()}
        return *result[:-1], info | {"played": given}

    return changed


def item(index, function):
    """A change of one of the values that are returned."""
    return lambda _, result: tuple(function(value) if i == index else value for i, value in enumerate(result))


def noise(env, result):
    """A reward with what is not drawn from the seed."""
    return result[0], result[1] - np.random.default_rng().random(len(result[1])), *result[2:]


def draws_at_reset(env, result):
    env.rng = np.random.default_rng(0)
    return result


def powers_from_a_generator_that_the_heuristic_uses(env, actions):
    env.power[env.t + 1 :] *= 1 + env.rng.random()
    return actions


def moves_on(env, actions):
    env.load = env.load + 0.1
    return actions


def as_load(env, played):
    """The load of all plans so far where the load without cars belongs."""
    return (played["x"][..., 0] / np.repeat(env.weight, 24)).reshape(played["base"].shape)


def earlier_load(env, played):
    """The same without the last round's plans."""
    chosen = env.on_before[np.arange(2)[:, None], np.arange(7), env.actions] * played["power"][..., None]
    return as_load(env, played) - env.member @ chosen / env.rating[:, None]


def repeated(result):
    z, touched = result
    return torch.cat([z / 2, z / 2], -2), torch.cat([touched, touched], -1)


MISTAKES = [  # what is changed, how, what the message must say
    ("_observe", item(0, lambda obs: None), r"obs must be a ndarray \[E, N, K, F\] of float32, not NoneType"),
    ("_observe", item(0, lambda obs: obs.astype(float)), "obs .* of float32, not of float64"),
    ("_observe", item(0, lambda obs: obs[:, :, 0]), r"obs .*\[E, N, K, F\].* not of shape \[2, 7, 9\]"),
    ("_observe", item(0, lambda obs: obs.swapaxes(0, 1)), r"\"state\"\] .*\[E, S\].* with E = 7 as in obs, not \[2"),
    ("_observe", item(0, lambda obs: obs * np.float32("nan")), "obs .* all finite"),
    ("_observe", item(0, lambda obs: obs[:, :, :1].repeat(4, 2)), "obs is the same for all actions"),
    ("_observe", item(1, lambda info: None), "info must be a dict, not NoneType"),
    ("_observe", item(1, lambda info: {"played": info["played"]}), r'info\["state"\] .* not NoneType'),
    ("_observe", item(1, lambda info: info | {"state": info["state"].astype(float)}), r'"state"\] .* not of float64'),
    ("_observe", item(1, lambda info: info | {"state": info["state"][0]}), r'"state"\] .*\[E, S\].* not of shape'),
    ("step", item(1, lambda reward: reward.mean()), r"reward must be a ndarray \[E\] of float, not float64"),
    ("step", item(1, lambda reward: reward[:, None]), r"reward .* not of shape \[2, 1\]"),
    ("step", item(1, lambda reward: np.full(7, -1.0)), r"reward .* with E = 2 as in obs, not \[7\]"),
    ("step", item(1, lambda reward: -reward), "reward must be below 0 in sum"),
    ("step", item(1, lambda reward: reward + 2), r"reward must be below 0 in sum, .*\(heuristic\)"),
    ("step", item(1, lambda reward: reward.astype(int)), "reward .* of float, not of int64"),
    ("step", noise, "same seed, same actions, other \\['reward'\\]: .* from the seed"),
    ("step", item(2, lambda terminated: False), r"terminated must be a ndarray \[E\] of bool, not bool"),
    ("step", item(2, lambda terminated: ~terminated), "terminated must be False"),
    ("step", item(3, lambda truncated: ~truncated), "truncated must be False after 1 of 6 rounds"),
    ("step", item(3, lambda truncated: truncated & False), "truncated must be True after 6 of 6 rounds"),
    ("step", item(4, lambda info: {"state": info["state"]}), r'info\["played"\] must be a dict of arrays, not None'),
    ("step", played(x=lambda env, played: None), r'info\["played"\]\["x"\] must be an array of numbers, not None'),
    ("step", played(x=lambda env, played: played["x"][..., 0]), r'"x"\] .*\[E, M, R\].* not of shape \[2, 72\]'),
    (
        "step",
        played(x=lambda env, played: 0 * played["x"]),
        r"agent .: with action . instead of . x\[., .*\] moves by -?0, z says by -?0.[0-9]*[1-9]",
    ),
    ("step", played(power=lambda env, played: None), r'info\["played"\]\["power"\] must be an array of numbers'),
    ("step", played(power=lambda env, played: played["power"][0]), r'"power"\] must be \[E, ...\], not \[7\]'),
    ("step", played(rating=lambda env, played: np.ones((2, 3))), r"\['rating'\] must not be both in env.constants and"),
    ("step", played(base=as_load), "x̃ depends on the actions of its round"),
    ("step", played(base=earlier_load), "x̃ depends on the actions of earlier rounds"),
    ("step", played(power=lambda env, played: played["power"] * (1 + env.actions)), "z depends on the actions"),
    ("reset", lambda env, result: PowerEnv.reset(env, 5), "seeds 1 and 1000000000000 give the same scenario"),
    (
        "reset",
        lambda env, result: PowerEnv.reset(env, np.random.default_rng().integers(10**9)),
        r"same seed, same actions, other \['obs'",
    ),
    ("heuristic", lambda env, actions: None, r"actions of env.heuristic must be a ndarray \[E, N\] .* not NoneType"),
    ("heuristic", lambda env, actions: actions.T, r"actions of env.heuristic .* with E = 2 as in obs, not \[7, 2\]"),
    ("heuristic", lambda env, actions: actions + 4, "actions of env.heuristic must be below K = 4"),
    ("heuristic", lambda env, actions: actions / 1, "actions of env.heuristic .* of int, not of float64"),
    ("heuristic", moves_on, r"after env.heuristic\(\): it must change nothing"),
    ("heuristic", powers_from_a_generator_that_the_heuristic_uses, r"after env.heuristic\(\): .* nor draw"),
    ("reference_state", lambda _, x_ref: None, r"x̃ of model.reference_state .*\[B, M, R\].* not NoneType"),
    ("reference_state", lambda _, x_ref: x_ref[..., 0], r"x̃ of model.reference_state .* not of shape \[2, 72\]"),
    ("reference_state", lambda _, x_ref: x_ref[:, 1:], r"x̃ of model.reference_state .* with M = 72, not \[2, 71, 1\]"),
    ("reference_state", lambda _, x_ref: x_ref / 0, "x̃ of model.reference_state .* all finite"),
    ("local_influence", lambda _, result: result[0], r"z of model.local_influence must be a Tensor .* not of"),
    ("local_influence", item(0, lambda z: z[..., 0]), r"z of model.local_influence .*\[B, N, K, J, R\].* not of shape"),
    ("local_influence", item(0, lambda z: 2 * z), "moves by .*, z says by .*: z, touched or the moment of x"),
    ("local_influence", item(0, lambda z: -z), "moves by .*, z says by"),
    ("local_influence", item(0, lambda z: 0 * z), "moves by .*, z says by 0: z"),
    ("local_influence", item(1, lambda touched: touched.double()), "touched of .* of int, not of torch.float64"),
    ("local_influence", item(1, lambda touched: touched + 24), "touched must be from 0 to M - 1 = 71"),
    ("local_influence", item(1, lambda touched: (touched + 24) % 72), "moves by .*, z says by"),
    ("local_influence", lambda _, result: repeated(result), "touched repeats a component in a row where z is not 0"),
    ("rounds", lambda env: setattr(env, "constants", None), "env.constants must be a dict of arrays, not NoneType"),
    ("rounds", lambda env: env.constants.update(rating=None), r'env.constants\["rating"\] must be an array of numbers'),
]


class Recording(PowerEnv):
    """Knows what was played last, and has a generator of its own."""

    def reset(self, seed):
        self.rng = np.random.default_rng(seed)
        return super().reset(seed)

    def step(self, actions):
        self.actions, self.on_before = actions, self.on
        return super().step(actions)


@pytest.mark.parametrize("place, change, message", MISTAKES)
def test_mistake_is_found_and_named(place, change, message):
    functions = {}
    if hasattr(PowerEnv, place):
        right = getattr(Recording, place)
        functions[place] = lambda env, *args, **named: change(env, right(env, *args, **named))
    env = type("PowerEnv", (Recording,), functions)(2, 7, 6, n_plans=4)
    model = types.SimpleNamespace(**vars(power_model))
    if hasattr(model, place):
        said = getattr(power_model, place)
        setattr(model, place, lambda **given: change(None, said(**given)))
    if place == "rounds":
        change(env)
    with pytest.raises(AssertionError, match=message):
        check(env, model)


SYSTEMS = {
    "cloud": (dgpg.cloud(dgpg.Args(n_agents=8, rounds=10), 2), analytic_model),
    "traffic": (TrafficEnv(2, 9, 10, n_routes=4), traffic_model),
    "power": (PowerEnv(2, 13, 10), power_model),
}


@pytest.mark.parametrize("env, model", SYSTEMS.values(), ids=SYSTEMS)
def test_systems_without_a_mistake_pass(env, model, capsys):
    returns = check(env, model)
    assert returns["in turn, lowering g"] > returns["all at once, lowering g"] > returns["random"]
    assert len(capsys.readouterr().out.splitlines()) == 3 + len(returns)
    env.reset(seed=10**12)
    expected = sum(env.step(env.heuristic())[1].mean() for _ in range(env.rounds))
    assert returns["heuristic"] == pytest.approx(expected)


@pytest.mark.parametrize("env, model", SYSTEMS.values(), ids=SYSTEMS)
def test_agents_lower_the_g_of_the_guidance(env, model):
    """In turn nobody can lower g any more; at once each takes the lowest as if it were alone."""
    obs, _ = env.reset(seed=0)
    played = env.step(np.zeros(obs.shape[:2], dtype=int))[-1]["played"]
    given = {name: torch.tensor(value) for name, value in (played | env.constants).items()}
    x = given.pop("x")
    x_ref = model.reference_state(**given)
    z, touched = model.local_influence(**given)

    def put(actions):
        own = torch.zeros_like(x)
        for e, i in np.ndindex(*actions.shape):
            own[e].index_add_(0, touched[e, i, actions[e, i]], z[e, i, actions[e, i]])
        return own

    nobody = x - put(np.zeros(obs.shape[:2], dtype=int))
    N = obs.shape[1]
    in_turn = lowering((nobody - x_ref).clone(), z, touched, [slice(i, i + 1) for i in range(N)] * 9, 1.0)
    g = dgpg.guidance(nobody + put(in_turn), x_ref, z, touched, torch.tensor(in_turn))
    taken = g.take_along_dim(torch.tensor(in_turn).unsqueeze(-1), 2).squeeze(-1)
    torch.testing.assert_close(taken, g.amin(-1), rtol=0, atol=1e-9)
    at_once = lowering((nobody - x_ref).clone(), z, touched, [slice(None)], 1.0)
    assert (at_once != in_turn).any()
    for i in range(N):
        one = slice(i, i + 1)
        first = torch.zeros(len(obs), 1, dtype=int)
        alone = nobody.clone()
        for e in range(len(obs)):
            alone[e].index_add_(0, touched[e, i, 0], z[e, i, 0])
        g = dgpg.guidance(alone, x_ref, z[:, one], touched[:, one], first)[:, 0]
        chosen = g[torch.arange(len(obs)), torch.tensor(at_once[:, i])]
        torch.testing.assert_close(chosen, g.amin(-1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("system", [traffic, power])
def test_bad_options_and_actions_are_refused(system):
    for options in (dict(load=0), dict(rounds=0), dict(n_agents=0), dict(servers_per_agent=0), dict(trace="file.csv")):
        with pytest.raises(InputError, match=next(iter(options))):
            system.make_env(system.Args(**options), 1)
    env = system.make_env(system.Args(n_agents=3, servers_per_agent=4), 1)
    env.reset(seed=0)
    for actions in ([[0, 0]], [[0, 4, 0]], [[-1, 0, 0]]):
        with pytest.raises(ValueError, match="actions must be integers"):
            env.step(np.array(actions))


@pytest.mark.parametrize("script", [mappo, ippo])
@pytest.mark.parametrize("system", [traffic, power])
def test_baselines_run_on_the_examples(system, script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = script.train(script.Args(n_agents=5, rounds=10, episodes=1, num_envs=1), system.make_env)
    assert result["return"] < 0


def test_skeleton_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    readme = (pathlib.Path(dgpg.__file__).parent / "examples/README.md").read_text()
    file = tmp_path / "channels.py"
    file.write_text(readme.split("```python\n")[1].split("```")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(file), "check"])
    runpy.run_path(str(file), run_name="__main__")
    assert "in turn, lowering g" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [str(file), *"--n-agents 6 --rounds 5 --episodes 1".split()])
    runpy.run_path(str(file), run_name="__main__")
    output = capsys.readouterr().out
    assert "in turn" not in output and "episodes=1 heuristic=" in output
    assert len(readme.splitlines()) <= 80
