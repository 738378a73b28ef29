"""What is wrong with a system of one's own, found without training, and what to expect from it.

    check(make_env(args, 2), model)  # seconds at N = 20

Letters in shapes: E environments, N agents, K actions, F features, S numbers of the state, M components of x, R
quantities of each, J components that an action touches, T rounds; B = T E states, as in a batch of the training.
"""

import copy
from functools import partial

import numpy as np
import torch

SEED = 10**12  # the scenarios that are evaluated on
CONTRACT = {  # axes and numbers
    "obs": ("ENKF", "float32"),
    'info["state"]': ("ES", "float32"),
    "reward": ("E", "float"),
    "terminated": ("E", "bool"),
    "truncated": ("E", "bool"),
    'info["played"]["x"]': ("EMR", "float"),
    "actions of env.heuristic": ("EN", "int"),
    "x̃ of model.reference_state": ("BMR", "float"),
    "z of model.local_influence": ("BNKJR", "float"),
    "touched of model.local_influence": ("BNKJ", "int"),
}


def array(what, value, sizes, kind=np.ndarray):
    """A copy of what must be as in CONTRACT, as a tensor. sizes: the length of every axis, as it was first seen."""
    axes, number = CONTRACT[what]
    what += f" must be a {kind.__name__} [{', '.join(axes)}] of {number}"
    assert isinstance(value, kind), f"{what}, not {type(value).__name__}"
    assert value.ndim == len(axes), f"{what}, not of shape {list(value.shape)}"
    for axis, size in zip(axes, value.shape):
        expected = f"{axis} = {sizes.setdefault(axis, size)}" + " as in obs" * (axis in "ENK")
        assert size == sizes[axis], f"{what} with {expected}, not {list(value.shape)}"
    assert number in str(value.dtype), f"{what}, not of {value.dtype}"
    value = value if kind is torch.Tensor else torch.tensor(value)
    assert value.isfinite().all() and not value.requires_grad, f"{what}, all finite and without a gradient"
    return value


def tensors(arrays, what):
    assert isinstance(arrays, dict), f"{what} must be a dict of arrays, not {type(arrays).__name__}"
    for name, value in arrays.items():
        assert (
            np.asarray(value).dtype.kind in "biuf"
        ), f'{what}["{name}"] must be an array of numbers, not {value!r:.50}'
    return {name: torch.tensor(value) for name, value in arrays.items()}


def observed(obs, info, sizes):
    assert isinstance(info, dict), f"info must be a dict, not {type(info).__name__}"
    return array("obs", obs, sizes), array('info["state"]', info.get("state"), sizes)


def reset(env, seed, sizes):
    return observed(*env.reset(seed=seed), sizes)


def heuristic(env, sizes):
    actions = env.heuristic()
    lowest, highest = array("actions of env.heuristic", actions, sizes).aminmax()
    assert 0 <= lowest and highest < sizes["K"], f"actions of env.heuristic must be below K = {sizes['K']}: {actions}"
    return actions


def step(env, actions, t, sizes):
    """Play round t. Returns obs, state and reward, and what was played."""
    obs, reward, terminated, truncated, info = env.step(actions.copy())
    end = t + 1 == env.rounds
    assert not array("terminated", terminated, sizes).any(), "terminated must be False: an episode ends as truncated"
    ended = array("truncated", truncated, sizes)
    assert (ended == end).all(), f"truncated must be {end} after {t + 1} of {env.rounds} rounds, not {truncated}"
    seen = *observed(obs, info, sizes), array("reward", reward, sizes)
    played = tensors(info.get("played"), 'info["played"]')
    array('info["played"]["x"]', info["played"].get("x"), sizes)
    for name, value in played.items():
        assert value.shape[:1] == reward.shape, f'info["played"]["{name}"] must be [E, ...], not {list(value.shape)}'
    return seen, played


def episode(env, seed, plan, sizes, before=lambda t: None):
    """Play actions [T, E, N]. Returns obs, state and reward [T, E, ...], and what was played [T E, ...] by name."""
    reset(env, seed, sizes)
    rounds = []
    for t, actions in enumerate(plan):
        before(t)
        rounds.append(step(env, actions, t, sizes))
    seen, played = zip(*rounds)
    return [torch.stack(part) for part in zip(*seen)], join(played)


