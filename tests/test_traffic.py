"""examples/traffic: the network and its routes, the environment, its model against it, assignment, and learning."""

import itertools

import numpy as np
import pytest
import torch

import dgpg
from examples.traffic import traffic_model as model
from examples.traffic.__main__ import Args, make_env
from examples.traffic.traffic_env import STAY, TrafficEnv, load_network, shortest_routes

ENDS, CAPACITY, FREE_TIME, USUAL, TRIPS = load_network()


def total_time(flow):
    """Σ v t(v), from the definition."""
    return (flow * FREE_TIME * (1 + 0.15 * (flow / CAPACITY) ** 4)).sum(-1)


def supply(flow):
    """What leaves each zone less what enters it. flow: [..., L]. Returns [..., 24]."""
    return flow @ (np.eye(24)[ENDS[:, 0]] - np.eye(24)[ENDS[:, 1]])


def gap(trips, flow):
    """What would be gained, to first order, by moving all vehicles to routes of least marginal cost, as a fraction."""
    marginal = FREE_TIME * (1 + 0.75 * (flow / CAPACITY) ** 4)
    least = np.where(np.eye(24, dtype=bool), 0, np.inf)
    least[ENDS[:, 0], ENDS[:, 1]] = marginal
    for via in range(24):
        least = np.minimum(least, least[:, [via]] + least[via])
    return 1 - (trips * least).sum() / (marginal * flow).sum()


def random_actions(env):
    return np.random.default_rng(env.t).integers(env.n_routes, size=(env.num_envs, env.n_agents))


def played_round(n_agents, actions=None, seed=3, before=2, load=0.8, routes=4):
    """The environment after `before` random rounds and one with these actions, and that round's tensors."""
    env = TrafficEnv(2, n_agents, 10, load, routes)
    env.reset(seed)
    for _ in range(before):
        env.step(random_actions(env))
    _, reward, _, _, info = env.step(random_actions(env) if actions is None else actions)
    tensors = {name: torch.as_tensor(value) for name, value in (info["played"] | env.constants).items()}
    return env, reward, tensors


def test_network_is_the_published_one():
    """Its equilibrium's total time is the best known one, and its flows carry the published trips."""
    assert len(ENDS) == 76 and TRIPS.sum() == 360_600
    assert total_time(USUAL) == pytest.approx(7_480_225.3, abs=1)
    np.testing.assert_allclose(supply(USUAL), TRIPS.sum(1) - TRIPS.sum(0), atol=0.01)


