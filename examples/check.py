"""What is wrong with a system of one's own, found without training, and what to expect from it.

    check(make_env(args, 2), model)  # seconds at N = 20; raises an AssertionError that says what is wrong

Letters in shapes: E environments, N agents, K actions, F features, S numbers of the state, M components of x, R
quantities of each, J components that an action touches, T rounds; B = T E states, as in a batch of the training.
"""

import copy

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
        assert size == sizes.setdefault(axis, size), f"{what} with {axis} = {sizes[axis]}, not {list(value.shape)}"
    assert number in str(value.dtype), f"{what}, not of {value.dtype}"
    value = value if kind is torch.Tensor else torch.tensor(value)
    assert value.isfinite().all() and not value.requires_grad, f"{what}, all finite and without a gradient"
    return value


def call(what, names, function):
    """What `function` returns: as many values as `names` has."""
    try:
        result = function()
    except Exception as error:
        raise AssertionError(f"{what} raised {error!r}") from error
    found = f"{len(result)} values" if isinstance(result, tuple) else type(result).__name__
    count = len(names.split(", "))
    assert count == 1 or found == f"{count} values", f"{what} must return {names}, {count} values, not {found}"
    return result


def tensors(arrays, what):
    assert isinstance(arrays, dict), f"{what} must be a dict of arrays, not {type(arrays).__name__}"
    return {
        name: call(f'torch.tensor of {what}["{name}"]', "it", lambda: torch.tensor(arrays[name])) for name in arrays
    }


def observed(obs, info, sizes):
    assert isinstance(info, dict), f"info must be a dict, not {type(info).__name__}"
    return array("obs", obs, sizes), array('info["state"]', info.get("state"), sizes)


def reset(env, seed, sizes):
    return observed(*call("env.reset", "obs, info", lambda: env.reset(seed=seed)), sizes)


def heuristic(env, sizes):
    actions = call("env.heuristic", "actions", env.heuristic)
    lowest, highest = array("actions of env.heuristic", actions, sizes).aminmax()
    assert 0 <= lowest and highest < sizes["K"], f"actions of env.heuristic must be below K = {sizes['K']}: {actions}"
    return actions


def step(env, actions, t, sizes):
    """Play round t. Returns obs, state and reward, and what was played."""
    names = "obs, reward, terminated, truncated, info"
    obs, reward, terminated, truncated, info = call("env.step", names, lambda: env.step(actions.copy()))
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
    rounds = [(reset(env, seed, sizes), None)]
    for t, actions in enumerate(plan):
        before(t)
        rounds.append(step(env, actions, t, sizes))
    seen, played = zip(*rounds[1:])
    return [torch.stack(part) for part in zip(*seen)], join(played)


def join(rounds):
    return {name: torch.cat([played[name] for played in rounds]) for name in rounds[0]}


def difference(one, other):
    """Where two episodes first differ, "" if they do not."""
    for name, first, second in zip(("obs", "state", "reward"), one, other):
        unequal = (first != second).flatten(1).any(1).tolist()
        if any(unequal):
            return f"{name} after round {unequal.index(True) + 1}"
    return ""


def modelled(model, played, constants, sizes, states=slice(None)):
    """x̃, z and touched of some states."""
    given = {name: value[states] for name, value in played.items() if name != "x"}
    sizes = sizes | {"B": len(played["x"][states])}
    x_ref = call("model.reference_state", "x̃", lambda: model.reference_state(**given, **constants))
    array("x̃ of model.reference_state", x_ref, sizes, torch.Tensor)
    result = call("model.local_influence", "z, touched", lambda: model.local_influence(**given, **constants))
    z = array("z of model.local_influence", result[0], sizes, torch.Tensor)
    touched = array("touched of model.local_influence", result[1], sizes, torch.Tensor)
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


def lowering_g(deviation, z, touched, turns):
    """Actions [E, N]: in each turn these agents take argmin_a g_i(a) = ⟨x_{−i} + z_i(a) − x̃, z_i(a)⟩ at once.

    deviation: x − x̃ [E, M, R], x without any agent. turns: slices of agents, who leave what they took before.
    """
    deviation, z, touched = deviation.numpy(), z.numpy(), touched.numpy()
    every, agents = np.arange(len(z))[:, None], np.arange(z.shape[1])
    actions = np.zeros(z.shape[:2], dtype=int)
    own = np.zeros_like(z[:, :, 0])  # nobody is there yet
    for turn in turns:
        np.subtract.at(deviation, (every[..., None], touched[every, agents[turn], actions[:, turn]]), own[:, turn])
        there = deviation[every[..., None, None], touched[:, turn]]
        actions[:, turn] = ((there + z[:, turn]) * z[:, turn]).sum((-2, -1)).argmin(-1)
        own[:, turn] = z[every, agents[turn], actions[:, turn]]
        np.add.at(deviation, (every[..., None], touched[every, agents[turn], actions[:, turn]]), own[:, turn])
    return actions


