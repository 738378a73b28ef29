"""examples/power: the environment, its model against it, the valley filling, and learning."""

import itertools

import numpy as np
import pytest
import torch

import dgpg
from tests.conftest import load_example

env_module, model = load_example("power", "cloud_env"), load_example("power", "analytic_model")


def played_round(n_agents, actions=None, seed=3, before=2, load=0.8, plans=4):
    """The environment after `before` random rounds and one with these actions, and that round's tensors."""
    env = env_module.CloudEnv(2, n_agents, 10, load, plans)
    env.reset(seed)
    for _ in range(before):
        env.step(env_module.random_policy(env, None))
    _, reward, _, _, info = env.step(env_module.random_policy(env, None) if actions is None else actions)
    tensors = {name: torch.as_tensor(value) for name, value in (info["played"] | env.constants).items()}
    return env, reward, tensors


def test_local_influence_is_the_difference_that_an_action_makes():
    base = np.random.default_rng(0).integers(4, size=(2, 7))
    _, _, played = played_round(7, base)
    z, touched = model.local_influence(**played)
    full = torch.zeros(2, 7, 4, played["x"].shape[1], dtype=torch.float64).scatter_add(3, touched, z.squeeze(-1))
    for i, k in itertools.product(range(7), range(4)):
        other = base.copy()
        other[:, i] = k
        difference = played_round(7, other)[2]["x"] - played["x"]
        expected = full[:, i, k] - full[[0, 1], i, base[:, i]]
        torch.testing.assert_close(difference.squeeze(-1), expected, rtol=0, atol=1e-12)


def test_guidance_is_the_gradient_of_the_deviation_by_enumeration():
    """E[g_i ∇log π_i] over all joint actions is ∇E[d + ½ Σ_i ‖z_i‖²]; plans overlap, agents share the feeder."""
    N, K, logits = 3, 3, torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    probs = logits.requires_grad_().softmax(-1)
    potential, found = 0, 0
    for joint in itertools.product(range(K), repeat=N):
        _, _, played = played_round(N, np.array([joint, joint]), plans=K)
        z, touched = (part[:1] for part in model.local_influence(**played))
        x, x_ref, actions = played["x"][:1], model.reference_state(**played)[:1], torch.tensor(joint).unsqueeze(1)
        own = sum(z[0, i, a].square().sum() for i, a in enumerate(joint))
        weight = torch.stack([probs[i, a] for i, a in enumerate(joint)]).prod()
        potential = potential + weight * (model.deviation(x, x_ref)[0] + 0.5 * own)
        g = dgpg.guidance(x, x_ref, z, touched, actions).squeeze(1).gather(1, actions)
        found = found + (weight * g * (torch.eye(K)[actions[:, 0]] - probs)).detach()
    (expected,) = torch.autograd.grad(potential, logits)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert expected.abs().max() > 1e-4


def test_the_valley_is_filled_like_bisection_says_and_as_the_kkt_conditions_ask():
    rng = torch.Generator().manual_seed(0)
    base, energy = torch.rand(5, 3, 24, generator=rng).double(), 10 * torch.rand(5, 3, generator=rng).double()
    energy[0, 0] = 0
    x = model.reference_state(base, energy, weight=torch.ones(3)).view(5, 3, 24)
    low, high = torch.zeros(5, 3, 1).double(), torch.full((5, 3, 1), 20.0).double()
    for _ in range(60):
        middle = (low + high) / 2
        above = (middle - base).clamp(0).sum(-1, keepdim=True) > energy.unsqueeze(-1)
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    torch.testing.assert_close(x, torch.maximum(base, low), rtol=0, atol=1e-9)
    torch.testing.assert_close((x - base).sum(-1), energy, rtol=0, atol=1e-9)  # all energy, and nowhere taken away
    filled = x > base + 1e-9
    level = torch.where(filled, x, -torch.inf).amax(-1, keepdim=True)
    assert ((level - x).abs() < 1e-9)[filled].all() and (x >= level - 1e-9).all()  # one level, dry slots above it


def test_the_valley_by_hand():
    # 3 over slots 0 and 1 at 1 and 2: level (3 + 1 + 2)/2 = 3, below slot 2; the second row weighs double
    x = model.reference_state(
        torch.tensor([[[5.0, 2, 1], [0, 0, 9]]]), torch.tensor([[3.0, 1]]), torch.tensor([1.0, 2])
    )
    torch.testing.assert_close(x.flatten(), torch.tensor([5.0, 3, 3, 1, 1, 18]))


@pytest.mark.parametrize("before", [0, 3, 4, 5])
def test_energy_is_conserved_and_a_night_pays_its_cost(before):
    """The load and the valley hold the same energy in every row, also after a night has ended; rewards add up to C."""
    env, _, played = played_round(13, before=before)
    both = played["x"], model.reference_state(**played)
    load, reference = (v.view(2, -1, 24).numpy() / env.weight[:, None] for v in both)
    np.testing.assert_allclose(load.sum(-1), reference.sum(-1), rtol=0, atol=1e-9)
    np.testing.assert_allclose(load[:, 0], (load[:, 1:] * env.rating[1:, None]).sum(1) / env.rating[0])
    env.reset(0)
    total = sum(env.step(env_module.random_policy(env, None))[1] for _ in range(4))
    _, reward, _, _, info = env.step(np.zeros((2, 13), int))
    last = info["played"]["x"].reshape(2, -1, 24) / env.weight[:, None]
    np.testing.assert_allclose(total + reward, -env_module.cost(last))


def test_cost_by_hand():
    load = np.full((1, 3, 24), 0.5)
    load[0, 0, :12], load[0, 1, 3] = 0.7, 1.2  # Σ(x − x̄)² = 24·0.1²; overload 10·0.2²/2
    np.testing.assert_allclose(env_module.cost(load), [0.24 + 0.2])