@pytest.mark.parametrize("pair", [24 * 0 + 19, 24 * 9 + 15, 24 * 12 + 1])
def test_routes_are_the_quickest_of_all_without_a_loop(pair):
    routes = shortest_routes(ENDS, FREE_TIME, pair, 8)
    times, every = [FREE_TIME[links].sum() for links in routes], []

    def walk(zones, time):
        if zones[-1] == pair % 24:
            every.append(time)
            return
        for link in np.flatnonzero(ENDS[:, 0] == zones[-1]):
            if ENDS[link, 1] not in zones and time + FREE_TIME[link] <= times[-1]:
                walk([*zones, ENDS[link, 1]], time + FREE_TIME[link])

    walk([pair // 24], 0)
    assert times == sorted(every)[:8] and len({tuple(links) for links in routes}) == 8
    for links in routes:
        assert ENDS[links[0], 0] == pair // 24 and ENDS[links[-1], 1] == pair % 24
        assert (ENDS[links[:-1], 1] == ENDS[links[1:], 0]).all()


def test_a_fleet_by_hand():
    """One dispatcher on empty roads: time lost on its route; after a round half of its flow is left."""
    env = TrafficEnv(1, 1, 5)
    env.reset(0)
    links, q = env.routes[0, 3][env.on[0, 3]], env.fleet[0, 0, 0]
    _, reward, _, _, info = env.step(np.array([[3]]))
    lost = sum(FREE_TIME[link] * (1 + 0.15 * (q / CAPACITY[link]) ** 4) for link in links)
    quickest = sum(FREE_TIME[link] for link in env.routes[0, 0][env.on[0, 0]])
    np.testing.assert_allclose(reward, 1 - lost / quickest)
    env.step(np.array([[0]]))
    elsewhere = np.setdiff1d(links, env.routes[0, 0])
    assert len(elsewhere) and env.flow[0, elsewhere] == pytest.approx(q / 2)


def test_reward_is_the_time_lost_by_all_that_are_on_the_way():
    """In the third round: of the vehicles of all three, each round's half as many as before."""
    env, reward, _ = played_round(5)
    on_the_way = env.fleet[2] + env.fleet[1] / 2 + env.fleet[0] / 4
    quickest = np.array([FREE_TIME[links[on]].sum() for links, on in zip(env.routes[:, 0], env.on[:, 0])])
    np.testing.assert_allclose(reward, 1 - total_time(env.flow) / (on_the_way @ quickest))


def test_observation_by_hand():
    env, _, _ = played_round(9)
    obs, info = env._observe()
    e, i, k = 1, 4, 2
    links, fleet, load = env.routes[i, k][env.on[i, k]], env.fleet[env.t, e, i], 0.8
    quickest, empty = FREE_TIME[env.routes[i, 0][env.on[i, 0]]].sum(), FREE_TIME[links].sum()
    flow, c, t0 = env.flow[e, links], CAPACITY[links], FREE_TIME[links]
    now = (t0 * (1 + 0.15 * (flow / c) ** 4)).sum()
    usual = (t0 * (1 + 0.75 * (load * USUAL[links] / c) ** 4)).sum()
    after = env.flow[e] / 2
    after[links] += fleet
    alone = (total_time(after) - total_time(env.flow[e] / 2)) / fleet
    size = fleet / (0.5 * load * 360_600 / 9)
    expected = [empty / quickest, *np.log(np.array([now, usual, alone]) / quickest), (flow / c).max(), empty / 20, size]
    np.testing.assert_allclose(obs[e, i, k], expected, rtol=1e-4)
    sizes = (env.fleet[env.t, e], env.fleet[2, e] + env.fleet[1, e] / 2 + env.fleet[0, e] / 4)
    sizes = np.concatenate(sizes) / (0.5 * load * 360_600 / 9)
    np.testing.assert_allclose(info["state"][e], np.concatenate([env.flow[e] / CAPACITY, sizes]), rtol=1e-5)


@pytest.mark.parametrize("n_agents", [20, 100])
def test_vehicles_and_demand_are_conserved(n_agents):
    """The flows carry everything on the way from origin to destination; in the long run it is the published demand."""
    env, _, played = played_round(n_agents, before=4)
    demand = np.zeros((2, 24, 24))
    np.add.at(demand, (slice(None), *np.divmod(env.constants["pair"], 24)), env.present)
    np.testing.assert_allclose(supply(env.flow), demand.sum(2) - demand.sum(1), atol=1e-6)
    flow = model.reference_state(**played).squeeze(-1).numpy() * env.constants["unit"]
    np.testing.assert_allclose(supply(flow), demand.sum(2) - demand.sum(1), atol=1e-3)
    assert all(0 <= gap(*both) < 0.09 for both in zip(demand, flow))  # 0.1 to 0.3 in the user equilibrium
    env = TrafficEnv(1, n_agents, 99)
    env.reset(0)
    assert env.fleet.sum(-1).mean() / (1 - STAY) == pytest.approx(0.8 * 360_600, rel=0.02)


def test_reference_policies_choose_as_they_say():
    """Recomputed route by route and link by link: the least total with all before it, the least time as forecast."""
    env, _, _ = played_round(30)
    greedy, at_once = env.heuristic(), env.uncoordinated()
    for e in range(2):
        flow, forecast = env.flow[e] / 2, env.flow[e] / 2 + 0.8 * USUAL / 2
        time = FREE_TIME * (1 + 0.15 * (forecast / CAPACITY) ** 4)
        for i in range(30):
            routes = [links[on] for links, on in zip(env.routes[i], env.on[i])]
            after = np.repeat(flow[None], 4, 0)
            for k, links in enumerate(routes):
                after[k, links] += env.fleet[env.t][e, i]
            assert greedy[e, i] == total_time(after).argmin()
            assert at_once[e, i] == np.argmin([time[links].sum() for links in routes])
            flow = after[greedy[e, i]]
    assert (greedy != at_once).any()


def test_guidance_is_the_gradient_of_the_deviation_by_enumeration():
    """E[g_i ∇log π_i] over all joint actions is ∇E[d + ½ Σ_i ‖z_i‖²]; routes overlap, of one agent and of several."""
    N, K, logits = 4, 3, torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    probs = logits.requires_grad_().softmax(-1)
    potential, found = 0, 0
    x_ref = model.reference_state(**played_round(N, load=0.3, routes=K)[2])
    for joint in itertools.product(range(K), repeat=N):
        actions = np.tile(joint, (2, 1))
        _, _, played = played_round(N, actions, load=0.3, routes=K)
        z, touched = model.local_influence(**played)
        x = played["x"]
        g = dgpg.guidance(x, x_ref, z, touched, torch.as_tensor(actions))
        own = [(i, k) for i, k in enumerate(joint)]
        chance = torch.stack([probs[i, k] for i, k in own]).prod()
        norms = torch.stack([z[:, i, k].square().sum((-2, -1)) for i, k in own]).sum(0)
        deviation = (x - x_ref).square().sum((-2, -1)) / 2
        potential = potential + (chance * (deviation + norms / 2)).sum()
        log = torch.stack([probs[i, k].log() for i, k in own])
        taken = torch.stack([g[:, i, k].sum() for i, k in own])
        found = found + chance.detach() * torch.autograd.grad((taken * log).sum(), logits, retain_graph=True)[0]
    on = [[set(links[on].tolist()) for links, on in zip(*pair)] for pair in zip(played["routes"], played["on"])]
    assert any(a & b for i, j in itertools.combinations(range(N), 2) for a in on[i] for b in on[j])
    assert any(a & b for own in on for a, b in itertools.combinations(own, 2))
    torch.testing.assert_close(found, torch.autograd.grad(potential, logits)[0], rtol=1e-9, atol=1e-12)


def published_assignment(weight, steps):
    ends, capacity, free_time = (torch.as_tensor(part) for part in (ENDS, CAPACITY, FREE_TIME))
    return model.assignment(torch.as_tensor(TRIPS)[None], ends, capacity, free_time, weight, steps)[0].numpy()


def test_user_equilibrium_is_the_published_one():
    flow = published_assignment(1, 250)
    assert total_time(flow) == pytest.approx(7_480_225.3, rel=1e-3)
    np.testing.assert_allclose(flow, USUAL, rtol=0.05)


def test_no_flow_is_better_than_the_system_optimum():
    """Convexity bounds the least total from below by this one less its gap. KKT: only routes of least cost are used."""
    flow = published_assignment(5, 400)
    least = total_time(flow) - gap(TRIPS, flow) * (FREE_TIME * (1 + 0.75 * (flow / CAPACITY) ** 4) * flow).sum()
    assert 0.997 * total_time(flow) < least < total_time(flow) == pytest.approx(7_194_256, rel=1e-3)


@pytest.mark.parametrize("weight", [1, 5])
def test_assignment_on_two_routes_by_bisection(weight):
    """Zone 0 to 1 directly, or by 2: where both are used they cost the same."""
    ends, capacity = torch.tensor([[0, 1], [0, 2], [2, 1]]), torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64)
    free_time, trips = torch.tensor([3.0, 1.0, 1.0], dtype=torch.float64), torch.zeros(1, 3, 3, dtype=torch.float64)
    trips[0, 0, 1] = 4.0
    low, high = 0.0, 4.0
    for _ in range(60):
        direct = (low + high) / 2
        dearer = 3 * (1 + 0.15 * weight * direct**4) > 2 * (1 + 0.15 * weight * ((4 - direct) / 2) ** 4)
        low, high = (low, direct) if dearer else (direct, high)
    flow = model.assignment(trips, ends, capacity, free_time, weight, 800)[0]
    torch.testing.assert_close(flow, torch.tensor([low, 4 - low, 4 - low]).double(), rtol=0, atol=5e-3)


def test_no_policy_beats_the_reference():
    """Σ v t(v) at x̃ is a lower bound for the same vehicles; the optimum of a state does not depend on its batch."""
    env, _, played = played_round(100, before=0)
    optimum = total_time(model.reference_state(**played).squeeze(-1).numpy() * env.constants["unit"])
    for policy in (random_actions, TrafficEnv.uncoordinated, TrafficEnv.heuristic):
        env.reset(3)
        env.step(policy(env))
        assert (optimum < 1.002 * total_time(env.flow)).all()
    assert (total_time(env.flow) < 1.2 * optimum).all()  # the last one was the greedy one
    alone = {name: value[1:] if name in ("present", "fleet", "x") else value for name, value in played.items()}
    both = model.reference_state(**played)
    torch.testing.assert_close(model.reference_state(**alone)[0], both[1], rtol=1e-9, atol=1e-9)


def test_dgpg_learns_what_random_agents_miss(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = dict(n_agents=30, rounds=10, episodes=4)
    guided = dgpg.train(Args(**options), make_env, model)
    assert guided["cost_ratio"] < 10 < guided["random"] / guided["heuristic"]
