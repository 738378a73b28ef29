"""The analytical model against autograd, a numerical solver and the environment."""

import numpy as np
import pytest
import torch

from analytic_model import local_influence, reference_state
from cloud_env import CloudEnv
from dgpg import guidance


def system_state(x_before, placement, z, touched):
    """x = x_before + Σ_i Σ_k placement_ik z_ik [B, M, R], differentiable in the placement [B, N, K], one-hot or not."""
    added = (placement[..., None, None] * z).flatten(1, 3)  # [B, N K J, R]
    return x_before.scatter_add(1, touched.flatten(1).unsqueeze(-1).expand_as(added), added)


def random_system(seed, agents=7, servers=5, reachable=3, batch=4):
    """A random system in double precision: x_before, capacity, reach, demand, actions [B, N]."""
    rng = torch.Generator().manual_seed(seed)
    reach = torch.stack([torch.randperm(servers, generator=rng)[:reachable] for _ in range(agents)])
    return (
        torch.rand(batch, servers, 2, generator=rng, dtype=torch.float64) * 2,
        torch.rand(servers, 2, generator=rng, dtype=torch.float64) * 10 + 1,
        reach,
        torch.rand(batch, agents, 2, generator=rng, dtype=torch.float64) * 4,
        torch.randint(reachable, (batch, agents), generator=rng),
    )


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("crowded", [False, True])
def test_closed_form_guidance_equals_autograd_through_the_state(seed, crowded):
    """g_i(a) for all a: replace i's action by a, recompute x, differentiate: ∂d/∂a = ⟨x − x̃, z_i(a)⟩, d = ½‖x − x̃‖²."""
    x_before, capacity, reach, demand, actions = random_system(seed)
    if crowded:  # all agents on server 0, by different actions
        reach = torch.stack([row.roll(i % 3) for i, row in enumerate(torch.tensor([[0, 2, 4]] * 7))])
        actions = torch.stack([(row == 0).nonzero()[0].expand(4) for row in reach], 1)
    z, touched = local_influence(demand=demand, capacity=capacity, reach=reach)
    x_ref = reference_state(offered_load=demand.sum(1), capacity=capacity)

    def gradient(actions):
        """∂d/∂(placement) [B, N, K] at the joint action, and x."""
        placement = torch.nn.functional.one_hot(actions, 3).double().requires_grad_()
        x = system_state(x_before, placement, z, touched)
        return torch.autograd.grad(0.5 * (x - x_ref).square().sum(), placement)[0], x.detach()

    _, x = gradient(actions)
    g = guidance(x, x_ref, z, touched, actions)
    for agent in range(7):
        for other in range(3):
            changed = actions.clone()
            changed[:, agent] = other
            expected = gradient(changed)[0][:, agent, other]
            torch.testing.assert_close(g[:, agent, other], expected, rtol=1e-12, atol=1e-12)


def played_round(env, actions):
    """What the environment hands out of a round, as tensors, with its constants."""
    played = env.step(actions)[-1]["played"]
    return {name: torch.tensor(value) for name, value in (played | env.constants).items()}


def test_state_and_influence_are_the_environment_s():
    env, rng = CloudEnv(3, 11, rounds=12, load=1.5), np.random.default_rng(0)
    env.reset(seed=1)
    for _ in range(12):
        x_before, actions = torch.tensor(env.x), torch.tensor(rng.integers(8, size=(3, 11)))
        model = played_round(env, actions.numpy())
        x = system_state(x_before, torch.nn.functional.one_hot(actions, 8).double(), *local_influence(**model))
        torch.testing.assert_close(x, model["x"])


def test_reference_does_not_change_when_the_policy_does():
    envs = [CloudEnv(2, 6, rounds=15, load=1.0) for _ in range(2)]
    for env in envs:
        env.reset(seed=4)
    for t in range(15):
        first, second = played_round(envs[0], np.zeros((2, 6), int)), played_round(envs[1], np.full((2, 6), t % 6))
        assert torch.equal(reference_state(**first), reference_state(**second))
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

    optimizer = torch.optim.LBFGS(
        [free], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        cost = (capacity * phi(feasible())).sum()
        cost.backward()
        return cost

    optimizer.step(closure)
    torch.testing.assert_close((capacity * feasible()).sum(0), load)
    (found,) = reference_state(offered_load=load.unsqueeze(0), capacity=capacity)
    torch.testing.assert_close(feasible().detach(), found, rtol=1e-5, atol=1e-5)
