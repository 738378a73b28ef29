"""DG-PG's claim about equilibria, by enumeration of all joint actions of small one-round games."""

import itertools

import numpy as np
import pytest
import torch

from analytic_model import deviation, reference_state
from cloud_env import CloudEnv, Scenario

# tasks' vCPU and the servers' vCPU: every placement is contended, so that no two differ in the state alone
GAMES = {
    "two equal servers, two equal tasks": ([5, 5], [4, 4]),
    "two equal servers, two unequal tasks": ([5, 7], [4, 4]),
    "three equal servers, three equal tasks": ([5, 5, 5], [4, 4, 4]),
    "three equal servers, three unequal tasks": ([5, 6, 7], [4, 4, 4]),
    "a server twice the other, three equal tasks": ([6, 6, 6], [4, 8]),
    "a server twice the others, two tasks that it takes to balance": ([5, 10], [4, 8]),
}
ALPHAS = (0.2, 0.5, 0.9)


def play(demand, capacity):
    """All joint actions [E, N], their team reward J [E] and state x [E, M, 2], from the environment itself."""
    n_agents, n_servers = len(demand), len(capacity)
    joint = np.array(list(itertools.product(range(n_servers), repeat=n_agents)))
    env = CloudEnv(len(joint), n_agents, rounds=1, capacity=[(c, 8 * c) for c in capacity])
    demand = np.array([[(d, d) for d in demand]] * 2, dtype=float)  # far less memory than there is
    scenario = Scenario(demand, np.full((2, n_agents), 100.0), np.ones(1))
    env.reset(options={"scenarios": [scenario] * len(joint)})
    _, reward, _, _, info = env.place(joint)
    load, capacity = torch.as_tensor(info["L"]), torch.as_tensor(env.capacity)
    return joint, reward, torch.as_tensor(info["x"]), reference_state(load, capacity)


def equilibria(joint, value):
    """The joint actions from which no agent gains by moving alone."""
    value = {tuple(actions): v for actions, v in zip(joint, value)}
    servers = range(joint.max() + 1)
    return {
        actions
        for actions, v in value.items()
        if all(value[actions[:i] + (s,) + actions[i + 1 :]] <= v + 1e-12 for i in range(len(actions)) for s in servers)
    }


def augmented(reward, x, x_ref, alpha):
    """J_α = (1 − α) J − α d(x, x̃)."""
    return (1 - alpha) * reward - alpha * deviation(x, x_ref).numpy()


@pytest.mark.parametrize("demand, capacity", GAMES.values(), ids=GAMES)
def test_equilibria_stay_under_a_descent_aligned_reference(demand, capacity):
    joint, reward, x, x_ref = play(demand, capacity)
    before = equilibria(joint, reward)
    assert 0 < len(before) < len(joint)
    best = tuple(joint[reward.argmax()])
    assert best in before
    # descent-aligned at the equilibria: who leaves one gets no nearer to the reference
    assert before <= equilibria(joint, -deviation(x, x_ref).numpy())
    for alpha in ALPHAS:
        assert before <= equilibria(joint, augmented(reward, x, x_ref, alpha)), alpha


@pytest.mark.parametrize("demand, capacity", GAMES.values(), ids=GAMES)
def test_a_wrong_reference_moves_them(demand, capacity):
    """All load on the first server: not descent-aligned, and J_α has other equilibria than J."""
    joint, reward, x, x_ref = play(demand, capacity)
    wrong = torch.zeros_like(x)
    wrong[:, 0] = x.amax((0, 1))
    before = equilibria(joint, reward)
    assert not before <= equilibria(joint, augmented(reward, x, wrong, 0.9))
    assert (0,) * len(demand) in equilibria(joint, augmented(reward, x, wrong, 0.9))


def test_the_overloaded_fleet_is_not_descent_aligned():
    """Where every server is overloaded, letting one overload more can serve the others: an equilibrium of J that J_α loses."""
    lost = 0
    rng = np.random.default_rng(0)
    for _ in range(50):
        joint, reward, x, x_ref = play(rng.uniform(2, 9, 3), [4, 8])
        lost += not equilibria(joint, reward) <= equilibria(joint, augmented(reward, x, x_ref, 0.9))
    assert lost > 0
