"""DG-PG's claim about equilibria, by enumeration of all joint actions of small one-round games.

The potential is the one that is trained: the guidance descends d(x, x̃) + ½ Σ_i ‖z_i‖², not d alone.
"""

import itertools

import numpy as np
import pytest
import torch

from analytic_model import local_influence, reference_state
from cloud_env import CloudEnv, Scenario

# tasks' vCPU and the servers' vCPU: every placement is contended, so that no two differ in the state alone
GAMES = {
    "two equal servers, two equal tasks": ([5, 5], [4, 4]),
    "two equal servers, two unequal tasks": ([5, 7], [4, 4]),
    "three equal servers, three equal tasks": ([5, 5, 5], [4, 4, 4]),
    "three equal servers, three unequal tasks": ([5, 6, 7], [4, 4, 4]),
    "a server twice the other, three equal tasks": ([6, 6, 6], [4, 8]),
}
LOSES_ONE = [5, 10], [4, 8]  # two tasks on a server and one of twice its size
ALPHAS = (0.2, 0.5, 0.9)


def deviation(x, x_ref):
    """d(x, x̃) = ½‖x − x̃‖² [E]."""
    return 0.5 * (x - x_ref).square().sum((-2, -1))


def play(demand, capacity):
    """All joint actions [E, N], their team reward J [E], state x [E, M, 2], reference x̃ and ½ Σ_i ‖z_i‖² [E]."""
    n_agents, n_servers = len(demand), len(capacity)
    joint = np.array(list(itertools.product(range(n_servers), repeat=n_agents)))
    env = CloudEnv(len(joint), n_agents, rounds=1, capacity=[(c, 8 * c) for c in capacity])
    demand = np.array([[(d, d) for d in demand]] * 2, dtype=float)  # far less memory than there is
    scenario = Scenario(demand, np.full((2, n_agents), 100.0), np.ones(1))
    env.reset(options={"scenarios": [scenario] * len(joint)})
    actions = (env.reach == joint[..., None]).argmax(-1)
    _, reward, _, _, info = env.step(actions)
    model = {name: torch.as_tensor(value) for name, value in (info["played"] | env.constants).items()}
    z, _ = local_influence(**model)
    own = np.take_along_axis(z[..., 0, :].square().sum(-1).numpy(), actions[..., None], -1).sum((1, 2)) / 2
    return joint, reward, model["x"], reference_state(**model), own


def equilibria(joint, value):
    """The joint actions from which no agent gains by moving alone."""
    value = {tuple(actions): v for actions, v in zip(joint, value)}
    servers = range(joint.max() + 1)
    return {
        actions
        for actions, v in value.items()
        if all(value[actions[:i] + (s,) + actions[i + 1 :]] <= v + 1e-12 for i in range(len(actions)) for s in servers)
    }


def augmented(reward, x, x_ref, own, alpha):
    """J_α = (1 − α) J − α (d(x, x̃) + ½ Σ_i ‖z_i‖²)."""
    return (1 - alpha) * reward - alpha * (deviation(x, x_ref).numpy() + own)


@pytest.mark.parametrize("demand, capacity", GAMES.values(), ids=GAMES)
def test_equilibria_stay_under_a_descent_aligned_reference(demand, capacity):
    joint, reward, x, x_ref, own = play(demand, capacity)
    before = equilibria(joint, reward)
    assert 0 < len(before) < len(joint)
    best = tuple(joint[reward.argmax()])
    assert best in before
    # descent-aligned at the equilibria: who leaves one gets no nearer to the reference
    assert before <= equilibria(joint, -deviation(x, x_ref).numpy())
    for alpha in ALPHAS:
        assert before <= equilibria(joint, augmented(reward, x, x_ref, own, alpha)), alpha


def test_on_unequal_servers_the_own_term_can_take_one_away():
    """Descent-aligned, so −d alone keeps both equilibria; with ½ ‖z‖² the worse of the two is none any more."""
    joint, reward, x, x_ref, own = play(*LOSES_ONE)
    before, best = equilibria(joint, reward), tuple(joint[reward.argmax()])
    assert len(before) == 2 and before <= equilibria(joint, -deviation(x, x_ref).numpy())
    for alpha in ALPHAS:
        assert before & equilibria(joint, augmented(reward, x, x_ref, own, alpha)) == {best}, alpha
        assert before <= equilibria(joint, augmented(reward, x, x_ref, 0 * own, alpha)), alpha


@pytest.mark.parametrize("demand, capacity", GAMES.values(), ids=GAMES)
def test_a_wrong_reference_moves_them(demand, capacity):
    """All load on the first server: not descent-aligned, and J_α has other equilibria than J."""
    joint, reward, x, x_ref, own = play(demand, capacity)
    wrong = torch.zeros_like(x)
    wrong[:, 0] = x.amax((0, 1))
    after = equilibria(joint, augmented(reward, x, wrong, own, 0.9))
    assert not equilibria(joint, reward) <= after
    assert (0,) * len(demand) in after


def test_the_overloaded_fleet_is_not_descent_aligned():
    """Every server overloaded: letting one overload more can serve the others, an equilibrium of J that J_α loses."""
    lost = 0
    rng = np.random.default_rng(0)
    for _ in range(50):
        joint, reward, x, x_ref, own = play(rng.uniform(2, 9, 3), [4, 8])
        lost += not equilibria(joint, reward) <= equilibria(joint, augmented(reward, x, x_ref, 0 * own, 0.9))
    assert lost > 0
