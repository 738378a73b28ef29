"""examples/power: the environment, its model against it, the valley filling, and learning."""

import itertools

import numpy as np
import pytest
import torch

import dgpg
from examples.power import power_model as model
from examples.power.__main__ import Args, make_env
from examples.power.power_env import PowerEnv, cost


def random_actions(env):
    return np.random.default_rng(env.t).integers(env.n_plans, size=(env.num_envs, env.n_agents))


def played_round(n_agents, actions=None, seed=3, before=2, load=0.8, plans=4):
    """The environment after `before` random rounds and one with these actions, and that round's tensors."""
    env = PowerEnv(2, n_agents, 10, load, plans)
    env.reset(seed)
    for _ in range(before):
        env.step(random_actions(env))
    _, reward, _, _, info = env.step(random_actions(env) if actions is None else actions)
    tensors = {name: torch.as_tensor(value) for name, value in (info["played"] | env.constants).items()}
    return env, reward, tensors


def test_guidance_is_the_gradient_of_the_deviation_by_enumeration():
    """E[g_i ∇log π_i] over all joint actions is ∇E[d + ½ Σ_i ‖z_i‖²]; plans overlap, agents share the feeder."""
    N, K, logits = 3, 3, torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    probs = logits.requires_grad_().softmax(-1)
    potential, found = 0, 0
    for joint in itertools.product(range(K), repeat=N):
        _, _, played = played_round(N, np.array([joint, joint]), plans=K)
        z, touched = (part[:1] for part in model.local_influence(**played))
        x, x_ref, actions = played["x"][:1], model.reference_state(**played)[:1], torch.tensor([joint])
        own = sum(z[0, i, a].square().sum() for i, a in enumerate(joint))
        weight = torch.stack([probs[i, a] for i, a in enumerate(joint)]).prod()
        potential = potential + weight * 0.5 * ((x - x_ref).square().sum() + own)
        g = dgpg.guidance(x, x_ref, z, touched, actions)[0].gather(1, actions.T)
        found = found + (weight * g * (torch.eye(K)[actions[0]] - probs)).detach()
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
    total = sum(env.step(random_actions(env))[1] for _ in range(4))
    _, reward, _, _, info = env.step(np.zeros((2, 13), int))
    last = info["played"]["x"].reshape(2, -1, 24) / env.weight[:, None]
    np.testing.assert_allclose(total + reward, -cost(last))


def test_cost_by_hand():
    load = np.full((1, 3, 24), 0.5)
    load[0, 0, :12], load[0, 1, 3] = 0.7, 1.2  # Σ(x − x̄)² = 24·0.1²; overload 10·0.2²/2
    np.testing.assert_allclose(cost(load), [0.24 + 0.2])


def test_added_cost_is_the_difference_of_costs():
    """Of every plan against the first; at a load where transformers are overloaded."""
    env, _, _ = played_round(7, load=2.0)
    added = env.added_cost(env.load)
    costs = np.empty_like(added)
    for i, k in itertools.product(range(7), range(4)):
        profile = env.on[:, i, k] * env.power[env.t][:, i, None]
        costs[:, i, k] = cost(env.load + profile[:, None] * (env.member[:, i] / env.rating)[:, None])
    np.testing.assert_allclose(added - added[..., :1], costs - costs[..., :1], atol=1e-12)


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


def test_reference_policies_add_least_to_what_they_see():
    """Uncoordinated: to the load at the round's start. In turn: with all plans before it."""
    env, _, _ = played_round(13, load=2.0)
    at_once, in_turn = env.uncoordinated(), env.heuristic()
    load = env.load.copy()

    def cheapest(load, added):
        return cost((load[:, None] + added).reshape(-1, *load.shape[1:])).reshape(2, -1).argmin(1)

    for i in range(13):
        profiles = env.on[:, i] * env.power[env.t][:, i, None, None]  # [E, K, H]
        added = profiles[:, :, None] * (env.member[:, i] / env.rating)[:, None]  # [E, K, 1 + G, H]
        assert (cheapest(env.load, added) == at_once[:, i]).all()
        assert (cheapest(load, added) == in_turn[:, i]).all()
        load += added[[0, 1], in_turn[:, i]]
    assert (at_once != in_turn).any()


def test_dgpg_learns_what_random_untrained_and_unguided_agents_miss(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = dict(n_agents=12, rounds=10, episodes=6, eval_every=6)
    bar = 2.6
    guided = dgpg.train(Args(**options), make_env, model)
    assert guided["cost_ratio"] < bar < guided["random"] / guided["heuristic"]
    for changed in (dict(episodes=0), dict(alpha_start=0, alpha_end=0)):
        assert dgpg.train(Args(**options | changed), make_env, model)["cost_ratio"] > bar
