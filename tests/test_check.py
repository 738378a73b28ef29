"""examples/check.py, on a system with one mistake and on those without any."""

import runpy
import sys
import types

import numpy as np
import pytest
import torch

import dgpg
from examples.check import check, lowering, put
from examples.power import power_model
from examples.power.power_env import PowerEnv
from tests.helpers import ROOT, SYSTEMS, play


class Recording(PowerEnv):
    """Knows what was played last, and the load before."""

    def step(self, actions):
        self.actions, self.before = actions, self.load
        return super().step(actions)


def played(name, function):
    """A change of one name in what was played, by a function of the environment and all that was played."""

    def changed(env, result):
        info = result[-1]
        return *result[:-1], info | {"played": info["played"] | {name: function(env, info["played"])}}

    return changed


def item(index, function):
    """A change of one of the values that are returned."""
    return lambda _, result: tuple(function(value) if i == index else value for i, value in enumerate(result))


def moves_on(env, actions):
    env.load = env.load + 0.1
    return actions


MOVES = r"agent .: with action . instead of . x\[., .*\] moves by .*, z says by"
MISTAKES = [  # what is changed, how, what the message must say
    ("_observe", item(0, lambda obs: None), r"obs must be a ndarray \[E, N, K, F\] of float32, not NoneType"),
    ("_observe", item(0, lambda obs: obs.astype(float)), "obs .* of float32, not of float64"),
    ("_observe", item(0, lambda obs: obs[:, :, 0]), r"obs .*\[E, N, K, F\].* not of shape \[2, 7, 9\]"),
    ("_observe", item(0, lambda obs: obs.swapaxes(0, 1)), r"\"state\"\] .*\[E, S\].* with E = 7 as in obs, not \[2"),
    ("_observe", item(0, lambda obs: obs * np.float32("nan")), "obs .* all finite"),
    ("_observe", item(0, lambda obs: obs[:, :, :1].repeat(4, 2)), "obs is the same for all actions"),
    ("_observe", item(1, lambda info: None), "info must be a dict, not NoneType"),
    ("step", item(1, lambda reward: reward + 2), r"reward must be below 0 in sum, .*\(heuristic\)"),
    ("step", item(1, lambda reward: reward.astype(int)), "reward .* of float, not of int64"),
    ("step", item(1, lambda reward: reward - np.random.default_rng().random(2)), r"same seed, .* other \['reward'\]"),
    ("step", item(2, lambda terminated: ~terminated), "terminated must be False"),
    ("step", item(3, lambda truncated: ~truncated), "truncated must be False after 1 of 6 rounds"),
    ("step", item(3, lambda truncated: truncated & False), "truncated must be True after 6 of 6 rounds"),
    ("step", item(4, lambda info: {"state": info["state"]}), r'info\["played"\] must be a dict of arrays, not None'),
    ("step", played("x", lambda env, played: None), r'info\["played"\]\["x"\] must be an array of numbers, not None'),
    ("step", played("x", lambda env, played: played["x"][..., 0]), r'"x"\] .*\[E, M, R\].* not of shape \[2, 72\]'),
    ("step", played("x", lambda env, played: 0 * played["x"]), MOVES),
    ("step", played("power", lambda env, played: played["power"][0]), r'"power"\] must be \[E, ...\], not \[7\]'),
    ("step", played("rating", lambda env, played: np.ones((2, 3))), r"\['rating'\] must not be both in env.constants"),
    ("step", played("base", lambda env, played: env.load), "x̃ depends on the actions of its round"),
    ("step", played("base", lambda env, played: env.before), "x̃ depends on the actions of earlier rounds"),
    ("step", played("power", lambda env, played: played["power"] * (1 + env.actions)), "z depends on the actions"),
    ("reset", lambda env, result: PowerEnv.reset(env, 5), "seeds 1 and 1000000000000 give the same scenario"),
    ("heuristic", lambda env, actions: actions.T, r"actions of env.heuristic .* with E = 2 as in obs, not \[7, 2\]"),
    ("heuristic", lambda env, actions: actions + 4, "actions of env.heuristic must be below K = 4"),
    ("heuristic", moves_on, r"after env.heuristic\(\): it must change nothing"),
    ("reference_state", lambda _, x_ref: x_ref[:, 1:], r"x̃ of model.reference_state .* with M = 72, not \[2, 71, 1\]"),
    ("local_influence", lambda _, result: result[0], r"z of model.local_influence must be a Tensor .* not of"),
    ("local_influence", item(1, lambda touched: touched.double()), "touched of .* of int, not of torch.float64"),
    ("local_influence", item(1, lambda touched: touched + 24), "touched must be from 0 to M - 1 = 71"),
    ("local_influence", item(1, lambda touched: (touched + 24) % 72), MOVES),
    ("local_influence", lambda _, zs: (zs[0].repeat(1, 1, 1, 2, 1), zs[1].repeat(1, 1, 1, 2)), "touched repeats"),
    ("__init__", lambda env, _: setattr(env, "constants", None), "env.constants must be a dict of arrays, not None"),
]


