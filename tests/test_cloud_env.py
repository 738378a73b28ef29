"""The environment against hand-computed episodes, a slow event-by-event simulation and independent formulas."""

import itertools
from pathlib import Path

import numpy as np
import pytest

import cloud_env
from cloud_env import CATALOGUE, CloudEnv, InputError, Scenario, load_trace
from tests.helpers import HEADER, write_trace


def scenario_of(env, e):
    return Scenario(env.demand[:, e], env.duration[:, e], env.delta[:, e])


def slow_episode(scenario, capacity, servers):
    """One environment, task by task and event by event. Returns rewards, x after placements, and work left."""
    running, rewards, states = [], [], []  # a task is [server, work left, demand, duration]

    def utilisation():
        x = np.zeros_like(capacity)
        for server, _, demand, _ in running:
            x[server] += demand / capacity[server]
        return x

    for t, left_of_slot in enumerate(scenario.delta):
        for server, demand, duration in zip(servers[t], scenario.demand[t], scenario.duration[t]):
            running.append([server, duration, demand, duration])
        states.append(utilisation())  # with tasks that have no work at all
        rewards.append(0.0)
        running = [task for task in running if task[1] > 0]
        while left_of_slot > 0:
            slowdown = np.maximum(1, utilisation().max(1))
            step = min([left_of_slot] + [left * slowdown[server] for server, left, _, _ in running])
            for task in running:
                served = step / slowdown[task[0]]
                ends = task[1] * slowdown[task[0]] <= step * (1 + 1e-12)
                task[1] = 0 if ends else task[1] - served
                rewards[-1] -= (step - served) / task[3] / len(servers[t])  # here no duration is 0
            running = [task for task in running if task[1] > 0]
            left_of_slot -= step
    return rewards, states, sum(task[1] for task in running)


def test_two_servers_four_tasks_by_hand():
    env = CloudEnv(1, 2, rounds=2, capacity=[[4, 8], [2, 8]])
    scenario = Scenario(
        demand=np.array([[[4, 2], [4, 2]], [[2, 4], [1, 2]], [[1, 1], [1, 1]]], float),
        duration=np.array([[1, 3], [2, 1], [1, 1]], float),
        delta=np.array([3.0, 6.0]),
    )
    env.reset(options={"scenarios": [scenario]})
    env.reach[:] = 0, 1  # the actions are servers
    # both on server 0: x_cpu = 2 until the first ends at 2, having lost 1; the second goes on alone, 1 lost, 1 left
    _, reward, terminated, truncated, info = env.step(np.array([[0, 0]]))
    np.testing.assert_allclose(info["played"]["x"][0], [[2, 0.5], [0, 0]])
    np.testing.assert_allclose(reward, -(1 / 1 + 1 / 3) / 2)
    np.testing.assert_allclose(env.x[0], [[1, 0.25], [0, 0]])
    np.testing.assert_allclose(env.work_left[:4], [0, 1, 2, 1])
    assert not terminated[0] and not truncated[0]
    # a third joins it: x_cpu = 1.5 for 1.5, each loses 0.5; the fourth is alone on server 1
    _, reward, terminated, truncated, info = env.step(np.array([[0, 1]]))
    np.testing.assert_allclose(info["played"]["x"][0], [[1.5, 0.75], [0.5, 0.25]])
    np.testing.assert_allclose(reward, -(0.5 / 3 + 0.5 / 2) / 2)
    np.testing.assert_allclose(env.x, 0)
    assert not terminated[0] and truncated[0]
    # offered load: both of round 0 arrive with 8 vCPU, the second one is just over when round 1 begins
    np.testing.assert_allclose(env.offered_load[:, 0], [[8, 4], [3, 6], [2, 2]])