def test_added_cost_is_the_difference_of_costs():
    """Of every plan against the first; at a load where transformers are overloaded."""
    env, _, _ = played_round(7, load=2.0)
    added = env_module.added_cost(env, env.load, np.arange(7))
    costs = np.empty_like(added)
    for i, k in itertools.product(range(7), range(4)):
        profile = env.on[:, i, k] * env.power[env.t][:, i, None]
        costs[:, i, k] = env_module.cost(env.load + profile[:, None] * (env.member[:, i] / env.rating)[:, None])
    np.testing.assert_allclose(added - added[..., :1], costs - costs[..., :1], atol=1e-12)


def test_scenarios_depend_on_the_seed_alone():
    one, two = (played_round(7, np.full((2, 7), k)) for k in (0, 3))
    assert not torch.equal(one[2]["x"], two[2]["x"])
    for name in ("base", "energy", "power", "start", "length"):
        assert torch.equal(one[2][name], two[2][name])
    shifted = played_round(7, seed=4)[2]
    assert torch.equal(shifted["power"][0], one[2]["power"][1])


def test_observation_by_hand():
    """Of one agent's plans, slot by slot; the critic sees all loads; agents of a group see other distances."""
    env, _, _ = played_round(13, before=1)
    obs, info = env._observe()
    e, i, k, t = 1, 8, 2, env.t
    length, row = env.length[t, e, i], 1 + env.transformer[i]
    slots = slice(env.start[e, i, k], env.start[e, i, k] + length)
    loads = env.load[e, [0, row], slots]
    size = (env.transformer == env.transformer[i]).sum()
    place = (env.transformer[:i] == env.transformer[i]).sum()
    power = 10 * env.power[t, e, i] / env.rating[row]
    expected = [*loads.mean(1), *loads.max(1), power, length / 8, 2 / 3, 2 / 3 - (place + 0.5) / size, t / 5]
    np.testing.assert_allclose(obs[e, i, k], expected, rtol=1e-5)
    parts = env.load[e].ravel(), 10 * env.power[t, e] / env.rating[1 + env.transformer], env.length[t, e] / 8, [t / 5]
    np.testing.assert_allclose(info["state"][e], np.concatenate(parts), rtol=1e-5)


def test_the_feeder_counts_as_much_as_all_transformers():
    env, _, played = played_round(25)
    x = played["x"].view(2, -1, 24).clone()
    x[:, 0] += 0.1 * env.weight[0]
    on_feeder = model.deviation(x.view(2, -1, 1), played["x"])
    x[:, 0] -= 0.1 * env.weight[0]
    x[:, 1:] += 0.1
    torch.testing.assert_close(model.deviation(x.view(2, -1, 1), played["x"]), on_feeder)


def test_reference_policies_add_least_to_what_they_see():
    """Uncoordinated: to the load at the round's start. In turn: with all plans before it."""
    env, _, _ = played_round(13, load=2.0)
    at_once, in_turn = env_module.uncoordinated(env, None), env_module.best_fit(env, None)
    load = env.load.copy()
    for i in range(13):
        profiles = env.on[:, i] * env.power[env.t][:, i, None, None]  # [E, K, H]
        added = profiles[:, :, None] * (env.member[:, i] / env.rating)[:, None]  # [E, K, 1 + G, H]
        assert (
            env_module.cost((env.load[:, None] + added).reshape(-1, *load.shape[1:])).reshape(2, -1).argmin(1)
            == at_once[:, i]
        ).all()
        assert (
            env_module.cost((load[:, None] + added).reshape(-1, *load.shape[1:])).reshape(2, -1).argmin(1)
            == in_turn[:, i]
        ).all()
        load += added[[0, 1], in_turn[:, i]]
    assert (at_once != in_turn).any()


def test_nights_and_transformers_have_base_loads_of_their_own():
    base, power, length = env_module.draw_scenario(np.random.default_rng(0), 20, 18, np.array([3.0, 1, 1, 1]))
    assert base.shape == (5, 4, 24) and power.shape == length.shape == (21, 18)
    lowest = base[:, 1:].argmin(-1)  # slot of the valley
    assert len(set(lowest.mean(1))) > 2 and (lowest.max(1) > lowest.min(1)).any()
    np.testing.assert_allclose(base[:, 0], base[:, 1:].mean(1))


@pytest.mark.parametrize("actions", [[[0, 0]], [[0, 4, 0]], [[-1, 0, 0]], [[0.0, 1, 0]]])
def test_wrong_actions_are_refused(actions):
    env = env_module.CloudEnv(1, 3, servers_per_agent=4)
    env.reset(0)
    with pytest.raises(ValueError, match="actions must be integers"):
        env.step(np.array(actions))


@pytest.mark.parametrize("option", ["load", "rounds", "trace"])
def test_bad_options_are_named(option):
    given = dict(num_envs=1, n_agents=2) | {option: "file.csv" if option == "trace" else 0}
    with pytest.raises(env_module.InputError, match=option):
        env_module.CloudEnv(**given)


def test_dgpg_learns_what_random_untrained_and_unguided_agents_miss(train_on):
    options = dict(n_agents=12, rounds=10, eval_scenarios=8, episodes=6)
    guided = train_on(env_module, model, **options)
    untrained = train_on(env_module, model, **options | dict(episodes=0))
    unguided = train_on(env_module, model, **options, alpha_start=0, alpha_end=0)
    bar = 2.6
    assert guided["cost_ratio"] < bar < min(untrained["cost_ratio"], unguided["cost_ratio"])
    assert guided["random_return"] / guided["best_fit_return"] > bar