def join(rounds):
    return {name: torch.cat([played[name] for played in rounds]) for name in rounds[0]}


def difference(one, other):
    """In what two episodes differ."""
    return [name for name, *both in zip(("obs", "state", "reward"), one, other) if not torch.equal(*both)]


def alike(one, other):
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def modelled(model, played, constants, sizes, states=slice(None)):
    """x̃, z and touched of some states."""
    given = {name: value[states] for name, value in played.items() if name != "x"} | constants
    sizes = sizes | {"B": len(played["x"][states])}
    x_ref = array("x̃ of model.reference_state", model.reference_state(**given), sizes, torch.Tensor)
    z, touched = model.local_influence(**given)
    array("z of model.local_influence", z, sizes, torch.Tensor)
    array("touched of model.local_influence", touched, sizes, torch.Tensor)
    assert touched.min() >= 0 and touched.max() < sizes["M"], f"touched must be from 0 to M - 1 = {sizes['M'] - 1}"
    padding = -1 - torch.arange(touched.shape[-1])  # may repeat a component
    rows = torch.where((z != 0).any(-1), touched, padding).sort(-1).values
    assert (rows.diff() != 0).all(), "touched repeats a component in a row where z is not 0: add up its z"
    return x_ref, z, touched


def put(x, z, touched, actions, sign):
    """x [B, M, R] with what these actions [B, N] add to it, or without it."""
    own = z.take_along_dim(actions[..., None, None, None], 2).flatten(1, 3)  # [B, N J, R]
    where = touched.take_along_dim(actions[..., None, None], 2).flatten(1).long().unsqueeze(-1)
    return x.scatter_add(1, where.expand(own.shape), sign * own.to(x.dtype))


def lowering(deviation, z, touched, turns, share):
    """Actions [E, N]: in each turn these agents take argmin_a ⟨x_{−i} + share z_i(a) − x̃, z_i(a)⟩ at once.

    With share = 1 that is g_i(a), with ½ what a adds to d = ½‖x − x̃‖². deviation: x − x̃ [E, M, R], x without any agent.
    turns: slices of agents, who leave what they took before.
    """
    deviation, z, touched = deviation.numpy(), z.numpy(), touched.numpy()
    every, agents = np.arange(len(z))[:, None], np.arange(z.shape[1])
    actions = np.zeros(z.shape[:2], dtype=int)
    own = np.zeros_like(z[:, :, 0])  # nobody is there yet
    for turn in turns:
        np.subtract.at(deviation, (every[..., None], touched[every, agents[turn], actions[:, turn]]), own[:, turn])
        there = deviation[every[..., None, None], touched[:, turn]]
        actions[:, turn] = ((there + share * z[:, turn]) * z[:, turn]).sum((-2, -1)).argmin(-1)
        own[:, turn] = z[every, agents[turn], actions[:, turn]]
        np.add.at(deviation, (every[..., None], touched[every, agents[turn], actions[:, turn]]), own[:, turn])
    return actions


