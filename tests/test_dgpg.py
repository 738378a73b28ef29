"""The algorithm: formulas by hand and by enumeration, learning, the command line and what it writes."""

import itertools
import math
import os
import pathlib
import runpy
import shutil
import subprocess
import sys
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dgpg
import ippo
import mappo
from cloud_env import CloudEnv
from dgpg import MLP, Args, ValueNorm, gae, guidance, train

ROOT = pathlib.Path(dgpg.__file__).parent
TINY = dict(n_agents=3, episodes=2, rounds=10, load=2.0, eval_every=1, update_epochs=2, num_minibatches=3, num_steps=10)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def scalars():
    """Every scalar of the only run under runs/: {tag: [(step, value), ...]}."""
    (run,) = pathlib.Path("runs").iterdir()
    events = EventAccumulator(str(run)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def unevaluated(env, policy):
    """In place of `evaluate`."""
    env.reset(seed=10**12)
    return -1.0


def random_influence(agents, actions, components, seed):
    """z [1, N, K, J, R] and touched [1, N, K, J], J = 3: alternatives share components, rows repeat one or pad."""
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(1, agents, actions, 3, 2, generator=rng, dtype=torch.float64)
    touched = torch.randint(components, (1, agents, actions, 3), generator=rng)
    touched[0, 0, 0, 1] = touched[0, 0, 0, 0]  # a repeated component
    touched[0, 1, 0] = touched[0, 1, 1]  # two alternatives on the same components
    touched[0, 2, 1, 2], z[0, 2, 1, 2] = touched[0, 2, 1, 0], 0  # padding
    return z, touched


def dense(z, touched, components):
    """The influence of every action on all components [1, N, K, M, R]."""
    full = torch.zeros(*z.shape[:3], components, 2, dtype=z.dtype)
    return full.scatter_add(3, touched.unsqueeze(-1).expand_as(z), z)


@pytest.mark.parametrize("seed", range(5))
def test_what_the_guidance_descends_by_enumeration(seed):
    """E[g_i ∇log π_i] over all joint actions is ∇E[d + ½ Σ_i ‖z_i‖²]; so is E[Σ_a π_i(a) g_i(a) ∇log π_i(a)], the
    expectation over the own action, which has less variance."""
    N, K, M = 3, 3, 4
    z, touched = random_influence(N, K, M, seed)
    influence = dense(z, touched, M)
    x_before, x_ref = torch.rand(2, 1, M, 2, dtype=torch.float64)
    logits = torch.randn(N, K, dtype=torch.float64).requires_grad_()
    probs = logits.softmax(-1)
    score = torch.eye(K, dtype=torch.float64) - probs.detach().unsqueeze(1)  # ∇_logits log π_i(a) [N, K of a, K]
    potential, gradients, squares = 0, {"sampled": 0, "centred": 0, "expectation": 0}, {}
    for joint in itertools.product(range(K), repeat=N):
        actions = torch.tensor(joint).unsqueeze(-1)
        own = torch.stack([influence[0, i, a] for i, a in enumerate(joint)])  # [N, M, R]
        x = x_before + own.sum(0)
        weight = torch.stack([probs[i, a] for i, a in enumerate(joint)]).prod()
        potential = potential + weight * 0.5 * ((x - x_ref).square().sum() + own.square().sum())
        of_action = guidance(x, x_ref, z, touched, actions)
        assert of_action.shape == (N, 1, K)
        of_action, weight = of_action.squeeze(1), weight.detach()
        g, own_score = of_action.gather(1, actions), score[torch.arange(N), actions[:, 0]]
        torch.testing.assert_close(g.squeeze(1), ((x - x_ref) * own).sum((-2, -1)), rtol=1e-12, atol=1e-12)
        mean = (probs.detach() * of_action).sum(1, keepdim=True)
        every = (probs.detach() * (of_action - mean)).unsqueeze(-1) * score  # [N, K of a, K]
        for name, sample in dict(
            sampled=g * own_score, centred=(g - mean) * own_score, expectation=every.sum(1)
        ).items():
            gradients[name] = gradients[name] + weight * sample
            squares[name] = squares.get(name, 0) + weight * sample.square().sum()
    (expected,) = torch.autograd.grad(potential, logits)
    for gradient in gradients.values():
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    assert expected.abs().min() > 1e-6  # a gradient worth leaving unchanged
    # all have the same mean, so that the squares' order is that of the variances
    assert squares["expectation"] < 0.9 * min(squares["sampled"], squares["centred"])


def test_guidance_by_hand():
    """One agent, two servers, two states."""
    touched, actions = torch.tensor([[[[0], [1]]]]).expand(2, 1, 2, 1), torch.tensor([[0, 1]])
    z = torch.tensor([[[[[0.5, 0.0]], [[0.25, 0.0]]]], [[[[0.5, 0.0]], [[1.0, 0.0]]]]])
    x = torch.tensor([[[1.5, 0.0], [0.25, 0.0]], [[0.0, 0.0], [2.0, 0.0]]])
    x_ref = torch.full((2, 2, 2), 0.5)
    x_ref[..., 1] = 0.0
    # state 0: g(0) = (1.5 − 0.5)·0.5 = 0.5, g(1) = (0.25 + 0.25 − 0.5)·0.25 = 0
    # state 1: g(0) = (0 + 0.5 − 0.5)·0.5 = 0, g(1) = (2 − 0.5)·1 = 1.5
    torch.testing.assert_close(guidance(x, x_ref, z, touched, actions), torch.tensor([[[0.5, 0.0], [0.0, 1.5]]]))


def test_guidance_on_a_shared_link_by_hand():
    """Two routes that share link 0, and one of them lists it twice, with half of its influence each time."""
    touched = torch.tensor([[[[0, 1, 1], [0, 0, 2]]]])
    z = torch.tensor([[[[[1.0], [2.0], [0.0]], [[0.5], [0.5], [3.0]]]]])
    x, x_ref = torch.tensor([[[5.0], [7.0], [1.0]]]), torch.tensor([[[1.0], [1.0], [1.0]]])
    # route 0 taken: g(0) = 4·1 + 6·2 = 16; instead route 1: link 0 as it was, link 2 at 1 + 3: g(1) = 4·1 + 3·3 = 13
    torch.testing.assert_close(guidance(x, x_ref, z, touched, torch.tensor([[0]])), torch.tensor([[[16.0, 13.0]]]))
    # route 1 taken: g(1) = 4·1 + 0·3 = 4; instead route 0: link 1 at 7 + 2: g(0) = 4·1 + 8·2 = 20
    torch.testing.assert_close(guidance(x, x_ref, z, touched, torch.tensor([[1]])), torch.tensor([[[20.0, 4.0]]]))


@pytest.mark.parametrize("wrong", ["x", "x_ref", "z", "touched", "actions"])
def test_guidance_names_the_shapes_that_do_not_fit(wrong):
    z, touched = random_influence(3, 3, 4, 0)
    x = torch.zeros(1, 4, 2)
    given = dict(x=x, x_ref=x, z=z, touched=touched, actions=torch.zeros(3, 1, dtype=torch.long))
    assert guidance(**given).shape == (3, 1, 3)
    given[wrong] = given[wrong][..., :-1, :] if wrong in ("z", "touched") else given[wrong][:, :-1]
    if wrong == "actions":
        given[wrong] = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(AssertionError, match=rf"{wrong}.shape=torch.Size"):
        guidance(**given)


@pytest.mark.parametrize("number", [-1, 4])
def test_guidance_refuses_numbers_of_no_component(number):
    z, touched = random_influence(3, 3, 4, 0)
    touched[0, 1, 2, 0] = number
    with pytest.raises(AssertionError, match="numbers of the 4 components"):
        guidance(torch.zeros(1, 4, 2), torch.zeros(1, 4, 2), z, touched, torch.zeros(3, 1, dtype=torch.long))


def test_gae_bootstraps_from_the_truncated_state_by_hand():
    rewards, values = torch.tensor([[1.0], [2.0]]), torch.tensor([[[0.5], [1.0], [4.0]]])
    # γ = 0.5, λ = 0.5: δ_1 = 2 + 0.5·4 − 1 = 3, δ_0 = 1 + 0.5·1 − 0.5 = 1, Â_0 = 1 + 0.25·3
    torch.testing.assert_close(gae(rewards, values, 0.5, 0.5), torch.tensor([[[1.75], [3.0]]]))


def test_gae_is_the_double_sum_of_discounted_errors():
    torch.manual_seed(0)
    rewards, values, gamma, lam = torch.randn(6, 3), torch.randn(2, 7, 3), 0.9, 0.7
    expected = torch.zeros(2, 6, 3)
    for t in range(6):
        for k in range(t, 6):
            expected[:, t] += (gamma * lam) ** (k - t) * (rewards[k] + gamma * values[:, k + 1] - values[:, k])
    torch.testing.assert_close(gae(rewards, values, gamma, lam), expected)


def test_value_norm_is_the_weighted_mean_and_deviation():
    torch.manual_seed(0)
    norm, batches = ValueNorm(beta=0.5), [torch.randn(1, 8, 2) * 3 - 5 for _ in range(3)]
    assert [float(value) for value in norm.mean_std()] == [0, 1]  # before any return
    for batch in batches:
        norm.update(batch)
    weights = torch.tensor([0.25, 0.5, 1.0]).repeat_interleave(16) / 16 / 1.75
    every = torch.cat([batch.flatten() for batch in batches])
    mean = (weights * every).sum()
    torch.testing.assert_close(
        norm.mean_std(), (mean, (weights * (every - mean) ** 2).sum().sqrt()), rtol=1e-4, atol=1e-5
    )


def test_stacked_networks_are_separate_networks():
    torch.manual_seed(0)
    stack, x = MLP(3, 4, 8, 0.5), torch.randn(3, 5, 2, 4)
    for n in range(3):
        layers = [torch.nn.Linear(*weight.shape[1:]) for weight in stack.weights]
        for layer, weight, bias in zip(layers, stack.weights, stack.biases):
            layer.weight.data, layer.bias.data = weight.data[n].T, bias.data[n, 0]
        one = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])
        torch.testing.assert_close(stack(x)[n], one(x[n]).squeeze(-1))
    single = MLP(1, 4, 8, 0.5)
    torch.testing.assert_close(single(x)[2], single(x[2:]).squeeze(0))  # one network for any number of agents
    assert not torch.equal(stack.weights[0][0], stack.weights[0][1])
    torch.testing.assert_close(
        stack.weights[1][0] @ stack.weights[1][0].T, 2 * torch.eye(8), rtol=1e-5, atol=1e-5
    )  # orthogonal, gain √2
    with pytest.raises(AssertionError):
        stack(torch.randn(2, 5, 4))