@pytest.mark.parametrize("load", [0.6, 3.0])
@pytest.mark.parametrize("odd", [False, True])
def test_equals_event_by_event_simulation(load, odd):
    env, rng = CloudEnv(2, 6, rounds=25, load=load), np.random.default_rng(0)
    env.reset(seed=1)
    if odd:  # ties, tasks without duration, rounds at one moment, and times of 1e9 rounds
        env.duration[:, 0] = np.ceil(env.duration[:, 0])
        env.duration[::2, :, ::2] = 0
        env.duration[::5, :, 1] = 1e9
        env.delta[:] = 1
        env.delta[::3] = 0
        env.delta[20] = 1e9
    scenarios = [scenario_of(env, e) for e in range(2)]
    env.reset(options={"scenarios": scenarios})
    rounds = []
    for _ in range(25):
        actions = rng.integers(6, size=(2, 6))
        _, reward, _, _, info = env.step(actions)
        rounds.append((reward, info["played"]["x"], env.reach[np.arange(6), actions]))
    rewards, states, servers = map(np.array, zip(*rounds))
    left = env.work_left.reshape(26, 2, 6)[:25]
    for e, scenario in enumerate(scenarios):
        slow_rewards, slow_states, slow_left = slow_episode(scenario, env.capacity, servers[:, e])
        np.testing.assert_allclose(rewards[:, e], slow_rewards, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(states[:, e], slow_states, atol=1e-9)
        np.testing.assert_allclose(left[:, e].sum(), slow_left, rtol=1e-9, atol=1e-6)
    assert np.sum(rewards) < -1  # there was contention


def test_long_run_load_is_the_option():
    env = CloudEnv(8, 60, rounds=1000, load=0.7)
    env.reset(seed=1)
    np.testing.assert_allclose(env.delta.mean(), 1, rtol=0.01)
    np.testing.assert_allclose(env.duration.mean(), cloud_env.MEAN_DURATION, rtol=0.01)
    # Little's law: the work that arrives per unit of time is the mean demand present if nothing slows down
    work = (env.demand * env.duration[..., None])[:-1].sum((0, 1, 2))
    np.testing.assert_allclose(work / env.delta.sum() / env.capacity.sum(0), 0.7, rtol=0.01)


def test_fleet_and_reach():
    env = CloudEnv(1, 24)
    assert sorted(map(tuple, env.capacity)) == sorted(2 * [tuple(kind) for kind in CATALOGUE])
    assert len(set(map(tuple, CATALOGUE))) == 12
    assert env.reach.shape == (24, 8) and CloudEnv(1, 3).reach.shape == (3, 3)
    assert (np.bincount(env.reach.ravel()) == 8).all()  # every server is reached by K agents
    assert all(len(set(servers)) == 8 for servers in env.reach)
    assert sorted(np.concatenate(env.turns)) == list(range(24))
    for turn in env.turns:
        assert len(np.unique(env.reach[turn])) == env.reach[turn].size


def test_observation_and_state_by_hand():
    env = CloudEnv(2, 9, load=1.5)
    env.reset(seed=1)
    obs, _, _, _, info = env.step(np.zeros((2, 9), int))
    # of the round that is about to be played
    offered, demand = env.offered_load[1] / env.capacity.sum(0), env.demand[1] / env.capacity.mean(0)
    parts = env.x.reshape(2, -1), offered, demand.reshape(2, -1), np.log(env.duration[1])
    np.testing.assert_allclose(info["state"], np.concatenate(parts, 1), rtol=1e-5)
    e, i, k = 1, 4, 2
    server, demand = env.reach[i, k], env.demand[1, e, i]
    capacity, duration = env.capacity[server], env.duration[1, e, i]
    expected = [*np.log(1 + env.x[e, server]), *demand / capacity, *np.log(capacity), np.log(duration)]
    np.testing.assert_allclose(obs[e, i, k], expected, rtol=1e-5)
    _, _, _, _, info = env.step(np.full((2, 9), k))
    np.testing.assert_allclose(info["played"]["demand"][e, i], demand)
    np.testing.assert_allclose(info["played"]["offered_load"], env.offered_load[1])


def test_best_fit_takes_the_tightest_server_that_fits():
    def chosen(demand, x=((0, 0), (0, 0), (0, 0))):
        env = CloudEnv(1, len(demand), rounds=1, capacity=[[8, 8], [4, 4], [2, 2]])
        tasks = np.array([demand, demand], float)
        env.reset(options={"scenarios": [Scenario(tasks, np.ones(tasks.shape[:2]), np.ones(1))]})
        env.x[0] = x
        return list(env.reach[np.arange(len(demand)), env.heuristic()[0]][np.concatenate(env.turns)])

    assert chosen([[1, 1]]) == [2]
    assert chosen([[3, 1]]) == [1]  # CPU does not fit on 2
    assert chosen([[1, 5]]) == [0]  # memory fits on 0 only
    assert chosen([[1, 1]], x=[[0, 0], [0, 0], [0.9, 0]]) == [1]
    assert chosen([[9, 1]]) == [0]  # nowhere: 9/8 of server 0, 9/4 and 9/2 of the others
    assert chosen([[9, 1]], x=[[2, 0], [0.75, 0], [0, 0]]) == [1]  # 25/8, 12/4 and 9/2
    assert chosen([[2, 2]] * 3) == [2, 1, 1]  # sees the placements of its round


def some_rows(count):
    """Rows of a trace, each of another duration."""
    k = np.arange(count)
    return np.stack([7.0 * k + k % 3, 20 + k, 1 + k % 5, 1.5 + k % 7], 1)


def test_trace_becomes_rounds_of_consecutive_tasks():
    """The training's stretches begin anywhere in the first 80 %, the evaluation's lie evenly in the last 20 %."""
    table, seen = some_rows(60), set()
    duration = table[:, 1] / table[:48, 1].mean() * cloud_env.MEAN_DURATION  # in rounds; they tell rows apart
    write_trace("trace.csv", table)
    np.testing.assert_array_equal(load_trace("trace.csv"), table)
    env = CloudEnv(1, 4, rounds=9, load=0.6, trace="trace.csv")  # 48 rows, a stretch has 40
    for seed in range(100):
        env.reset(seed=seed)
        start = np.abs(duration - env.duration[0, 0, 0]).argmin()
        seen.add(start)
        rows = table[start : start + 40]
        seconds_per_round = 4 * (table[47, 0] - table[0, 0]) / 48  # in the part that is trained on
        np.testing.assert_allclose(env.delta[:, 0], np.diff(rows[::4, 0]) / seconds_per_round)
        np.testing.assert_allclose(env.duration.ravel(), duration[start : start + 40])
        scale = env.demand.reshape(40, 2) / rows[:, 2:]
        np.testing.assert_allclose(scale, np.tile(scale[0], (40, 1)))
    assert seen == set(range(9))
    assert "trace of 48 tasks, 1 episodes; rounds " in str(env)
    assert f"at most; the largest task takes {(env.demand / env.capacity.mean(0)).max():.2g} mean servers" in str(env)
    env = CloudEnv(4, 1, rounds=2, trace="trace.csv", held_out=True)
    for seed in (1, 2):
        env.reset(seed=seed)
        np.testing.assert_allclose(env.duration[0, :, 0], duration[[48, 51, 54, 57]])


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("bursts", [False, True])
def test_the_load_of_a_trace_is_what_is_simulated(bursts, held_out):
    """Where some tasks are as long as 20 episodes; or of bursts, most of them without duration."""
    rng, row = np.random.default_rng(1), np.arange(900)
    arrival = row // 100 * 9.0 if bursts else row
    duration = np.where(row % 9, 0.0, 40.0) if bursts else np.where(row % 50, row / 100, 1600.0)
    write_trace("trace.csv", zip(arrival, duration, rng.uniform(1, 9, 900) * (1 + row), rng.uniform(1, 30, 900)))
    env = CloudEnv(3, 4, rounds=20, load=0.7, trace="trace.csv", held_out=held_out)
    for seed, e in itertools.product((0, 5), range(3)):
        env.reset(seed=seed)
        never_full = 1e9 * env.capacity.sum(0)
        _, states, _ = slow_episode(scenario_of(env, e), never_full[None], np.zeros((20, 4), int))
        load = 1e9 * np.array(states)[:, 0]  # as a fraction of the fleet's capacity
        np.testing.assert_allclose(load.mean(0), 0.7)
        np.testing.assert_allclose(env.offered_load[:-1, e] / env.capacity.sum(0), load, atol=1e-12)
    assert "offered load 0.700 of CPU, 0.700 of memory in 3 x 20 rounds" in str(env)


def test_rounding_errors_are_no_load():
    """Where all tasks have left nothing is below zero."""
    env, rng = CloudEnv(1, 5, rounds=40), np.random.default_rng(0)
    demand = np.where(np.arange(41) % 4, 0.0, 1.0)[:, None, None] * rng.uniform(0.1, 1, (41, 5, 2))
    env.reset(options={"scenarios": [Scenario(demand, rng.integers(3, size=(41, 5)) + 0.5, np.ones(40))]})
    assert (env.offered_load >= 0).all()
    np.testing.assert_allclose(env.offered_load[3::4], 0, atol=1e-12)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "line 0 .*no column arrival_s"),
        ("arrival_s,duration_s,cpu\n1,2,3\n", "line 1 of the columns arrival_s, duration_s, cpu: no column memory_gib"),
        (HEADER, "line 1 .*no row below the header"),
        (HEADER.replace("\n", ",cpu\n") + "0,60,1,2,99\n", "cpu.*more than once"),
        (HEADER + "0,60,0,5,2\n", "line 2 of the columns arrival_s, duration_s, cpu, memory_gib: .* 5 were found"),
        ("name," + HEADER + '"a, b",0,1,1,1\na, b,0,1,1,1\n', "line 3 .* 6 were found"),  # quoted or not
        (HEADER + "0,1,1,1\n1,1,1,many\n", "line 3 .*'many'.*column 4"),
        (HEADER + "0,1,1,1\n1,-1,1,1\n", "line 3: duration_s"),
        (HEADER + "0,1,1,1\n1,1,nan,1\n", "line 3: cpu"),
        (HEADER + "0,1,1,inf\n", "line 2: memory_gib"),
        (HEADER + "0,1,1,1\n5,1,1,1\n4,1,1,1\n", "line 4: arrival_s.*not sorted"),
        (b"\xff\xfe\x00", "trace .*: "),
    ],
)
def test_bad_traces_are_refused_by_line_and_column(text, message):
    Path("t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message):
        load_trace("t.csv")


def test_trace_in_any_order_of_columns_is_read_once_and_again_when_it_has_changed():
    """Also with other columns, a BOM and CRLF."""
    text = "\ufeffcpu,memory_gib,name,arrival_s,duration_s\r\n1,2,#,3,4\r\n5,6,b,7,8\r\n"
    Path("t.csv").write_bytes(text.encode())
    first = load_trace("t.csv")
    np.testing.assert_array_equal(first, [[3, 4, 1, 2], [7, 8, 5, 6]])
    assert load_trace("t.csv") is first
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 0
    write_trace("t.csv", [(0, 1, 1, 5)])
    assert load_trace("t.csv")[0, 3] == 5


def test_what_cannot_be_scaled_or_is_too_short_is_refused():
    for column, rows, value, message in (
        (0, slice(1, None), 1.5e9, "line 3: arrival_s outweighs"),  # one arrival of 0 among times of an epoch
        (3, slice(9, 10), 4e9, "line 11: memory_gib outweighs"),  # in bytes
        (0, slice(None), 7, "arrival_s is the same or 0 in all rows of the first 80 %"),
        (2, slice(None), 0, "cpu is the same or 0"),
    ):
        table = some_rows(400)
        table[rows, column] = value
        write_trace("t.csv", table)
        with pytest.raises(InputError, match=message):
            CloudEnv(1, 1, rounds=79, trace="t.csv", held_out=True)
    write_trace("t.csv", some_rows(395))
    with pytest.raises(InputError, match=r"its last 20 % has 79 rows, n_agents x \(rounds \+ 1\) = 80 needed"):
        CloudEnv(1, 1, rounds=79, trace="t.csv", held_out=True)


def test_actions_are_integers_and_what_is_handed_out_is_not_the_environments_own():
    env = CloudEnv(1, 4)
    env.reset(seed=1)
    with pytest.raises(ValueError, match="actions must be integers"):
        env.step(np.zeros((1, 4)))
    obs, _, _, _, info = env.step(np.zeros((1, 4), int))
    own = [value for value in vars(env).values() if isinstance(value, np.ndarray)]
    for array in (obs, info["state"], *info["played"].values(), *env.constants.values()):
        assert not any(np.shares_memory(array, mine) for mine in own)