def check(env, model):
    """Raise an AssertionError about a system's first mistake. Without any, print and return four policies' returns."""
    for name in ("rounds", "constants", "reset", "step", "heuristic"):
        assert hasattr(env, name), f"the environment has no `{name}`"
    sizes = {}
    constants = tensors(env.constants, "env.constants")
    E, N, K, _ = reset(env, SEED, sizes)[0].shape
    heuristic(env, sizes)
    plan, others = torch.randint(K, (2, env.rounds, E, N), generator=torch.Generator().manual_seed(0))

    # the same seed, the same scenario
    probes = []  # the rounds of `plan`, each with other actions

    def probe(t):
        there = call("copy.deepcopy of the environment", "it", lambda: copy.deepcopy(env))
        probes.append(step(there, others[t].numpy(), t, sizes)[1])

    seen, played = episode(env, SEED, plan.numpy(), sizes, probe)
    unlike = difference(seen, episode(env, SEED, plan.numpy(), sizes)[0])
    assert not unlike, f"same seed, same actions, other {unlike}: all that is random must come from the seed alone"
    unlike = difference(seen, episode(env, SEED, plan.numpy(), sizes, lambda t: heuristic(env, sizes))[0])
    assert not unlike, f"other {unlike} after env.heuristic(): it must change nothing, nor draw the scenario's numbers"
    assert difference(seen, episode(env, 1, plan.numpy(), sizes)[0]), f"seeds 1 and {SEED} give the same scenario"
    obs, _, reward = seen
    assert (reward.sum(0) < 0).all(), f"reward summed over an episode must be below 0, not {reward.sum(0).tolist()}"
    assert K == 1 or (obs != obs[:, :, :, :1]).any(), "obs is the same for all actions, so that none can be preferred"

    # x̃ and z do not depend on the actions
    probed = join(probes)
    some = slice(None, None, 7)  # every 7th state, for time's sake
    now = modelled(model, played, constants, sizes, some)
    for name, one, other in zip(("x̃", "z", "touched"), now, modelled(model, probed, constants, sizes, some)):
        same = one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-6)
        assert same, f"{name} depends on the actions of its round"
    then = modelled(model, episode(env, SEED, others.numpy(), sizes)[1], constants, sizes, some)
    same = torch.allclose(now[0], then[0], rtol=1e-4, atol=1e-6)
    assert same, "x̃ depends on the actions of earlier rounds, or the scenario does"

    # x moves as z says
    x_ref, z, touched = modelled(model, played, constants, sizes)
    assert z.any(), "z is 0 everywhere"
    x = played["x"]
    moved = x - probed["x"]
    said = x - put(put(x, z, touched, plan.flatten(0, 1), -1), z, touched, others.flatten(0, 1), 1)
    wrong = (moved - said).abs().amax((0, 1)) > 1e-3 * z.abs().amax((0, 1, 2, 3)) + 1e-5 * x.abs().amax((0, 1))
    ratio = (moved * said).sum() / (said * said).sum()
    assert not wrong.any(), (
        f"between two joint actions x moves {ratio:.2f} times what z says (0.5: z is twice too large; -1: it has the "
        f"wrong sign; 0: x is from before the actions; else `touched` is wrong), quantities {wrong.tolist()}"
    )

    # what to expect
    def lowering(turns):
        def policy(t):
            _, played = step(copy.deepcopy(env), plan[t].numpy(), t, sizes)
            x = played.pop("x")
            z, touched = model.local_influence(**played, **constants)
            deviation = put(x, z, touched, plan[t], -1) - x_ref.unflatten(0, (-1, E))[t]
            return lowering_g(deviation, z, touched, turns)

        return policy

    rounds = min(env.rounds, 1 + 10_000 // N)
    policies = {
        "heuristic": lambda t: heuristic(env, sizes),
        "random": lambda t: plan[t].numpy(),
        "all at once, lowering g": lowering([slice(None)]),
        "in turn, lowering g": lowering([slice(i, i + 1) for i in range(N)] * 5),
    }
    print(f"{rounds} rounds of {E} x {N} agents; return, and cost in units of the heuristic's")
    returns = {}
    for name, policy in policies.items():
        reset(env, SEED, sizes)
        returns[name] = sum(step(env, policy(t), t, sizes)[0][2].mean().item() for t in range(rounds))
        cost = returns[name] / (returns["heuristic"] or np.nan)
        print(f"{name:24} {returns[name]:12.2f} {cost:8.2f}")
    return returns