def test_each_network_is_clipped_by_its_own_norm():
    """As if every network of the stack were alone with the mean over its own samples: no outlier scales others down."""
    torch.manual_seed(0)
    stack, x, scale = MLP(3, 4, 8, 0.5), torch.randn(3, 5, 4), torch.tensor([[1e-3], [1.0], [1e6]])
    (scale * stack(x)).mean().backward()
    stack.clip_grad(0.5)
    norms = []
    for n in range(3):
        alone = MLP(1, 4, 8, 0.5)
        for weight, of_all in zip(alone.parameters(), stack.parameters()):
            weight.data = of_all.data[n : n + 1].clone()
        (scale[n] * alone(x[n : n + 1])).mean().backward()
        norms.append(torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.5).item())
        for weight, of_all in zip(alone.parameters(), stack.parameters()):
            torch.testing.assert_close(of_all.grad[n : n + 1], weight.grad, rtol=1e-5, atol=1e-9)
    assert norms[0] < 0.5 < norms[1] < norms[2]


@pytest.mark.parametrize("share_parameters, minibatch_agents", [(True, 50), (True, 2), (False, 2)])
@pytest.mark.parametrize("expectation", [True, False])
def test_the_loss_is_that_of_the_mixed_advantage(monkeypatch, share_parameters, minibatch_agents, expectation):
    """Σ_a L(ρ(a), (1−α) 1[a drawn] Â − α w(a) ĝ(a)), L the clipped surrogate loss, w = π_old or 1 for the action that
    was drawn, computed again from what the loop's own functions returned. The first minibatch's policy is the one that
    acted, so that its ratios are 1."""
    torch.save({"actor": MLP(1 if share_parameters else 9, 7, 32, 3.0).state_dict()}, "decided.pt")
    perms, gaes, guided, given, losses, drawn = [], [], [], [], [], []
    randperm, maximum = torch.randperm, torch.max

    class Recorded(torch.distributions.Categorical):
        def sample(self):
            drawn.append((self.probs, super().sample()))
            return drawn[-1][1]

    monkeypatch.setattr(dgpg, "Categorical", Recorded)
    monkeypatch.setattr(torch, "randperm", lambda n: perms.append(randperm(n)) or perms[-1])
    monkeypatch.setattr(torch, "max", lambda *args: losses.append(args) or maximum(*args))
    monkeypatch.setattr(dgpg, "gae", lambda *args: gaes.append(gae(*args)) or gaes[-1])
    monkeypatch.setattr(
        dgpg, "guidance", lambda *args: given.append(args) or guided.append(guidance(*args)) or guided[-1]
    )
    monkeypatch.setattr(dgpg, "evaluate", unevaluated)
    options = dict(n_agents=9, num_envs=2, share_parameters=share_parameters, minibatch_agents=minibatch_agents)
    options |= dict(alpha_start=0.3, own_action_expectation=expectation, init_actor="decided.pt", clip_coef=0.3)
    train(Args(**{**TINY, "update_epochs": 4, "learning_rate": 0.03, **options}))

    probs, actions = (torch.stack(part, 1).flatten(1, 2) for part in zip(*drawn))  # [N, B, K] and [N, B], B = 10 · 2
    (advantages,), (g,) = gaes, guided
    advantages = 0.7 * ((advantages - advantages.mean()) / advantages.var(correction=0).sqrt()).reshape(1, 20)
    taken = torch.nn.functional.one_hot(actions, g.shape[-1])
    if expectation:
        g = g - (probs * g).sum(-1, keepdim=True)
        spread = (probs * g**2).sum(-1).mean().sqrt()
        g = 0.3 * probs * g / spread
    else:
        of_taken = (taken * g).sum(-1)
        spread = of_taken.var(correction=0).sqrt()
        g = 0.3 * taken * ((of_taken - of_taken.mean()) / spread).unsqueeze(-1)
    advantages = taken * advantages.unsqueeze(-1) - g  # [N, B, K]
    batches = []  # the states and agents of every minibatch
    for epoch in range(4):
        states = perms.pop(0).tensor_split(3)
        batches += [(part, perms.pop(0)[:minibatch_agents] if share_parameters else torch.arange(9)) for part in states]
    policy_losses, kls, outside = [], [], []
    for k, (states, agents) in enumerate(batches):
        unclipped, clipped = losses[k]
        advantage, old = advantages[agents][:, states], probs[agents][:, states]
        assert expectation or ((advantage != 0).sum(-1) == 1).all()  # of the action taken alone
        ratio = torch.where(advantage != 0, -unclipped / advantage, 1.0)  # of every own action
        torch.testing.assert_close(clipped, -advantage * ratio.clamp(0.7, 1.3), rtol=1e-3, atol=1e-4)
        policy_losses.append(maximum(-ratio * advantage, -ratio.clamp(0.7, 1.3) * advantage).sum(-1).mean().item())
        kls.append((old * (ratio - 1 - ratio.log())).sum(-1).mean().item())
        outside.append((old * ((ratio - 1).abs() > 0.3)).sum(-1).mean().item())
        if k == 0:
            torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=1e-3, atol=1e-3)
    assert sum(outside) and len(losses) == len(batches)
    if not expectation:  # then the ratios of the actions not taken are not seen here
        kls, outside = None, None
    logged = {tag: points[0][1] for tag, points in scalars().items()}
    for tag, values in (("policy_loss", policy_losses), ("approx_kl", kls), ("clipfrac", outside)):
        assert values is None or logged[f"losses/{tag}"] == pytest.approx(sum(values) / 12, rel=1e-2), tag
    x, x_ref = given[0][:2]
    assert logged["guidance/deviation"] == pytest.approx(((x - x_ref) ** 2).sum().item() / 2 / 20, rel=1e-4)
    assert logged["guidance/g_std"] == pytest.approx(spread.item(), rel=1e-4)


