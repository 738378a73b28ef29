"""The analytical model against autograd, a numerical solver and the environment."""

import numpy as np
import pytest
import torch

from analytic_model import deviation, local_influence, reference_state, system_state
from cloud_env import CloudEnv, random_policy
from dgpg import guided_advantage


def random_system(seed, agents=7, servers=5, reachable=3, batch=4):
    """A random system in double precision: x_before, capacity, reach, demand, actions [N, B]."""
    rng = torch.Generator().manual_seed(seed)
    reach = torch.stack([torch.randperm(servers, generator=rng)[:reachable] for _ in range(agents)])
    return (
        torch.rand(batch, servers, 2, generator=rng, dtype=torch.float64) * 2,
        torch.rand(servers, 2, generator=rng, dtype=torch.float64) * 10 + 1,
        reach,
        torch.rand(batch, agents, 2, generator=rng, dtype=torch.float64) * 4,
        torch.randint(reachable, (agents, batch), generator=rng),
    )


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("crowded", [False, True])
def test_closed_form_guidance_equals_autograd_through_the_state(seed, crowded):
    x_before, capacity, reach, demand, actions = random_system(seed)
    if crowded:  # all agents on server 0, by different actions
        reach = torch.stack([row.roll(i % 3) for i, row in enumerate(torch.tensor([[0, 2, 4]] * 7))])
        actions = torch.stack([(row == 0).nonzero()[0].expand(4) for row in reach])
    z = local_influence(demand, capacity, reach)
    placement = torch.nn.functional.one_hot(actions.T, 3).double().requires_grad_()
    x = system_state(x_before, placement, z, reach)
    x_ref = reference_state(demand.sum(1), capacity)
    (gradient,) = torch.autograd.grad(deviation(x, x_ref).sum(), placement)  # ∂d/∂a_i = ⟨x − x̃, z_i⟩
    probs = torch.full((7, 4, 3), 1 / 3, dtype=torch.float64)
    advantages = torch.zeros(1, 4, dtype=torch.float64)
    mixed, g = guided_advantage(advantages, x.detach(), x_ref, z, reach, actions, probs, 1.0, own_action_baseline=False, norm_adv=False)
    torch.testing.assert_close(g, gradient.gather(-1, actions.T.unsqueeze(-1)).squeeze(-1).T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mixed, -g)


@pytest.mark.parametrize("seed", range(5))
def test_baseline_is_the_guidance_of_every_action_by_autograd(seed):
    """g_i(a') with the other agents' actions as they were: replace the action, recompute the state, differentiate."""
    x_before, capacity, reach, demand, actions = random_system(seed)
    z, x_ref = local_influence(demand, capacity, reach), reference_state(demand.sum(1), capacity)
    probs = torch.rand(7, 4, 3, dtype=torch.float64).softmax(-1)
    zero = torch.zeros(1, 4, dtype=torch.float64)
    x = system_state(x_before, torch.nn.functional.one_hot(actions.T, 3).double(), z, reach)
    _, plain = guided_advantage(zero, x, x_ref, z, reach, actions, probs, 1.0, own_action_baseline=False)
    _, g = guided_advantage(zero, x, x_ref, z, reach, actions, probs, 1.0)
    for agent in range(7):
        mean = 0
        for other in range(3):
            changed = actions.clone()
            changed[agent] = other
            placement = torch.nn.functional.one_hot(changed.T, 3).double().requires_grad_()
            (gradient,) = torch.autograd.grad(deviation(system_state(x_before, placement, z, reach), x_ref).sum(), placement)
            mean += probs[agent, :, other] * gradient[:, agent, other]
        torch.testing.assert_close(plain[agent] - g[agent], mean, rtol=1e-12, atol=1e-12)


def test_state_and_influence_are_the_environment_s():
    env, rng = CloudEnv(3, 11, rounds=12, load=1.5), np.random.default_rng(0)
    env.reset(seed=1)
    capacity, reach = torch.tensor(env.capacity), torch.tensor(env.reach)
    for _ in range(12):
        x_before, actions = torch.tensor(env.x), torch.tensor(rng.integers(8, size=(3, 11)))
        _, _, _, _, info = env.step(actions.numpy())
        z = local_influence(torch.tensor(info["demand"]), capacity, reach)
        torch.testing.assert_close(z, torch.tensor(info["z"]))
        x = system_state(x_before, torch.nn.functional.one_hot(actions, 8).double(), z, reach)
        torch.testing.assert_close(x, torch.tensor(info["x"]))


def test_reference_does_not_change_when_the_policy_does():
    envs = [CloudEnv(2, 6, rounds=15, load=1.0) for _ in range(2)]
    capacity = torch.tensor(envs[0].capacity)
    for env in envs:
        env.reset(seed=4)
    for _ in range(15):
        first, second = envs[0].step(np.zeros((2, 6), int))[-1], envs[1].place(random_policy(envs[1]))[-1]
        references = [reference_state(torch.tensor(info["L"]), capacity) for info in (first, second)]
        assert torch.equal(*references)
    assert (first["x"] != second["x"]).any()


@pytest.mark.parametrize("phi", [lambda x: x**2, lambda x: x**4 + x, torch.exp], ids=["square", "quartic", "exp"])
def test_reference_solves_its_convex_programme(phi):
    """min Σ_n C_n φ(x_n) subject to Σ_n C_n x_n = L, by gradient descent on a parametrisation of the feasible set."""
    rng = torch.Generator().manual_seed(0)
    capacity = torch.rand(6, 2, generator=rng, dtype=torch.float64) * 10 + 1
    load = torch.tensor([20.0, 9.0], dtype=torch.float64)
    free = torch.randn(6, 2, generator=rng, dtype=torch.float64, requires_grad=True)

    def feasible():
        return free + (load - (capacity * free).sum(0)) / capacity.sum(0)

    optimizer = torch.optim.LBFGS([free], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        cost = (capacity * phi(feasible())).sum()
        cost.backward()
        return cost

    optimizer.step(closure)
    torch.testing.assert_close((capacity * feasible()).sum(0), load)
    torch.testing.assert_close(feasible().detach(), reference_state(load, capacity), rtol=1e-5, atol=1e-5)


def test_deviation_by_hand():
    x, x_ref = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[1.0, 1.0], [1.0, 1.0]]])
    assert deviation(x, x_ref).tolist() == [0.5 * (0 + 1 + 4 + 9)]
