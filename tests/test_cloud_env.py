"""The environment against hand-computed episodes, a slow event-by-event simulation and independent formulas."""

import os

import numpy as np
import pytest

import cloud_env
from cloud_env import CATALOGUE, CloudEnv, InputError, Scenario, load_trace
from dgpg import evaluate


def random_actions(env, rng=np.random.default_rng(0)):
    return rng.integers(env.reach.shape[1], size=(env.num_envs, env.n_agents))


def actions_to(env, servers):
    """The actions [E, N] that lead to `servers` [E, N], which must be in the agents' reach."""
    found = env.reach == np.asarray(servers)[..., None]
    assert found.any(-1).all()
    return found.argmax(-1)


def slow_episode(scenario, capacity, servers):
    """One environment, task by task and event by event. Returns rewards, x after placements, work done, work left."""
    tasks, rewards, states, done = [], [], [], 0.0  # a task is [server, work left, demand, duration]
    n_agents = scenario.demand.shape[1]

    def utilisation(new=0):
        """Of the tasks that are not done, and of the `new` last ones, which may have no work at all."""
        x = np.zeros_like(capacity)
        for k, (server, left, demand, _) in enumerate(tasks):
            if left > 0 or k >= len(tasks) - new:
                x[server] += demand / capacity[server]
        return x

    for t, left_of_slot in enumerate(scenario.delta):
        tasks += [
            [servers[t][i], scenario.duration[t, i], scenario.demand[t, i], scenario.duration[t, i]]
            for i in range(n_agents)
        ]
        states.append(utilisation(new=n_agents))
        rewards.append(0.0)
        while left_of_slot > 0:
            slowdown = np.maximum(1, utilisation().max(1))
            running = [task for task in tasks if task[1] > 0]
            step = min([left_of_slot] + [left * slowdown[server] for server, left, _, _ in running])
            for task in running:
                served = step / slowdown[task[0]]
                ends = task[1] * slowdown[task[0]] <= step * (1 + 1e-12)
                done += task[1] if ends else served
                task[1] = 0 if ends else task[1] - served
                rewards[-1] -= (step - served) / task[3] / n_agents  # here no duration is 0
            left_of_slot -= step
    return rewards, states, done, sum(task[1] for task in tasks)


def test_two_servers_four_tasks_by_hand():
    env = CloudEnv(1, 2, rounds=2, capacity=[[4, 8], [2, 8]])
    scenario = Scenario(
        demand=np.array([[[4, 2], [4, 2]], [[2, 4], [1, 2]], [[1, 1], [1, 1]]], float),
        duration=np.array([[1, 3], [2, 1], [1, 1]], float),
        delta=np.array([3.0, 6.0]),
    )
    env.reset(options={"scenarios": [scenario]})
    # both on server 0: x_cpu = 2 until the first ends at 2, having lost 1; the second goes on alone, 1 lost, 1 left
    _, reward, terminated, truncated, info = env.step(actions_to(env, [[0, 0]]))
    np.testing.assert_allclose(info["played"]["x"][0], [[2, 0.5], [0, 0]])
    np.testing.assert_allclose(reward, -(1 / 1 + 1 / 3) / 2)
    np.testing.assert_allclose(env.x[0], [[1, 0.25], [0, 0]])
    np.testing.assert_allclose(env.work_left[:4], [0, 1, 2, 1])
    assert not terminated[0] and not truncated[0]
    # a third joins it: x_cpu = 1.5 for 1.5, each loses 0.5; the fourth is alone on server 1
    _, reward, terminated, truncated, info = env.step(actions_to(env, [[0, 1]]))
    np.testing.assert_allclose(info["played"]["x"][0], [[1.5, 0.75], [0.5, 0.25]])
    np.testing.assert_allclose(reward, -(0.5 / 3 + 0.5 / 2) / 2)
    np.testing.assert_allclose(env.x, 0)
    np.testing.assert_allclose(env.work_left[:4], 0)
    assert not terminated[0] and truncated[0]
    # offered load: both of round 0 arrive with 8 vCPU, the second one is just over when round 1 begins
    np.testing.assert_allclose(env.offered_load[:, 0], [[8, 4], [3, 6], [2, 2]])
    with pytest.raises(IndexError):
        env.step(actions_to(env, [[0, 0]]))