def test_actions_that_were_all_but_impossible_do_not_break_the_loss():
    """With π_old(a) = 0 in single precision ρ(a) may be infinite after a step; its weight is 0."""
    torch.save({"actor": MLP(1, 7, 32, 3000.0).state_dict()}, "decided.pt")
    train(Args(**{**TINY, "n_agents": 9, "learning_rate": 0.1, "update_epochs": 8}, init_actor="decided.pt"))
    assert all(math.isfinite(value) for _, value in scalars()["losses/policy_loss"])


@pytest.mark.parametrize("script", [dgpg, mappo, ippo])
def test_an_update_takes_the_next_rounds_and_the_environments_go_on(monkeypatch, script):
    """With 5 rounds per update an episode of 10 has two updates and one reset; the first one bootstraps from the state
    that the second one begins with."""
    calls, reset, seeds = [], CloudEnv.reset, []
    monkeypatch.setattr(script, "gae", lambda *args: calls.append(args) or gae(*args))
    monkeypatch.setattr(CloudEnv, "reset", lambda env, seed: seeds.append(seed) or reset(env, seed))
    monkeypatch.setattr(script, "evaluate", unevaluated)
    options = dict(TINY, num_envs=1, seed=2, learning_rate=0.0)
    script.train(script.Args(**{**options, "num_steps": 5}))
    assert [seed for seed in seeds if seed < 10**12] == [0, 2_000_000, 2_000_001]  # the first one is for the shapes
    values, norm = [], ValueNorm()
    for rewards, value, gamma, gae_lambda in calls:  # back to the critic's own units
        mean, std = norm.mean_std()
        values.append((value - mean) / std)
        norm.update(gae(rewards, value, gamma, gae_lambda) + value[..., :-1, :])
    assert [len(rewards) for rewards, *_ in calls] == [5] * 4 and [v.shape[-2] for v in values] == [6] * 4
    for first in (0, 2):
        torch.testing.assert_close(values[first][..., -1, :], values[first + 1][..., 0, :], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(values[1][..., -1, :], values[2][..., 0, :], rtol=1e-3)
    advantages, explained, logged = [gae(*args) for args in calls], [], scalars()  # over the whole episode
    for (_, value, *_), advantage in zip(calls, advantages):
        explained.append(1 - advantage.var(correction=0) / (advantage + value[..., :-1, :]).var(correction=0))
    for k in range(2):
        rewards = calls[2 * k][0].sum() + calls[2 * k + 1][0].sum()
        assert logged["charts/episodic_return"][k] == (k + 1, pytest.approx(rewards.item(), rel=1e-5))
        mean = (explained[2 * k] + explained[2 * k + 1]).item() / 2
        assert logged["losses/explained_variance"][k] == (k + 1, pytest.approx(mean, rel=1e-4))


def test_what_the_critic_and_the_guidance_are_given(monkeypatch):
    """Two environments, so that an order of states as (E, T) instead of (T, E) is another one. The critic's states, the
    one after the last round included, its targets and their weight, and the x of every state, as the environment gave
    them."""
    states, xs, given, regressed, perms, gradients = [], [], {}, [], [], []
    reset, step, randperm, huber = CloudEnv.reset, CloudEnv.step, torch.randperm, torch.nn.functional.huber_loss

    def record(env, obs, *rest):
        if env.num_envs == 2:
            states.append(torch.tensor(rest[-1]["state"]))
            if rest[-1]["played"]:
                xs.append(torch.tensor(rest[-1]["played"]["x"]).float())
        return obs, *rest

    def critic_loss(values, targets, **options):
        regressed.append((values.detach(), targets))
        values.register_hook(lambda gradient: gradients.append(gradient))
        return huber(values, targets, **options)

    monkeypatch.setattr(CloudEnv, "reset", lambda env, seed: record(env, *reset(env, seed)))
    monkeypatch.setattr(CloudEnv, "step", lambda env, actions: record(env, *step(env, actions)))
    monkeypatch.setattr(torch, "randperm", lambda n: perms.append(randperm(n)) or perms[-1])
    monkeypatch.setattr(torch.nn.functional, "huber_loss", critic_loss)
    monkeypatch.setattr(dgpg, "gae", lambda *args: given.update(gae=args, advantages=gae(*args)) or given["advantages"])
    monkeypatch.setattr(dgpg, "guidance", lambda *args: given.update(guidance=args) or guidance(*args))
    monkeypatch.setattr(dgpg, "evaluate", unevaluated)
    critics, init = [], MLP.__init__
    monkeypatch.setattr(MLP, "__init__", lambda net, *args, **gain: init(net, *args, **gain) or critics.append(net))
    train(Args(**TINY, num_envs=2, learning_rate=0.0))  # the critic stays as it was

    states, critic = torch.stack(states[1:]), critics[1]  # after the reset for the shapes: [T + 1, E, S]
    assert torch.equal(given["guidance"][0], torch.stack(xs).flatten(0, 1))
    rewards, values, _, _ = given["gae"]
    torch.testing.assert_close(values, critic(states).detach())  # before the first update in the rewards' units
    returns = given["advantages"] + values[:-1]
    scores = ((returns - returns.mean()) / returns.var(correction=0).clamp(min=1e-4).sqrt()).flatten()
    for epoch in range(2):
        for k, index in enumerate(perms[4 * epoch].tensor_split(3)):
            predicted, targets = regressed[3 * epoch + k]
            torch.testing.assert_close(predicted, critic(states[:-1].flatten(0, 1)[index]).detach())
            torch.testing.assert_close(targets, scores[index], rtol=1e-4, atol=1e-4)
            error = (predicted - targets).clamp(-10, 10) / len(index)  # of the mean Huber loss, weight 1
            torch.testing.assert_close(gradients[3 * epoch + k], error, rtol=1e-4, atol=1e-6)


def test_values_are_in_the_rewards_units_after_the_first_update(monkeypatch):
    """From the second update on the critic's standard scores are those of the returns so far."""
    calls, norms = [], []
    monkeypatch.setattr(dgpg, "gae", lambda *args: calls.append((args[1], gae(*args))) or calls[-1][1])
    update = ValueNorm.update
    monkeypatch.setattr(
        ValueNorm, "update", lambda norm, returns: update(norm, returns) or norms.append(norm.mean_std())
    )
    monkeypatch.setattr(
        MLP, "forward", lambda net, x: 0.5 * x.new_ones(x.shape[:-1]) + 0 * sum(map(torch.sum, net.parameters()))
    )
    train(Args(**TINY))
    (first, advantages), (second, _) = calls
    returns = advantages + first[:-1]
    torch.testing.assert_close(first, torch.full_like(first, 0.5))
    mean, std = returns.mean(), returns.var(correction=0).clamp(min=1e-4).sqrt()
    assert std < 0.5  # so that leaving it out would show
    torch.testing.assert_close(second, (0.5 * std + mean).expand_as(second), rtol=1e-4, atol=1e-4)


def test_the_entropy_bonus_keeps_the_policy_from_deciding():
    options = dict(n_agents=3, rounds=20, episodes=3, eval_every=3)
    entropies = []
    for weight in (0.0, 1.0):
        train(Args(**options, ent_coef=weight, exp_name=str(weight)))
        (run,) = pathlib.Path("runs").glob(f"{weight}__*")
        entropies.append(EventAccumulator(str(run)).Reload().Scalars("losses/entropy")[-1].value)
    assert entropies[0] < entropies[1] - 0.05


def test_an_environment_may_write_into_its_actions(monkeypatch):
    class Writes(CloudEnv):
        def step(self, actions):
            returned = super().step(actions)
            actions[...] = 0
            return returned

    result = train(Args(**TINY))
    monkeypatch.setattr(dgpg, "CloudEnv", Writes)
    assert train(Args(**TINY)) == result


@pytest.mark.parametrize("n_agents, wanted, scenarios", [(5, 0, 40), (200, 0, 10), (1500, 0, 2), (5, 3, 3)])
def test_fewer_scenarios_are_evaluated_where_each_averages_more_agents(monkeypatch, n_agents, wanted, scenarios):
    seen = []
    monkeypatch.setattr(dgpg, "evaluate", lambda env, policy: seen.append(env.num_envs) or unevaluated(env, policy))
    train(Args(**{**TINY, "episodes": 0, "n_agents": n_agents}, eval_scenarios=wanted))
    assert set(seen) == {scenarios}


@pytest.mark.parametrize("script", [dgpg, mappo, ippo])
@pytest.mark.parametrize("seconds, told", [(0.01, False), (3, True)])
def test_an_episode_that_takes_long_says_so(monkeypatch, capsys, script, seconds, told):
    """Between two readings of the clock, `seconds` pass."""
    clock = itertools.count(1e9, seconds)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    script.train(script.Args(**TINY, num_envs=1))
    assert ("trained for 1 episodes, return -" in capsys.readouterr().out) == told


@pytest.mark.parametrize("script", [dgpg, mappo, ippo])
def test_argmax_is_the_return_of_the_most_likely_actions(script):
    torch.save({"actor": MLP(1, 7, 32, 3.0).state_dict()}, "decided.pt")
    options = dict(n_agents=6, rounds=10, num_steps=10, load=2.0, episodes=0, init_actor="decided.pt")
    result = script.train(script.Args(**options))
    actor = MLP(1, 7, 32, 0.01)
    actor.load_state_dict(torch.load("decided.pt", weights_only=True)["actor"])

    def most_likely(env, obs):
        return actor(torch.tensor(obs)).argmax(-1).numpy()

    env = CloudEnv(40, 6, rounds=10, load=2.0, held_out=True)
    assert result["return_argmax"] == dgpg.evaluate(env, most_likely) != result["return"]


@pytest.mark.parametrize("script", [dgpg, mappo, ippo])
def test_both_gradients_are_clipped_in_every_minibatch_as_the_option_says(monkeypatch, script):
    clipped, clip_grad = [], script.MLP.clip_grad

    def recorded(net, max_norm):
        clip_grad(net, max_norm)
        grads = torch.cat([weight.grad.flatten(1) for weight in net.parameters()], 1)
        clipped.append((net.weights[0].shape[1], max_norm, net.copies * grads.norm(dim=1).max().item()))

    monkeypatch.setattr(script.MLP, "clip_grad", recorded)
    script.train(script.Args(**TINY, num_envs=1, max_grad_norm=1e-3))
    critic = 7 * 3 if script is ippo else 2 * 3 + 2 + 3 * 3  # inputs
    assert [inputs for inputs, _, _ in clipped] == [7, critic] * 12  # 2 episodes, 2 epochs, 3 minibatches
    assert all(max_norm == 1e-3 and norm < 1.01e-3 for _, max_norm, norm in clipped)


def test_evaluated_on_the_held_out_part(monkeypatch):
    made, init = [], CloudEnv.__init__
    monkeypatch.setattr(CloudEnv, "__init__", lambda env, *args, **part: made.append(part) or init(env, *args, **part))
    train(Args(**{**TINY, "episodes": 0}))
    assert made == [{}, {"held_out": True}]


def test_guided_policy_learns_and_the_others_do_not():
    """Four episodes at N = 5: DG-PG is at Best-Fit (cost ratio 1), untrained and unguided policies are far from it."""
    budget = dict(n_agents=5, episodes=4, eval_every=4)
    assert train(Args(**budget))["cost_ratio"] < 1
    assert train(Args(**{**budget, "episodes": 0}))["cost_ratio"] > 8
    assert train(Args(**budget, alpha_start=0, alpha_end=0))["cost_ratio"] > 2


def test_everything_that_is_written(capsys):
    train(Args(**{**TINY, "num_steps": 5}, exp_name="name", seed=3, alpha_start=0.9, alpha_end=0.2))
    (run,) = pathlib.Path("runs").iterdir()
    assert run.name.startswith("name__n3__3__")
    events = EventAccumulator(str(run)).Reload()
    logged = scalars()
    assert set(logged) == {
        *("charts/episodic_return", "charts/SPS", "charts/learning_rate"),
        *("eval/return", "eval/return_argmax", "eval/score", "eval/cost_ratio"),
        *("eval/best_fit_return", "eval/random_return"),
        *("losses/value_loss", "losses/policy_loss", "losses/entropy", "losses/approx_kl", "losses/clipfrac"),
        *("losses/explained_variance", "guidance/alpha", "guidance/deviation", "guidance/g_std"),
    }
    assert [step for step, _ in logged.pop("eval/return_argmax")] == [2]  # at the end only
    assert all([step for step, _ in points] == [1, 2] for points in logged.values())
    assert [value for _, value in logged["guidance/alpha"]] == pytest.approx([0.725, 0.375])  # after 1/4, 3/4
    value, best, worst = (logged[f"eval/{name}"][-1][1] for name in ("return", "best_fit_return", "random_return"))
    assert logged["eval/score"][-1][1] == pytest.approx((value - worst) / (best - worst), rel=1e-5)
    assert logged["eval/cost_ratio"][-1][1] == pytest.approx(value / best, rel=1e-5)
    assert "hyperparameters/text_summary" in events.Tags()["tensors"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(f"final episodes=2 return={value:.2f} best_fit={best:.2f} random={worst:.2f} score=")
    assert torch.load(run / "checkpoint.pt", weights_only=True)["args"]["alpha_end"] == 0.2
    # the actor in the checkpoint evaluates to what was printed, and runs at another N
    again = train(Args(**{**TINY, "episodes": 0}, seed=3, init_actor=str(run / "checkpoint.pt")))
    assert again["return"] == pytest.approx(value, rel=1e-6)
    train(Args(**{**TINY, "episodes": 0, "n_agents": 8}, init_actor=str(run / "checkpoint.pt")))


def test_two_runs_that_start_at_once_have_a_folder_each(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1_760_000_000.5)
    for _ in range(2):
        train(Args(**{**TINY, "episodes": 0}))
    assert len(os.listdir("runs")) == 2


def test_no_training_scenario_is_a_held_out_one(monkeypatch):
    """Also with the largest seed and many episodes: environment e of `reset(seed)` draws the scenario of seed + e."""
    drawn, reset = {True: set(), False: set()}, CloudEnv.reset

    def recorded(env, seed=None, options=None):
        drawn[env.num_envs == 40] |= set(range(seed, seed + env.num_envs))
        return reset(env, seed, options)

    monkeypatch.setattr(CloudEnv, "reset", recorded)
    for seed in (1, 99_999):
        train(Args(**{**TINY, "episodes": 4, "num_envs": 2, "seed": seed}))
    training = drawn[False] - {0, 1}  # the ones that are reset for the shapes
    assert len(drawn[True]) == 40 and len(training) == 2 * 4 and not drawn[True] & training


def broken(part, change):
    """`CloudEnv` whose `step` returns another reward, observation or part of what was played."""

    class Broken(CloudEnv):
        def step(self, actions):
            obs, reward, terminated, truncated, info = super().step(actions)
            reward = change(reward) if part == "reward" else reward
            if self.num_envs == 2:  # training
                if part == "truncated":
                    truncated = change(truncated)
                elif part in info:
                    info = {name: change(value) for name, value in info.items() if name != part}
                else:
                    played = {name: change(value) if name == part else value for name, value in info["played"].items()}
                    info = {**info, "played": {name: value for name, value in played.items() if value is not None}}
            return obs, reward, terminated, truncated, info

    return Broken


@pytest.mark.parametrize(
    "part, change, error, named",
    [
        ("truncated", lambda x: ~x, AssertionError, "cut off"),
        ("truncated", lambda x: x | True, AssertionError, "cut off"),
        ("state", lambda x: x, KeyError, "state"),
        ("x", lambda x: x[:, :-1], AssertionError, "x.shape"),
        ("x", lambda x: x[..., :1], AssertionError, "x.shape"),
        ("x", lambda x: None, KeyError, "x"),
        ("demand", lambda x: x[:, :-1], RuntimeError, "size of tensor"),
        ("demand", lambda x: None, TypeError, "demand"),
        ("offered_load", lambda x: None, TypeError, "offered_load"),
        ("offered_load", lambda x: x[..., None, :], AssertionError, "x_ref.shape"),
    ],
)
def test_an_own_environments_mistake_fails_at_once_and_is_named(monkeypatch, part, change, error, named):
    monkeypatch.setattr(dgpg, "CloudEnv", broken(part, change))
    with pytest.raises(error, match=named):
        train(Args(**TINY, num_envs=2))
    (run,) = pathlib.Path("runs").iterdir()
    assert torch.load(run / "checkpoint.pt", weights_only=True)["episode"] == 0


@pytest.mark.parametrize("change", [lambda x: x.sum(), lambda x: x[:, None], lambda x: x * math.nan])
def test_a_reward_that_cannot_be_one_fails_before_anything_is_written(monkeypatch, change):
    monkeypatch.setattr(dgpg, "CloudEnv", broken("reward", change))
    with pytest.raises(AssertionError, match="a reward .E. cannot be"):
        train(Args(**TINY))
    assert not pathlib.Path("runs").exists()


@pytest.mark.parametrize("part", ["obs", "state"])
def test_observations_and_states_of_another_shape_are_refused(monkeypatch, part):
    class Broken(CloudEnv):
        def reset(self, seed=None, options=None):
            obs, info = super().reset(seed, options)
            return (obs.swapaxes(0, 1), info) if part == "obs" else (obs, {**info, "state": info["state"][0]})

    monkeypatch.setattr(dgpg, "CloudEnv", Broken)
    with pytest.raises(AssertionError, match=f"{part} must be"):
        train(Args(**TINY))
    assert not os.path.exists("runs")


@pytest.mark.parametrize("script", [dgpg, mappo, ippo])
def test_annealing_takes_the_learning_rate_of_adam_to_0(script):
    options = {**TINY, "episodes": 4, "num_envs": 2, "num_steps": 5}
    script.train(script.Args(**options, learning_rate=0.01, anneal_lr=True))
    # at each of the four updates 0.01, 0.0075, 0.005, 0.0025; the last one of an episode is logged
    assert [value for _, value in scalars()["charts/learning_rate"]] == pytest.approx([0.0075, 0.0025])


def test_same_seed_same_numbers_however_often_it_is_evaluated(tmp_path, monkeypatch):
    logged = []
    for run, (every, seed) in enumerate([(1, 1), (1, 1), (9, 1), (1, 2)]):
        (tmp_path / str(run)).mkdir()
        monkeypatch.chdir(tmp_path / str(run))
        train(Args(**{**TINY, "eval_every": every}, seed=seed))
        logged.append(scalars())
        del logged[-1]["charts/SPS"]  # wall time
    assert logged[0] == logged[1]
    assert all(points[-1] == logged[0][tag][-1] for tag, points in logged[2].items())  # with fewer evaluations
    assert logged[0]["losses/policy_loss"] == logged[2]["losses/policy_loss"]
    assert all(logged[0][tag] != logged[3][tag] for tag in ("eval/return", "losses/policy_loss", "guidance/g_std"))


def test_trace_is_trained_and_evaluated_on():
    rows = [f"{60 * i // 7},{60 + 977 * i % 1201},{1 + i % 5},{2 + i % 11}" for i in range(600)]
    pathlib.Path("trace.csv").write_text("\n".join(["arrival_s,duration_s,cpu,memory_gib", *rows]))
    on_trace = train(Args(**TINY, trace="trace.csv"))
    assert on_trace["return"] != train(Args(**TINY))["return"]


WRONG = {
    "--servers-per-agent 0": "servers_per_agent",
    "--alpha-end -0.1": "alpha_end",
    "--alpha-start nan": "alpha_start",
    "--gamma 1.1": "gamma",
    "--load 0": "load",
    "--load nan": "load",
    "--rounds 0": "rounds",
    "--num-envs 0": "num_envs",
    "--num-minibatches 11": "num_minibatches",
    "--num-steps 0": "num_steps",
    "--num-steps 1 --num-minibatches 1": "num_steps",
    "--num-steps 30": "num_steps",
    "--num-steps 200": "num_steps",
    "--episodes -1": "episodes",
    "--episodes 5 --num-envs 2": "episodes",
    "--seed -1": "seed",
    "--seed 100000": "seed",
    "--learning-rate -1": "learning_rate",
    "--learning-rate inf": "learning_rate",
    "--eval-every 0": "eval_every",
    "--eval-scenarios -1": "eval_scenarios",
    "--hidden 0": "hidden",
    "--trace missing.csv": "missing.csv",
    "--trace empty.csv": "empty.csv: line 1",
    "--trace short.csv": "short.csv",
    "--trace unsorted.csv": "line 4: arrival_s",
    "--trace negative.csv": "line 2: duration_s",
    "--resume missing": "missing",
    "--init-actor missing.pt": "missing.pt",
    "--init-actor=": "cannot be used",
    "--init-actor short.csv": "short.csv",
    "--init-actor other.pt": "other.pt",
}


@pytest.mark.parametrize("options, named", WRONG.items(), ids=WRONG)
def test_bad_input_is_one_line_that_names_it_and_nothing_is_written(monkeypatch, options, named):
    header = "arrival_s,duration_s,cpu,memory_gib\n"
    files = {
        "empty.csv": "",
        "short.csv": header + "0,1,1,1\n1,1,1,1\n",
        "unsorted.csv": header + "0,1,1,1\n2,1,1,1\n1,1,1,1\n",
        "negative.csv": header + "0,-1,1,1\n",
    }
    for name, text in files.items():
        pathlib.Path(name).write_text(text)
    torch.save({"actor": MLP(3, 7, 32, 0.01).state_dict()}, "other.pt")  # one actor for each of three agents
    before = sorted(os.listdir())
    monkeypatch.setattr(sys, "argv", ["dgpg.py", *options.split()])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / "dgpg.py"), run_name="__main__")
    message = exit.value.code  # Python prints it on stderr and ends with status 1
    assert isinstance(message, str) and named in message and len(message.splitlines()) == 1
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("options", ["--n-agents 1.5", "--load much", "--rounds", "--no-such-option 3", "stray"])
def test_what_the_option_parser_finds_it_says_itself(monkeypatch, capsys, options):
    monkeypatch.setattr(sys, "argv", ["dgpg.py", *options.split()])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / "dgpg.py"), run_name="__main__")
    assert exit.value.code == 2 and options.split()[0] in capsys.readouterr().err
    assert not os.listdir()


def test_help_opens_with_what_the_program_does(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dgpg.py", "--help"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / "dgpg.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert not exit.value.code and out.index("Trains N agents") < out.index("--exp-name") < out.index("--n-agents")


def test_a_users_mistake_from_outside(tmp_path):
    command = [sys.executable, str(ROOT / "dgpg.py"), "--alpha-end", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "alpha_end must be from 0 to 1, not 2.0\n")
    assert not os.listdir()


def test_three_files_copied_elsewhere_run_by_themselves():
    for name in ("dgpg.py", "cloud_env.py", "analytic_model.py"):
        shutil.copy(ROOT / name, name)
    command = [sys.executable, "dgpg.py", "--n-agents", "2", "--episodes", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("final episodes=1 return=")
    assert done.stderr == ""