def check(env, model):
    """Raise an AssertionError about a system's first mistake. Without any, print and return five policies' returns."""
    sizes = {}
    constants = tensors(env.constants, "env.constants")
    E, N, K, _ = reset(env, SEED, sizes)[0].shape
    heuristic(env, sizes)
    plan = torch.randint(K, (env.rounds, E, N), generator=torch.Generator().manual_seed(0))
    others = (plan + 1) % K
    agent = torch.arange(env.rounds * E).view(-1, E, 1) % N  # one in each round and environment
    changed = plan.scatter(2, agent, others.gather(2, agent))

    # the same seed, the same scenario
    probes = []  # the rounds of `plan`, each with another action of one agent

    def probe(t):
        probes.append(step(copy.deepcopy(env), changed[t].numpy(), t, sizes)[1])

    seen, played = episode(env, SEED, plan.numpy(), sizes, probe)
    unlike = difference(seen, episode(env, SEED, plan.numpy(), sizes)[0])
    assert not unlike, f"same seed, same actions, other {unlike}: all that is random must come from the seed alone"
    unlike = difference(seen, episode(env, SEED, plan.numpy(), sizes, lambda t: heuristic(env, sizes))[0])
    assert not unlike, f"other {unlike} after env.heuristic(): it must change nothing, nor draw the scenario's numbers"
    assert difference(seen, episode(env, 1, plan.numpy(), sizes)[0]), f"seeds 1 and {SEED} give the same scenario"
    obs = seen[0]
    assert K == 1 or (obs != obs[:, :, :, :1]).any(), "obs is the same for all actions, so that none can be preferred"

    # z does not depend on the actions, and x moves as it says
    twice = [name for name in played if name in constants]
    assert not twice, f'{twice} must not be both in env.constants and in info["played"]'
    probed = join(probes)
    some = slice(None, None, 7)  # every 7th state, for time's sake
    now, with_other = (modelled(model, rounds, constants, sizes, some) for rounds in (played, probed))
    for name, k in (("z", 1), ("touched", 2)):
        assert alike(now[k], with_other[k]), f"{name} depends on the actions of its round"
    x_ref, z, touched = modelled(model, played, constants, sizes)
    x = played["x"]
    moves = probed["x"] - x
    says = put(put(x, z, touched, plan.flatten(0, 1), -1), z, touched, changed.flatten(0, 1), 1) - x
    error = (moves - says).abs() - 1e-3 * z.abs().amax((0, 1, 2, 3)) - 1e-5 * x.abs().amax((0, 1))
    b, m, r = map(int, torch.unravel_index(error.argmax(), error.shape))
    t, e, i = b // E, b % E, agent.flatten()[b]
    assert error[b, m, r] <= 0, (
        f"round {t}, environment {e}, agent {i}: with action {changed[t, e, i]} instead of {plan[t, e, i]} "
        f"x[{e}, {m}, {r}] moves by {moves[b, m, r]:.4g}, z says by {says[b, m, r]:.4g}: z, touched or the moment of x "
        "is wrong (to add to repeated components takes np.add.at)"
    )

    # x̃ does not depend on the actions
    assert alike(now[0], with_other[0]), "x̃ depends on the actions of its round"
    then = modelled(model, episode(env, SEED, others.numpy(), sizes)[1], constants, sizes, some)
    assert alike(now[0], then[0]), "x̃ depends on the actions of earlier rounds, or the scenario does"

    # what to expect
    if N > 1 and (obs == obs[:, :, :1]).all():
        print("obs is the same for all agents: they can only draw lots")

    def greedy(turns, share, t):
        _, played = step(copy.deepcopy(env), plan[t].numpy(), t, sizes)
        x = played.pop("x")
        z, touched = model.local_influence(**played, **constants)
        deviation = put(x, z, touched, plan[t], -1) - x_ref.unflatten(0, (-1, E))[t]
        return lowering(deviation, z, touched, turns, share)

    rounds = min(env.rounds, 1 + 10_000 // N)
    in_turn = [slice(i, i + 1) for i in range(N)] * 5
    policies = {
        "heuristic": lambda t: heuristic(env, sizes),
        "random": lambda t: plan[t].numpy(),
        "all at once, lowering g": partial(greedy, [slice(None)], 1.0),
        "in turn, lowering g": partial(greedy, in_turn, 1.0),
        "in turn, lowering d": partial(greedy, in_turn, 0.5),
    }
    print(f"{rounds} rounds of {E} x {N} agents; return, and cost in units of the heuristic's")
    returns = {}
    for name, policy in policies.items():
        reset(env, SEED, sizes)
        returns[name] = total = sum(step(env, policy(t), t, sizes)[0][2].mean().item() for t in range(rounds))
        assert total <= 0, f"reward must be below 0 in sum, not {total} ({name})"
        print(f"{name:24} {total:12.2f} {total / (returns['heuristic'] or np.nan):8.2f}")
    print("'in turn' far above the heuristic would say that x̃ is wrong, or weighs components unlike the cost")
    print("'lowering g' far above 'lowering d', in turn, would say that the bias of g is large (examples/README.md)")
    return returns
