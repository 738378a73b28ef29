"""The cloud's reference state, and DG-PG's claim about equilibria, by enumeration of small one-round games.

The potential is the one that is trained, J_α = (1 − α) J − α (d(x, x̃) + ½ Σ_i ‖z_i‖²): not d alone is descended.
"""

import itertools

import numpy as np
import pytest
import torch

from analytic_model import local_influence, reference_state
from cloud_env import CloudEnv, Scenario
from tests.helpers import handed_out

# tasks' vCPU and the servers' vCPU: every placement is contended, so that no two differ in the state alone
GAMES = [([5, 7], [4, 4]), ([5, 5, 5], [4, 4, 4]), ([5, 6, 7], [4, 4, 4]), ([6, 6, 6], [4, 8])]
ALPHAS = (0.2, 0.5, 0.9)


def test_reference_is_the_same_utilisation_everywhere_with_all_the_load():
    """The KKT conditions of min Σ_n C_n φ(x_n) subject to Σ_n C_n x_n = L, φ strictly convex."""
    load, capacity = torch.rand(3, 2), torch.rand(6, 2) + 1
    x_ref = reference_state(offered_load=load, capacity=capacity)
    torch.testing.assert_close((capacity * x_ref).sum(1), load)
    torch.testing.assert_close(x_ref, x_ref[:, :1].expand(3, 6, 2))


def play(demand, capacity, reference=reference_state):
    """All joint actions [E, N], their team reward J [E], d(x, x̃) = ½‖x − x̃‖² [E] and ½ Σ_i ‖z_i‖² [E]."""
    n_agents, n_servers = len(demand), len(capacity)
    joint = np.array(list(itertools.product(range(n_servers), repeat=n_agents)))
    env = CloudEnv(len(joint), n_agents, rounds=1, capacity=[(c, 8 * c) for c in capacity])
    demand = np.array([[(d, d) for d in demand]] * 2, dtype=float)  # far less memory than there is
    scenario = Scenario(demand, np.full((2, n_agents), 100.0), np.ones(1))
    env.reach[:] = range(n_servers)  # the actions are servers
    env.constants["reach"] = env.reach
    env.reset(options={"scenarios": [scenario] * len(joint)})
    _, reward, _, _, info = env.step(joint)
    played = handed_out(env, info)
    distance = (played["x"] - reference(**played)).square().sum((-2, -1)) / 2
    norms = local_influence(**played)[0].square().sum((-2, -1))  # [E, N, K]
    own = norms.gather(2, torch.tensor(joint).unsqueeze(-1)).sum((1, 2)) / 2
    return joint, reward, distance.numpy(), own.numpy()


def equilibria(joint, value):
    """The joint actions from which no agent gains by moving alone."""
    value = {tuple(actions): v for actions, v in zip(joint, value)}
    found = set()
    for actions, v in value.items():
        others = [actions[:i] + (s,) + actions[i + 1 :] for i in range(len(actions)) for s in range(joint.max() + 1)]
        if all(value[other] <= v + 1e-12 for other in others):
            found.add(actions)
    return found


@pytest.mark.parametrize("demand, capacity", GAMES)
def test_equilibria_stay_under_a_descent_aligned_reference_and_move_under_a_wrong_one(demand, capacity):
    joint, reward, d, own = play(demand, capacity)
    before = equilibria(joint, reward)
    assert len(before) < len(joint) and tuple(joint[reward.argmax()]) in before
    assert before <= equilibria(joint, -d)  # descent-aligned: who leaves one gets no nearer to the reference
    for alpha in ALPHAS:
        assert before <= equilibria(joint, (1 - alpha) * reward - alpha * (d + own)), alpha
    # the wrong one: all load on the first server
    _, _, d, _ = play(demand, capacity, lambda x, **_: x.amax((0, 1)) * torch.eye(x.shape[1])[0, :, None])
    after = equilibria(joint, 0.1 * reward - 0.9 * (d + own))
    assert not before <= after and (0,) * len(demand) in after


def test_on_unequal_or_overloaded_servers_one_can_be_lost():
    # descent-aligned, so −d alone keeps both equilibria; with ½ Σ_i ‖z_i‖² the worse of the two is none any more
    joint, reward, d, own = play([5, 10], [4, 8])
    before, best = equilibria(joint, reward), tuple(joint[reward.argmax()])
    assert len(before) == 2 and before <= equilibria(joint, -d)
    for alpha in ALPHAS:
        assert before & equilibria(joint, (1 - alpha) * reward - alpha * (d + own)) == {best}, alpha
        assert before <= equilibria(joint, (1 - alpha) * reward - alpha * d), alpha
    # every server overloaded: letting one overload more can serve the others, an equilibrium of J but not with −d
    rng = np.random.default_rng(0)
    games = [play(rng.uniform(2, 9, 3), [4, 8]) for _ in range(50)]
    assert any(equilibria(joint, r) - equilibria(joint, 0.1 * r - 0.9 * d) for joint, r, d, _ in games)