def odd(scenario, kind):
    """The scenario with ties, tasks without duration, rounds at one moment, or times up to 1e9 rounds."""
    duration, delta = scenario.duration.copy(), scenario.delta.copy()
    if kind == "ties":
        duration = np.ceil(duration)
        delta[:] = 1
        scenario.demand[:] = scenario.demand[0, 0]
    if kind == "nothing to do, no time":
        duration[:, ::2] = 0
        delta[::3] = 0
    if kind == "1e9 rounds":
        duration[::2] *= 1e9
        delta[::4] = 1e9
    return scenario._replace(duration=duration, delta=delta)


@pytest.mark.parametrize("load", [0.3, 0.9, 2.0, 5.0])
@pytest.mark.parametrize("kind", ["as drawn", "ties", "nothing to do, no time", "1e9 rounds"])
def test_equals_event_by_event_simulation_and_conserves_work(load, kind):
    env, rng = CloudEnv(2, 6, rounds=25, load=load), np.random.default_rng(0)
    env.reset(seed=1)
    scenarios = [odd(Scenario(env.demand[:, e], env.duration[:, e], env.delta[:, e]), kind) for e in range(2)]
    env.reset(options={"scenarios": scenarios})
    actions = [random_actions(env, rng) for _ in range(25)]
    rewards, states = [], []
    for action in actions:
        _, reward, _, _, info = env.step(action)
        rewards.append(reward)
        states.append(info["played"]["x"])
    left = env.work_left.reshape(26, 2, 6)[:25]
    for e, scenario in enumerate(scenarios):
        servers = [env.reach[np.arange(6), action[e]] for action in actions]
        slow_rewards, slow_states, done, slow_left = slow_episode(scenario, env.capacity, servers)
        np.testing.assert_allclose(np.array(rewards)[:, e], slow_rewards, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(np.array(states)[:, e], slow_states, atol=1e-9)
        np.testing.assert_allclose(left[:, e].sum(), slow_left, rtol=1e-9, atol=1e-6)
        np.testing.assert_allclose(env.duration[:25, e].sum(), done + left[:, e].sum(), rtol=1e-9)
    assert load < 0.5 or np.sum(rewards) < -1  # there was contention


def test_environments_together_equal_environments_alone():
    together, rng = CloudEnv(4, 7, rounds=20, load=1.2), np.random.default_rng(0)
    obs, _ = together.reset(seed=5)
    alone = [CloudEnv(1, 7, rounds=20, load=1.2) for _ in range(4)]
    firsts = [env.reset(seed=5 + e)[0][0] for e, env in enumerate(alone)]
    np.testing.assert_array_equal(obs, firsts)
    for _ in range(20):
        actions = random_actions(together, rng)
        obs, reward, _, _, info = together.step(actions)
        for e, env in enumerate(alone):
            one_obs, one_reward, _, _, one_info = env.step(actions[e : e + 1])
            assert reward[e] == one_reward[0]
            np.testing.assert_array_equal(obs[e], one_obs[0])
            np.testing.assert_array_equal(info["state"][e], one_info["state"][0])
            for name in ("x", "demand", "offered_load"):
                np.testing.assert_array_equal(info["played"][name][e], one_info["played"][name][0])


def test_scenario_depends_on_the_seed_and_not_on_the_policy():
    envs = [CloudEnv(2, 5, rounds=10) for _ in range(3)]
    for env, seed in zip(envs, (1, 1, 3)):
        env.reset(seed=seed)
    for _ in range(10):
        envs[0].step(np.zeros((2, 5), int))
        envs[1].step(np.full((2, 5), 4))
    for name in ("demand", "duration", "delta", "offered_load"):
        np.testing.assert_array_equal(getattr(envs[0], name), getattr(envs[1], name))
    assert (envs[0].demand != envs[2].demand).any()


def test_no_contention_no_cost():
    env = CloudEnv(3, 20, load=0.01)
    assert evaluate(env, lambda obs: env.heuristic()) == 0


@pytest.mark.parametrize("load, seconds", [(0.01, 1), (5, 1), (5, 1e6)])
def test_extremes_stay_finite(load, seconds):
    rng = np.random.default_rng(0)
    env = CloudEnv(2, 4, rounds=30, load=load)
    env.reset(seed=1)
    scenarios = [Scenario(env.demand[:, e], env.duration[:, e] * seconds, env.delta[:, e]) for e in range(2)]
    obs, _ = env.reset(options={"scenarios": scenarios})
    for _ in range(30):
        obs, reward, _, _, info = env.step(random_actions(env, rng))
        assert np.isfinite(obs).all() and np.isfinite(reward).all() and np.isfinite(info["state"]).all()
        assert (reward <= 0).all() and (env.work_left >= -1e-9).all()


def test_zero_durations_and_simultaneous_rounds():
    env = CloudEnv(1, 2, rounds=2, capacity=[[1, 1]])
    demand = np.full((3, 2, 2), 1.0)
    env.reset(options={"scenarios": [Scenario(demand, np.array([[0, 2.0], [2, 2], [1, 1]]), np.array([0.0, 2.0]))]})
    assert env.step(np.zeros((1, 2), int))[1] == 0  # no time passes; the task without work is gone
    np.testing.assert_allclose(env.x, 1)
    _, reward, _, _, info = env.step(np.zeros((1, 2), int))
    np.testing.assert_allclose(info["played"]["x"], 3)  # three tasks of duration 2 at a third of the speed for 2
    np.testing.assert_allclose(reward, -3 * (2 - 2 / 3) / 2 / 2)


def test_offered_load_is_the_utilisation_of_an_endless_fleet():
    drawn, env = CloudEnv(2, 6, rounds=40), CloudEnv(2, 6, rounds=40, capacity=np.full((6, 2), 1e9))
    drawn.reset(seed=3)
    env.reset(
        options={"scenarios": [Scenario(drawn.demand[:, e], drawn.duration[:, e], drawn.delta[:, e]) for e in range(2)]}
    )
    for _ in range(40):
        _, _, _, _, info = env.step(random_actions(env))
        np.testing.assert_allclose(
            (info["played"]["x"] * env.capacity).sum(1), info["played"]["offered_load"], rtol=1e-6
        )


def test_long_run_load_is_the_option():
    env = CloudEnv(8, 60, rounds=1000, load=0.7)
    env.reset(seed=1)
    np.testing.assert_allclose(env.delta.mean(), 1, rtol=0.01)
    np.testing.assert_allclose(env.duration.mean(), cloud_env.MEAN_DURATION, rtol=0.01)
    # Little's law: the work that arrives per unit of time is the mean demand present if nothing slows down
    work = (env.demand * env.duration[..., None])[:-1].sum((0, 1, 2))
    np.testing.assert_allclose(work / env.delta.sum() / env.capacity.sum(0), 0.7, rtol=0.01)
    # the same in the middle of the slots: the offered load of the round less what leaves in half a slot, about 1/20
    offered = (
        (env.offered_load[100:-1] * env.delta[100:, :, None]).sum((0, 1)) / env.delta[100:].sum() / env.capacity.sum(0)
    )
    assert (0.7 < offered).all() and (offered < 0.76).all()


def test_fleet_and_reach():
    env = CloudEnv(1, 24)
    assert sorted(map(tuple, env.capacity)) == sorted(2 * [tuple(kind) for kind in CATALOGUE])
    assert env.reach.shape == (24, 8)
    assert (np.bincount(env.reach.ravel()) == 8).all()  # every server is reached by K agents
    assert all(len(set(servers)) == 8 for servers in env.reach)
    assert CloudEnv(1, 3).reach.shape == (3, 3)
    covered = np.concatenate(env.turns)
    assert sorted(covered) == list(range(24))
    for turn in env.turns:
        assert len(np.unique(env.reach[turn])) == env.reach[turn].size


def test_observation_and_influence():
    env = CloudEnv(2, 9, load=1.5)
    env.reset(seed=1)
    obs, _, _, _, info = env.step(np.zeros((2, 9), int))
    # of the round that is about to be played
    offered, demand = env.offered_load[1] / env.capacity.sum(0), env.demand[1] / env.capacity.mean(0)
    parts = env.x.reshape(2, -1), offered, demand.reshape(2, -1), np.log(env.duration[1])
    np.testing.assert_allclose(info["state"], np.concatenate(parts, 1), rtol=1e-5)
    assert (env.delta[:, 0] != env.delta[:, 1]).any()
    e, i, k = 1, 4, 2
    server, demand = env.reach[i, k], env.demand[1, e, i]
    expected = [
        *np.log(1 + env.x[e, server]),
        *demand / env.capacity[server],
        *np.log(env.capacity[server]),
        np.log(env.duration[1, e, i]),
    ]
    np.testing.assert_allclose(obs[e, i, k], expected, rtol=1e-5)
    _, _, _, _, info = env.step(np.full((2, 9), k))
    np.testing.assert_allclose(info["played"]["demand"][e, i], demand)


def servers_of_best_fit(demand, capacity, x=None):
    """Servers that it chooses in one environment for tasks [N, 2], on servers at utilisation x."""
    env = CloudEnv(1, len(demand), rounds=1, capacity=capacity)
    tasks = np.stack([np.array(demand, float)] * 2)
    env.reset(options={"scenarios": [Scenario(tasks, np.ones(tasks.shape[:2]), np.ones(1))]})
    if x is not None:
        env.x[0] = x
    return env.reach[np.arange(env.n_agents), env.heuristic()[0]], env


def test_best_fit_takes_the_tightest_server_that_fits():
    capacity = [[8, 8], [4, 4], [2, 2]]
    assert servers_of_best_fit([[1, 1]], capacity)[0] == [2]
    assert servers_of_best_fit([[3, 1]], capacity)[0] == [1]  # CPU does not fit on 2
    assert servers_of_best_fit([[1, 5]], capacity)[0] == [0]  # memory fits on 0 only
    assert servers_of_best_fit([[1, 1]], capacity, x=[[0, 0], [0, 0], [0.9, 0]])[0] == [1]
    # nowhere: 9/8 of server 0, 9/4 and 9/2 of the others
    assert servers_of_best_fit([[9, 1]], capacity)[0] == [0]
    assert servers_of_best_fit([[9, 1]], capacity, x=[[3, 0], [0, 0], [0, 0]])[0] == [1]


def test_best_fit_sees_the_placements_of_its_round():
    servers, env = servers_of_best_fit([[2, 2], [2, 2], [2, 2]], [[8, 8], [4, 4], [2, 2]])
    assert list(servers[np.concatenate(env.turns)]) == [2, 1, 1]


@pytest.mark.parametrize("load", [0.5, 1.5])
def test_best_fit_in_turns_equals_one_agent_at_a_time(load):
    env, rng = CloudEnv(3, 30, rounds=10, load=load, servers_per_agent=4), np.random.default_rng(1)
    env.reset(seed=1)
    for _ in range(10):
        servers = env.reach[np.arange(30), env.heuristic()]
        for e in range(3):
            x = env.x[e].copy()
            for i in np.concatenate(env.turns):
                near = env.reach[i]
                after = x[near] + env.demand[env.t, e, i] / env.capacity[near]
                left = ((1 - after) * env.capacity[near] / env.capacity.mean(0)).sum(1)
                fits = after.max(1) <= 1
                choice = np.where(fits, left, np.inf).argmin() if fits.any() else after.max(1).argmin()
                assert servers[e, i] == near[choice]
                x[near[choice]] = after[choice]
        env.step(random_actions(env, rng))


def test_reference_policies_rank_as_they_must():
    """Random placement is far behind Best-Fit, and Best-Fit over the agents' reach behind Best-Fit over all servers."""
    near, everywhere = CloudEnv(40, 50), CloudEnv(40, 50, servers_per_agent=50)
    by_best_fit = [evaluate(env, lambda obs: env.heuristic()) for env in (near, everywhere)]
    assert evaluate(near, lambda obs: random_actions(near)) < 10 * by_best_fit[0] < 20 * by_best_fit[1] < 0
    np.testing.assert_array_equal(near.demand, everywhere.demand)  # the same scenarios


def write_trace(path, rows=400, header="arrival_s,duration_s,cpu,memory_gib"):
    rng = np.random.default_rng(0)
    table = np.stack(
        [
            np.sort(rng.uniform(0, 1e4, rows)),
            rng.exponential(50, rows),
            rng.integers(1, 9, rows),
            rng.uniform(1, 30, rows),
        ],
        1,
    )
    lines = [header] + [",".join(f"{value:.3f}" for value in row) for row in table]
    path.write_text("\n".join(lines) + "\n")
    return np.loadtxt(lines[1:], delimiter=",")


def test_trace_becomes_rounds_of_consecutive_tasks(tmp_path):
    table = write_trace(tmp_path / "trace.csv")
    np.testing.assert_array_equal(load_trace(tmp_path / "trace.csv"), table)
    for held_out, first, last in ((False, 0, 320), (True, 320, 400)):
        env = CloudEnv(1, 4, rounds=9, load=0.6, trace=tmp_path / "trace.csv", held_out=held_out)
        starts = set()
        for seed in range(20):
            env.reset(seed=seed)
            demand = env.demand.reshape(40, 2)
            scales = ((s, demand / table[s : s + 40, 2:]) for s in range(first, last - 39))
            start = next(s for s, scale in scales if np.allclose(scale, scale[0]))  # nowhere else
            starts.add(start)
            rows = table[start : start + 40]
            seconds_per_round = 4 * (table[-1, 0] - table[0, 0]) / 400
            np.testing.assert_allclose(env.delta[:, 0], np.diff(rows[::4, 0]) / seconds_per_round)
            np.testing.assert_allclose(env.duration.ravel(), rows[:, 1] / table[:, 1].mean() * cloud_env.MEAN_DURATION)
        assert (starts == {320}) if held_out else len(starts) > 10


def offered(env):
    """The offered load [T, E, 2] of the rounds that are played, as a fraction of the capacity, by its definition."""
    start = np.concatenate([np.zeros((1, env.num_envs)), env.delta.cumsum(0)])
    load = np.zeros((env.rounds, env.num_envs, 2))
    for t, e, k in np.ndindex(env.rounds, env.num_envs, env.rounds):
        present = (k <= t) & (start[k, e] + env.duration[k, e] > start[t, e])  # [N]
        load[t, e] += (present[:, None] * env.demand[k, e]).sum(0)
    return load / env.capacity.sum(0)


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize(
    "name, arrival, duration",
    [
        ("tasks of 20 episodes", np.arange(900.0), 20 * 4 * 20 * np.ones(900)),
        ("a few of 20 episodes", np.arange(900.0), np.where(np.arange(900) % 50, 1.0, 1600.0)),
        ("bursts of 100", np.arange(900) // 100 * 1000.0, 1.0 + np.arange(900) % 7),
        ("bursts, most tasks without duration", np.arange(900) // 100 * 9.0, np.where(np.arange(900) % 9, 0.0, 40.0)),
        ("growing demands", np.arange(900.0), 1.0 + np.arange(900) ** 2 / 100),
    ],
)
def test_the_load_of_a_trace_is_what_is_simulated(tmp_path, name, arrival, duration, held_out):
    rng = np.random.default_rng(1)
    rows = zip(arrival, duration, rng.uniform(1, 9, 900) * (1 + arrival), rng.uniform(1, 30, 900))
    (tmp_path / "t.csv").write_text(
        "\n".join(["arrival_s,duration_s,cpu,memory_gib", *(f"{a},{d},{c},{m}" for a, d, c, m in rows)])
    )
    env = CloudEnv(3, 4, rounds=20, load=0.7, trace=tmp_path / "t.csv", held_out=held_out)
    for seed in (0, 5):
        env.reset(seed=seed)
        np.testing.assert_allclose(offered(env).mean(0), 0.7, err_msg=name)
        np.testing.assert_allclose(env.offered_load[:-1] / env.capacity.sum(0), offered(env), atol=1e-12)
    assert "offered load 0.700 of CPU, 0.700 of memory in 3 x 20 rounds" in str(env)


def test_a_stretch_without_load_keeps_its_demands(tmp_path):
    """No rounding error is scaled up to a load: here no task of the held-out part has a duration."""
    rows = [f"{i},{5 if i < 400 else 0},{1 + i % 3},{0.1 * (1 + i % 7)}" for i in range(500)]
    (tmp_path / "t.csv").write_text("\n".join(["arrival_s,duration_s,cpu,memory_gib", *rows]))
    env = CloudEnv(3, 4, rounds=20, trace=tmp_path / "t.csv", held_out=True)
    env.reset(seed=0)
    assert not env.offered_load.any() and (0 < env.demand).all() and env.demand.max() < 1e3


def test_the_offered_load_is_never_below_zero():
    """Where all have left before the next ones come, rounding must not leave less than nothing."""
    rng = np.random.default_rng(0)
    env = CloudEnv(1, 5, rounds=40)
    demand = np.where(np.arange(41) % 4, 0.0, 1.0)[:, None, None] * rng.uniform(0.1, 1, (41, 5, 2))
    env.reset(options={"scenarios": [Scenario(demand, rng.integers(3, size=(41, 5)) + 0.5, np.ones(40))]})
    assert (env.offered_load >= 0).all()
    np.testing.assert_allclose(env.offered_load[:-1] / env.capacity.sum(0), offered(env), atol=1e-12)
    np.testing.assert_allclose(env.offered_load[3::4], 0, atol=1e-12)


def test_given_scenarios_are_not_scaled_to_the_load_of_the_trace(tmp_path):
    write_trace(tmp_path / "trace.csv")
    env, demand = CloudEnv(1, 4, rounds=4, trace=tmp_path / "trace.csv"), np.ones((5, 4, 2))
    env.reset(options={"scenarios": [Scenario(demand, np.ones((5, 4)), np.ones(4))]})
    np.testing.assert_array_equal(env.demand[:, 0], demand)


def test_training_stretches_begin_anywhere(tmp_path):
    table = write_trace(tmp_path / "trace.csv", 60)  # 48 rows, a stretch has 40: it begins at one of 9
    env, seen = CloudEnv(1, 4, rounds=9, trace=tmp_path / "trace.csv"), set()
    for seed in range(100):
        env.reset(seed=seed)
        duration = env.duration.ravel() / cloud_env.MEAN_DURATION * table[:, 1].mean()
        seen |= {s for s in range(20) if np.allclose(table[s : s + 40, 1], duration)}
    assert seen == set(range(9))


def test_evaluation_stretches_do_not_overlap_where_there_is_room(tmp_path):
    table = write_trace(tmp_path / "trace.csv")  # 80 rows are held out, a stretch has 4 x 5
    for count, starts in ((4, [320, 340, 360, 380]), (5, [320, 335, 350, 365, 380])):
        env = CloudEnv(count, 4, rounds=4, trace=tmp_path / "trace.csv", held_out=True)
        env.reset(seed=3)
        duration = env.duration.transpose(1, 0, 2).reshape(count, 20) / cloud_env.MEAN_DURATION * table[:, 1].mean()
        for k, start in enumerate(starts):
            np.testing.assert_allclose(duration[k], table[start : start + 20, 1])
        assert "trace of 80 tasks, 4 episodes" in str(env)


def test_a_short_trace_says_what_it_has_and_needs(tmp_path):
    write_trace(tmp_path / "trace.csv")
    message = r"trace.csv: its last 20 % has 80 rows, n_agents x \(rounds \+ 1\) = 84 needed"
    with pytest.raises(InputError, match=message):
        CloudEnv(1, 4, rounds=20, trace=tmp_path / "trace.csv", held_out=True)
    write_trace(tmp_path / "trace.csv", 420)
    CloudEnv(1, 4, rounds=20, trace=tmp_path / "trace.csv", held_out=True)


def test_trace_columns_in_any_order_with_others_bom_and_crlf(tmp_path):
    (tmp_path / "trace.csv").write_bytes(
        b"\xef\xbb\xbfcpu,memory_gib,name,arrival_s,duration_s\r\n1,2,a,3,4\r\n5,6,b,7,8\r\n"
    )
    np.testing.assert_array_equal(load_trace(tmp_path / "trace.csv"), [[3, 4, 1, 2], [7, 8, 5, 6]])


HEADER = "arrival_s,duration_s,cpu,memory_gib\n"


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "line 0 .*no column arrival_s"),
        ("arrival_s,duration_s,cpu\n1,2,3\n", "line 1 of the columns arrival_s, duration_s, cpu: no column memory_gib"),
        ("arrival_s;duration_s;cpu;memory_gib\n0;60;1;2\n", "no column arrival_s"),
        (HEADER, "line 1 .*no row below the header"),
        (HEADER.replace("\n", ",cpu\n") + "0,60,1,2,99\n", "cpu.*more than once"),
        (HEADER + "0,60,0,5,2\n", "line 2 of the columns arrival_s, duration_s, cpu, memory_gib: .* 5 were found"),
        (HEADER + "0,1,1,1\n0,1,1\n", "line 3 .* 3 were found"),
        ("name," + HEADER + '"a, b",0,1,1,1\na, b,0,1,1,1\n', "line 3 .* 6 were found"),
        (HEADER + "0,1,1,1\n1,1,1,many\n", "line 3 .*'many'.*column 4"),
        (HEADER + "0,1,1,1\n1,1,,1\n", "line 3 .*column 3"),
        (HEADER + "0,1,1,1\n1,-1,1,1\n", "line 3: duration_s"),
        (HEADER + "0,1,1,1\n1,1,nan,1\n", "line 3: cpu"),
        (HEADER + "0,1,1,inf\n", "line 2: memory_gib"),
        (HEADER + "0,1,1,1\n5,1,1,1\n4,1,1,1\n", "line 4: arrival_s.*not sorted"),
        (b"\xff\xfe\x00", "trace .*: "),
    ],
)
def test_bad_traces_are_refused_by_line_and_column(tmp_path, text, message):
    (tmp_path / "t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message):
        load_trace(tmp_path / "t.csv")
    assert issubclass(InputError, ValueError)


def test_a_trace_is_read_once_and_again_when_it_has_changed(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(HEADER + "0,1,1,1\n")
    first = load_trace(path)
    assert load_trace(path) is first
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 0
    path.write_text(HEADER + "0,1,1,5\n")
    os.utime(path, (1, 1))
    assert load_trace(path)[0, 3] == 5


@pytest.mark.parametrize(
    "column, row, value, message",
    [
        (0, slice(0, 1), -1.5e9, "line 3: arrival_s outweighs"),  # one arrival of 0 among times of an epoch
        (1, 7, 1e9, "line 9: duration_s outweighs"),
        (3, 9, 4e9, "line 11: memory_gib outweighs"),  # in bytes
        (0, slice(None), 0, "arrival_s is the same or 0 in all rows"),
        (1, slice(None), 0, "duration_s is the same or 0"),
        (2, slice(None), 0, "cpu is the same or 0"),
        (3, slice(None), 0, "memory_gib is the same or 0"),
    ],
)
def test_what_would_scale_a_trace_to_nothing_is_refused(tmp_path, column, row, value, message):
    table = write_trace(tmp_path / "trace.csv")
    CloudEnv(1, 4, rounds=9, trace=tmp_path / "trace.csv")
    table[row, column] = value
    table[:, 0] -= table[0, 0]
    np.savetxt(tmp_path / "t.csv", table, delimiter=",", header=HEADER.strip(), comments="")
    with pytest.raises(InputError, match=message):
        CloudEnv(1, 4, rounds=9, trace=tmp_path / "t.csv")


def test_a_run_says_what_the_trace_became(tmp_path):
    """Four agents: a round every 8 s of the trace's 4 s in the mean, all durations 7.4 rounds, half the rounds at once."""
    rows = [f"{i // 8 * 8},{60},{1 + (i == 100)},{4}" for i in range(400)]
    (tmp_path / "t.csv").write_text(HEADER + "\n".join(rows))
    env = CloudEnv(1, 4, rounds=9, trace=tmp_path / "t.csv")
    env.reset(seed=0)
    assert "trace of 320 tasks, 8 episodes; rounds " in str(env)
    shares = [word for word in str(env).split() if word.endswith("%")]
    assert shares == [f"{(env.delta == 0).mean():.0%}"]
    assert "durations 7.4 in the median, 7.4 at most; the largest task takes " in str(env)
    largest = float(str(env).split("takes ")[1].split()[0])
    assert largest == pytest.approx((env.demand / env.capacity.mean(0)).max(), rel=0.1)


@pytest.mark.parametrize("name", ["num_envs", "n_agents", "rounds", "servers_per_agent", "load"])
def test_options_out_of_range(name):
    with pytest.raises(InputError, match=name):
        CloudEnv(**{"num_envs": 1, "n_agents": 3, name: 0})


def test_calls_that_a_programmer_gets_wrong():
    env = CloudEnv(2, 3, rounds=1)
    scenario = Scenario(np.ones((2, 3, 2)), np.ones((2, 3)), np.ones(1))
    with pytest.raises(AssertionError, match="demand.shape"):
        env.reset(options={"scenarios": [scenario]})
    env.reset(seed=1)
    wrong = (np.zeros((3, 2), int), np.zeros((2, 3)), np.full((2, 3), 3), np.full((2, 3), -1), np.zeros((1, 3), int))
    for actions in wrong:
        with pytest.raises(ValueError, match="actions"):
            env.step(actions)


def test_what_is_handed_out_is_not_the_environments_own():
    """Writing to an observation, to `info` or to `constants` changes nothing in the next round."""
    envs, obs = [CloudEnv(1, 4, rounds=6, load=2.0) for _ in range(2)], [None, None]
    for env in envs:
        env.reset(seed=1)
    for _ in range(6):
        for k, env in enumerate(envs):
            obs[k], reward, _, _, info = env.step(np.zeros((1, 4), int))
            if k == 0:
                first = obs[0].copy(), reward.copy()
                for array in (obs[0], reward, info["state"], *info["played"].values(), *env.constants.values()):
                    array[...] = 0
        np.testing.assert_array_equal(first[0], obs[1])
        np.testing.assert_array_equal(first[1], reward)
