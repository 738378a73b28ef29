"""The baselines learn: a one-round problem with a known best policy, which random placement does not find."""

import numpy as np
import pytest

import cloud_env
import dgpg
import ippo
import mappo


@pytest.fixture
def each_task_has_its_server(monkeypatch, tmp_path):
    """Two agents, two servers, one round: one task fits one server only, the other the other, whichever agent has it.

    The server with less CPU has more memory. At any wrong placement some agent gains by moving; the best return is 0.
    """
    monkeypatch.chdir(tmp_path)
    env = cloud_env.CloudEnv(1, 2)
    assert env.capacity.tolist() == [[4, 32], [8, 16]]

    def draw_scenario(rng, rounds, n_agents, trace, start):
        tasks = np.stack([rng.permutation([[5, 0.1], [0.1, 28]]) for _ in range(rounds + 1)]) / env.demand_scale
        return cloud_env.Scenario(tasks, np.ones((rounds + 1, n_agents)), np.ones(rounds))

    monkeypatch.setattr(cloud_env, "draw_scenario", draw_scenario)


@pytest.mark.parametrize("share_parameters", [True, False])
@pytest.mark.parametrize("module", [mappo, ippo, dgpg])
def test_finds_the_best_policy_of_a_known_game(each_task_has_its_server, module, share_parameters):
    options = dict(n_agents=2, rounds=1, num_steps=1, num_envs=64, eval_every=10**9, num_minibatches=4, update_epochs=5)
    options.update(learning_rate=3e-3, share_parameters=share_parameters)
    assert module.train(module.Args(**options, episodes=0))["score"] < 0.7
    # no longer: in a solved game noise is all that is left to standardise, a policy may leave the optimum for a while
    assert module.train(module.Args(**options, episodes=64 * 20))["score"] > 0.95