@pytest.mark.parametrize("place, change, message", MISTAKES)
def test_mistake_is_found_and_named(place, change, message):
    def changed(right):
        return lambda *args, **given: change(args[0] if args else None, right(*args, **given))

    methods, model = {}, types.SimpleNamespace(**vars(power_model))
    if hasattr(Recording, place):
        methods[place] = changed(getattr(Recording, place))
    else:
        setattr(model, place, changed(getattr(power_model, place)))
    env = type("PowerEnv", (Recording,), methods)(2, 7, 6, n_plans=4)
    with pytest.raises(AssertionError, match=message):
        check(env, model)


@SYSTEMS
def test_systems_without_a_mistake_pass(system, model, capsys):
    env = system(2, 13, 10, 0.8, 4)
    returns = check(env, model)
    assert returns["in turn, lowering g"] > returns["all at once, lowering g"] > returns["random"]
    assert len(capsys.readouterr().out.splitlines()) == 3 + len(returns)
    # environment e draws the scenario of seed + e
    later, _ = env.reset(seed=10**12 + 1)
    obs, _ = env.reset(seed=10**12)
    assert (obs[1] == later[0]).all() and (obs[0] != obs[1]).any()
    expected = sum(env.step(env.heuristic())[1].mean() for _ in range(env.rounds))
    assert returns["heuristic"] == pytest.approx(expected)


@SYSTEMS
def test_nobody_can_lower_the_g_of_the_guidance_after_some_turns(system, model):
    none = np.zeros((2, 13), dtype=int)
    _, given = play(system(2, 13, 10, 0.8, 4), before=0, actions=none)
    x_ref, (z, touched) = model.reference_state(**given), model.local_influence(**given)
    nobody = put(given["x"], z, touched, torch.tensor(none), -1)
    taken = lowering((nobody - x_ref).clone(), z, touched, [slice(i, i + 1) for i in range(13)] * 9, 1.0)
    g = dgpg.guidance(put(nobody, z, touched, torch.tensor(taken), 1), x_ref, z, touched, torch.tensor(taken)).numpy()
    np.testing.assert_allclose(np.take_along_axis(g, taken[..., None], 2)[..., 0], g.min(-1), rtol=0, atol=1e-9)


def test_skeleton_of_the_readme_passes_its_check_and_trains(tmp_path, monkeypatch, capsys):
    readme = (ROOT / "examples/README.md").read_text()
    file = tmp_path / "channels.py"
    file.write_text(readme.split("```python\n")[1].split("```")[0])
    said = []
    for options in ("check", "--n-agents 16 --rounds 60 --episodes 4"):
        monkeypatch.setattr(sys, "argv", [str(file), *options.split()])
        runpy.run_path(str(file), run_name="__main__")
        said.append(capsys.readouterr().out)
    checked, trained = said
    assert "in turn, lowering g" in checked
    # random actions have 3.9, and without the feature `order` 3.0 is the least
    assert float(trained.split("cost_ratio=")[1].split()[0]) < 2
