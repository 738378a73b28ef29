"""The algorithm: formulas by hand and by enumeration, what the loop makes of them, and learning."""

import itertools
import math
import pathlib

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import analytic_model
import dgpg
import ippo
import mappo
from cloud_env import CloudEnv, Scenario
from dgpg import Args, gae, guidance, train

TINY = dict(n_agents=3, episodes=2, rounds=10, load=2.0, eval_every=1, update_epochs=2, num_minibatches=3, num_steps=10)
SCRIPTS = pytest.mark.parametrize("script", [dgpg, mappo, ippo])


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def events(name="*"):
    """What TensorBoard reads of the only run of that name."""
    (run,) = pathlib.Path("runs").glob(f"{name}__n*")
    return EventAccumulator(str(run)).Reload()


def scalars(name="*"):
    """Every scalar of the only run of that name: {tag: [(step, value), ...]}."""
    read = events(name)
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def random_influence(agents, actions, components, seed):
    """z [1, N, K, J, R] and touched [1, N, K, J], J = 3: alternatives share components, and one is padded."""
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(1, agents, actions, 3, 2, generator=rng, dtype=torch.float64)
    rows = [torch.randperm(components, generator=rng)[:3] for _ in range(agents * actions)]
    touched = torch.stack(rows).view(1, agents, actions, 3)
    touched[0, 1, 0] = touched[0, 1, 1]  # two alternatives on the same components
    touched[0, 2, 1, 2], z[0, 2, 1, 2] = touched[0, 2, 1, 0], 0  # padding
    return z, touched


def dense(z, touched, components):
    """The influence of every action on all components [1, N, K, M, R]."""
    full = torch.zeros(*z.shape[:3], components, 2, dtype=z.dtype)
    return full.scatter_add(3, touched.unsqueeze(-1).expand_as(z), z)


@pytest.mark.parametrize("seed", range(5))
def test_what_the_guidance_descends_by_enumeration(seed):
    """E[g_i ∇log π_i] over all joint actions is ∇E[d + ½ Σ_i ‖z_i‖²], less a baseline or not; so is the expectation
    over the own action, E[Σ_a π_i(a) g_i(a) ∇log π_i(a)], which has less variance."""
    N, K, M = 3, 3, 5
    z, touched = random_influence(N, K, M, seed)
    influence = dense(z, touched, M)
    x_before, x_ref = torch.rand(2, 1, M, 2, dtype=torch.float64)
    logits = torch.randn(N, K, dtype=torch.float64).requires_grad_()
    probs = logits.softmax(-1)
    score = torch.eye(K, dtype=torch.float64) - probs.detach().unsqueeze(1)  # ∇_logits log π_i(a) [N, K of a, K]
    potential, gradients, squares = 0, {"paper": 0, "sampled": 0, "expectation": 0}, {}
    for joint in itertools.product(range(K), repeat=N):
        actions = torch.tensor(joint)
        own = torch.stack([influence[0, i, a] for i, a in enumerate(joint)])  # [N, M, R]
        x = x_before + own.sum(0)
        weight = torch.stack([probs[i, a] for i, a in enumerate(joint)]).prod()
        potential = potential + weight * 0.5 * ((x - x_ref).square().sum() + own.square().sum())
        (of_action,) = guidance(x, x_ref, z, touched, actions.unsqueeze(0))  # [N, K]
        weight = weight.detach()
        g = of_action.gather(1, actions.unsqueeze(1))
        torch.testing.assert_close(g.squeeze(1), ((x - x_ref) * own).sum((-2, -1)), rtol=1e-12, atol=1e-12)
        own_score = score[torch.arange(N), actions]
        mean = (probs.detach() * of_action).sum(1, keepdim=True)
        every = (probs.detach() * (of_action - mean)).unsqueeze(-1) * score  # [N, K of a, K]
        samples = dict(paper=g * own_score, sampled=(g - mean) * own_score, expectation=every.sum(1))
        for name, sample in samples.items():
            gradients[name] = gradients[name] + weight * sample
            squares[name] = squares.get(name, 0) + weight * sample.square().sum()
    (expected,) = torch.autograd.grad(potential, logits)
    for gradient in gradients.values():
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    assert expected.abs().min() > 1e-6  # a gradient worth leaving unchanged
    # all have the same mean, so that the squares' order is that of the variances
    assert squares["expectation"] < 0.9 * min(squares["paper"], squares["sampled"])


def test_guidance_by_hand():
    """One agent, two servers, two states."""
    touched, actions = torch.tensor([[[[0], [1]]]]).expand(2, 1, 2, 1), torch.tensor([[0], [1]])
    z = torch.tensor([[[[[0.5, 0.0]], [[0.25, 0.0]]]], [[[[0.5, 0.0]], [[1.0, 0.0]]]]])
    x = torch.tensor([[[1.5, 0.0], [0.25, 0.0]], [[0.0, 0.0], [2.0, 0.0]]])
    x_ref = torch.full((2, 2, 2), 0.5)
    x_ref[..., 1] = 0.0
    # state 0: g(0) = (1.5 − 0.5)·0.5 = 0.5, g(1) = (0.25 + 0.25 − 0.5)·0.25 = 0
    # state 1: g(0) = (0 + 0.5 − 0.5)·0.5 = 0, g(1) = (2 − 0.5)·1 = 1.5
    torch.testing.assert_close(guidance(x, x_ref, z, touched, actions), torch.tensor([[[0.5, 0.0]], [[0.0, 1.5]]]))


def test_guidance_on_a_shared_link_by_hand():
    """Two routes that share link 0: the second is shorter, and padded."""
    touched = torch.tensor([[[[0, 1], [0, 0]]]])
    z = torch.tensor([[[[[1.0], [2.0]], [[3.0], [0.0]]]]])
    x, x_ref = torch.tensor([[[5.0], [7.0]]]), torch.tensor([[[1.0], [1.0]]])
    # route 0 taken: g(0) = 4·1 + 6·2 = 16; instead route 1: link 0 at 5 − 1 + 3: g(1) = 6·3 = 18
    torch.testing.assert_close(guidance(x, x_ref, z, touched, torch.tensor([[0]])), torch.tensor([[[16.0, 18.0]]]))
    # route 1 taken: g(1) = 4·3 = 12; instead route 0: link 0 at 5 − 3 + 1, link 1 at 7 + 2: g(0) = 2·1 + 8·2 = 18
    torch.testing.assert_close(guidance(x, x_ref, z, touched, torch.tensor([[1]])), torch.tensor([[[18.0, 12.0]]]))


@pytest.mark.parametrize("wrong", ["x", "touched", "actions"])
def test_guidance_refuses_shapes_that_do_not_fit(wrong):
    z, touched = random_influence(3, 3, 4, 0)
    x = torch.zeros(1, 4, 2)
    given = dict(x=x, x_ref=x, z=z, touched=touched, actions=torch.zeros(1, 3, dtype=torch.long))
    assert guidance(**given).shape == (1, 3, 3)
    given[wrong] = given[wrong][..., :-1] if wrong == "touched" else given[wrong][:, :-1]
    with pytest.raises(AssertionError):
        guidance(**given)


def test_gae_bootstraps_from_the_truncated_state_by_hand():
    rewards, values = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.5], [1.0], [4.0]])
    # γ = 0.5, λ = 0.5: δ_1 = 2 + 0.5·4 − 1 = 3, δ_0 = 1 + 0.5·1 − 0.5 = 1, Â_0 = 1 + 0.25·3
    torch.testing.assert_close(gae(rewards, values, 0.5, 0.5), torch.tensor([[1.75], [3.0]]))


@pytest.mark.parametrize("shape", [(3,), (3, 2)])
def test_gae_is_the_double_sum_of_discounted_errors(shape):
    """Of values per environment, and of values per environment and agent under one reward."""
    torch.manual_seed(0)
    rewards, values, gamma, lam = torch.randn(6, 3, *[1] * (len(shape) - 1)), torch.randn(7, *shape), 0.9, 0.7
    expected = torch.zeros(6, *shape)
    for t, k in itertools.product(range(6), repeat=2):
        if k >= t:
            expected[t] += (gamma * lam) ** (k - t) * (rewards[k] + gamma * values[k + 1] - values[k])
    torch.testing.assert_close(gae(rewards, values, gamma, lam), expected)


def test_networks_are_orthogonal_and_give_a_number_for_each_row():
    torch.manual_seed(0)
    net, x = dgpg.network(4, 8, 0.01), torch.randn(3, 5, 2, 4)
    assert net(x).shape == (3, 5, 2)
    torch.testing.assert_close(net(x)[2, 1], net(x[2, 1]))
    hidden, last = net[2].weight, net[4].weight
    torch.testing.assert_close(hidden @ hidden.T, 2 * torch.eye(8), rtol=1e-5, atol=1e-5)  # gain √2
    assert last.norm().item() == pytest.approx(0.01) and not any(net[k].bias.any() for k in (0, 2, 4))


class Toy:
    """Two agents, three actions each, one component per action, two environments; everything at random, and recorded.

    `seen` lists what the training was given, round by round. The reward depends on the actions.
    """

    rounds, constants = 4, {"half": np.array(0.5)}
    seen = []

    def __init__(self, num_envs):
        self.num_envs = num_envs

    def observe(self, **played):
        self.obs = self.rng.normal(size=(self.num_envs, 2, 3, 2)).astype(np.float32)
        self.state = self.rng.normal(size=(self.num_envs, 5)).astype(np.float32)
        return self.obs, {"state": self.state, "played": played}

    def reset(self, seed):
        self.rng, self.t = np.random.default_rng(seed), 0
        return self.observe()

    def step(self, actions):
        E = self.num_envs
        x = self.rng.uniform(size=(E, 3, 1)) + (actions[..., None] == np.arange(3)).sum(1)[..., None]
        reward = -1 - actions.sum(1) * self.rng.uniform(size=E)
        z = 1 + self.rng.uniform(size=(E, 2, 3, 1, 1))
        if E == 2:  # training
            self.seen.append(dict(obs=self.obs, state=self.state, actions=actions.copy(), reward=reward, x=x, z=z))
        self.t += 1
        obs, info = self.observe(x=x, z=z)
        done = np.full(E, self.t == self.rounds)
        if E == 2:
            self.seen[-1]["next_state"] = self.state
            self.seen[-1]["next_obs"] = obs
        actions[...] = 0  # an environment may write into its actions
        return obs, reward, ~done & done, done, info

    def heuristic(self):
        return np.zeros((self.num_envs, 2), dtype=int)

    @staticmethod
    def reference_state(z, half):
        return half.expand(len(z), 3, 1)

    @staticmethod
    def local_influence(z, half):
        return z, torch.arange(3).view(1, 1, 3, 1).expand(len(z), 2, 3, 1)


def toy(args, num_envs, held_out=False):
    return Toy(3 if held_out else num_envs)


def seen_in_training():
    """What the toy has recorded, as tensors [T, E, ...] by name."""
    rounds = {name: torch.tensor(np.stack([step[name] for step in Toy.seen])) for name in Toy.seen[0]}
    return {name: value.float() if value.is_floating_point() else value for name, value in rounds.items()}


def one_update(script, **options):
    """Actor and critic before an update of one minibatch and epoch, the checkpoint after it, and what it was given."""
    Toy.seen.clear()
    options = dict(num_envs=2, num_steps=4, num_minibatches=1, update_epochs=1, rounds=4) | options
    system = (toy, Toy) if script is dgpg else (toy,)
    script.train(script.Args(**options, episodes=2, exp_name="one"), *system)
    (run,) = pathlib.Path("runs").glob("one__*")
    torch.manual_seed(1)  # the weights that it began with
    critic_inputs = 6 if script is ippo else 5
    nets = script.network(2, 32, 0.01), script.network(critic_inputs, 64, 1.0)
    return nets, torch.load(run / "checkpoint.pt", weights_only=True), seen_in_training()


def first_adam_step(net, saved, loss, rate, max_norm):
    """The first step of Adam along the clipped gradient of `loss`, as the weights that it must lead to."""
    loss.backward()
    assert torch.nn.utils.clip_grad_norm_(net.parameters(), max_norm) > 2 * max_norm
    largest = max(weight.grad.abs().max() for weight in net.parameters())
    for name, weight in net.named_parameters():
        step = rate * weight.grad / (weight.grad.abs() + 1e-5)
        clear = weight.grad.abs() > 1e-4 * largest  # not a rounding error
        torch.testing.assert_close(saved[name][clear], (weight - step).detach()[clear], rtol=1e-4, atol=3e-5)
        assert clear.any() or name == "4.bias"  # the same for all actions: it moves no probability


@pytest.mark.parametrize("form", ["expectation", "sampled", "mappo", "ippo"])
def test_one_update_follows_the_gradient_of_the_formulas(form):
    """The actor's and the critic's weights after it, computed again from what the environment saw.

    At ρ = 1 the gradient of the clipped loss is that of −Σ_a ρ(a) A(a) with A(a) = (1−α) 1[a drawn] Â − α w(a) ĝ(a).
    """
    script = dict(mappo=mappo, ippo=ippo).get(form, dgpg)
    options = dict(learning_rate=0.01, max_grad_norm=1e-4)
    if script is dgpg:
        options |= dict(alpha_start=0.3, own_action_expectation=form == "expectation", ent_coef=0.02)
    (actor, critic), saved, seen = one_update(script, **options)
    actions = seen["actions"]  # [T, E, N]
    states = torch.cat([seen["state"], seen["next_state"][-1:]])
    rewards = seen["reward"]
    if script is ippo:
        states, rewards = torch.cat([seen["obs"], seen["next_obs"][-1:]]).flatten(-2), rewards.unsqueeze(-1)
    values = critic(states).detach()
    advantages = gae(rewards, values, 0.97, 0.9)
    returns = advantages + values[:-1]
    targets = (returns - returns.mean()) / returns.std(correction=0)
    value_loss = torch.nn.functional.huber_loss(critic(states[:-1]), targets, delta=10.0)
    first_adam_step(critic, saved["critic"], value_loss, 0.01, 1e-4)

    logprobs = actor(seen["obs"]).log_softmax(-1)  # [T, E, N, K]
    old = logprobs.detach()
    taken = torch.nn.functional.one_hot(actions, 3)
    standard = (advantages - advantages.mean()) / advantages.std(correction=0)
    standard = standard.view(4, 2, -1, 1)  # per agent in IPPO
    if script is dgpg:
        flat = {name: value.flatten(0, 1) for name, value in seen.items()}
        z, touched = Toy.local_influence(flat["z"], None)
        g = guidance(flat["x"], torch.full((8, 3, 1), 0.5), z, touched, flat["actions"]).view(4, 2, 2, 3)
        g = g - (old.exp() * g).sum(-1, keepdim=True)
        weight = old.exp() if form == "expectation" else taken
        spread = (weight * g**2).sum(-1).mean().sqrt()
        mixed = 0.7 * taken * standard - 0.3 * weight * g / spread
        assert scalars("one")["guidance/g_std"][0][1] == pytest.approx(spread.item(), rel=1e-4)
        distance = (seen["x"] - 0.5).square().sum((-2, -1)).mean().item() / 2
        assert scalars("one")["guidance/deviation"][0][1] == pytest.approx(distance, rel=1e-4)
    else:
        mixed = taken * standard
    ratio = (logprobs - old).exp()
    entropy = -(logprobs.exp() * logprobs).sum(-1).mean()
    weight_of_entropy = options.get("ent_coef", 0.01)
    policy_loss = -(ratio * mixed).sum(-1).mean()
    first_adam_step(actor, saved["actor"], policy_loss - weight_of_entropy * entropy, 0.01, 1e-4)
    logged = scalars("one")
    for tag, value in dict(value_loss=value_loss, entropy=entropy, policy_loss=policy_loss).items():
        assert logged[f"losses/{tag}"][0][1] == pytest.approx(value.item(), rel=1e-3, abs=1e-6), tag
    assert logged["charts/episodic_return"] == [(2, pytest.approx(seen["reward"].sum(0).mean().item(), rel=1e-5))]
    explained = 1 - advantages.var(correction=0) / returns.var(correction=0)
    assert logged["losses/explained_variance"][0][1] == pytest.approx(explained.item(), rel=1e-3, abs=1e-5)


@SCRIPTS
def test_ratios_are_clipped(script):
    """With a clip range of 0 a second epoch moves no probability that already moved as its advantage asks; with none
    the same epochs go on. The logged fraction says so."""
    moved, outside = {}, {}
    for clip in (0.0, 1e3):
        options = dict(num_envs=2, num_steps=4, rounds=4, episodes=2, num_minibatches=1, update_epochs=30)
        system = (toy, Toy) if script is dgpg else (toy,)
        script.train(script.Args(**options, learning_rate=0.01, clip_coef=clip, exp_name=str(clip)), *system)
        logged = scalars(str(clip))
        moved[clip], outside[clip] = (logged[f"losses/{name}"][0][1] for name in ("approx_kl", "clipfrac"))
    assert 0 < moved[0.0] < 0.5 * moved[1e3]
    assert outside[0.0] > 0.9 and outside[1e3] == 0


def test_values_are_in_the_rewards_units_and_the_targets_standard_scores():
    """Running sums of R and R², the first update with weight 1, later ones 0.1 of what was there."""
    sums, batches = torch.tensor([1e-8, 0, 1e-8]), [torch.randn(8, 2) * 3 - 5 for _ in range(3)]
    assert [float(value) for value in dgpg.mean_std(sums)] == pytest.approx([0, 1])
    Toy.seen.clear()
    train(Args(num_envs=2, num_steps=2, rounds=4, episodes=2, learning_rate=0.0, exp_name="norm"), toy, Toy)
    (run,) = pathlib.Path("runs").glob("norm__*")
    critic = torch.load(run / "checkpoint.pt", weights_only=True)["critic"]
    sums, weights, seen = critic.pop("sums"), dgpg.network(5, 64, 1.0), seen_in_training()
    weights.load_state_dict(critic)
    every = []  # the returns of both updates: the second one's values are scaled by the first one's returns
    mean, std = torch.tensor(0.0), torch.tensor(1.0)
    for part in (slice(0, 2), slice(2, 4)):
        states = torch.cat([seen["state"][part], seen["next_state"][part][-1:]])
        values = weights(states).detach() * std + mean
        every.append((gae(seen["reward"][part], values, 0.97, 0.9) + values[:-1]).flatten())
        mean, std = every[0].mean(), every[0].std(correction=0).clamp(min=0.01)
    shares = torch.tensor([0.9, 1.0]) / 1.9
    mean = shares[0] * every[0].mean() + shares[1] * every[1].mean()
    square = shares[0] * (every[0] ** 2).mean() + shares[1] * (every[1] ** 2).mean()
    torch.testing.assert_close(torch.stack(dgpg.mean_std(sums)), torch.stack([mean, (square - mean**2).sqrt()]))


def test_a_minibatch_has_some_states_and_some_agents(monkeypatch):
    """Every epoch goes through all states once; the agents are drawn anew for each minibatch."""
    batches = []

    class Recorded(torch.nn.Sequential):
        def forward(self, x):
            if x.ndim == 4 and torch.is_grad_enabled():
                batches.append(x.detach())
            return super().forward(x)

    network = dgpg.network
    monkeypatch.setattr(dgpg, "network", lambda *size: Recorded(*network(*size)))
    Toy.seen.clear()
    options = dict(num_envs=2, num_steps=3, rounds=4, episodes=2, num_minibatches=3, update_epochs=2)
    train(Args(**options, minibatch_agents=1), toy, Toy)
    # rounds 0 to 2 are six states, in three minibatches; the last round is a batch of its own: two states, two of them
    assert [len(batch) for batch in batches] == [2, 2, 2] * 2 + [1, 1] * 2
    obs = seen_in_training()["obs"].flatten(0, 1)  # [T E, N, K, F]
    found = [[(obs == row).all((-2, -1)).nonzero().tolist() for row in batch[:, 0]] for batch in batches]
    states = [[where[0][0] for where in batch] for batch in found]
    for epoch in (slice(0, 3), slice(3, 6), slice(6, 8), slice(8, 10)):
        drawn = sum(states[epoch], [])
        assert sorted(drawn) == list(range(6)) if epoch.stop <= 6 else sorted(drawn) == [6, 7]
    assert {where[0][1] for batch in found for where in batch} == {0, 1}


@pytest.mark.parametrize("rounds", [1, 7, 10])
@SCRIPTS
def test_any_number_of_rounds_is_trained_on(script, rounds):
    """The last batch may be shorter than the others, down to one state."""
    args = script.Args(**{**TINY, "rounds": rounds, "num_steps": 3, "num_envs": 1})
    assert math.isfinite(script.train(args)["return"])
    assert all(math.isfinite(value) for points in scalars().values() for _, value in points)


def test_actions_that_were_all_but_impossible_do_not_break_the_loss():
    """With π_old(a) = 0 in single precision ρ(a) may be infinite after a step; its weight is 0."""
    save_actor(3000.0)
    train(Args(**{**TINY, "n_agents": 9, "learning_rate": 0.1, "update_epochs": 8}, init_actor="decided.pt"))
    assert all(math.isfinite(value) for _, value in scalars()["losses/policy_loss"])


def save_actor(gain):
    """A checkpoint, decided.pt, of an actor of the cloud with outputs of this size."""
    actor = dgpg.network(7, 32, gain)
    torch.save({"actor": actor.state_dict(), "system": "CloudEnv"}, "decided.pt")
    return actor


@SCRIPTS
def test_argmax_is_the_return_of_the_most_likely_actions(script):
    actor = save_actor(3.0)
    options = dict(n_agents=6, rounds=10, num_steps=10, load=2.0, episodes=0, init_actor="decided.pt")
    result = script.train(script.Args(**options))
    env = CloudEnv(40, 6, rounds=10, load=2.0, held_out=True)
    most_likely = dgpg.evaluate(env, lambda obs: actor(torch.tensor(obs)).argmax(-1).numpy())
    assert result["argmax"] == most_likely != result["return"]
    assert result["heuristic"] == dgpg.evaluate(env, lambda obs: env.heuristic())
    assert result["cost_ratio"] == result["return"] / result["heuristic"]


def test_evaluated_on_the_held_out_part_and_trained_on_the_other():
    made = []

    def make_env(args, num_envs, held_out=False):
        made.append((num_envs, held_out))
        return dgpg.cloud(args, num_envs, held_out)

    for n_agents, scenarios in ((3, 40), (200, 10), (1500, 2)):
        train(Args(**{**TINY, "episodes": 0, "n_agents": n_agents, "num_envs": 5}), make_env)
        assert made[-2:] == [(5, False), (scenarios, True)]


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


def test_guided_policy_learns_and_the_others_do_not():
    """Four episodes at N = 5: DG-PG is at Best-Fit (cost ratio 1), untrained and unguided policies are far from it."""
    budget = dict(n_agents=5, episodes=4, eval_every=4)
    assert train(Args(**budget))["cost_ratio"] < 1
    assert train(Args(**{**budget, "episodes": 0}))["cost_ratio"] > 8
    assert train(Args(**budget, alpha_start=0, alpha_end=0))["cost_ratio"] > 2


@pytest.mark.parametrize("module", [mappo, ippo, dgpg])
def test_finds_the_best_policy_of_a_known_game(module):
    """Two agents, two servers, one round: one task fits one server only, the other the other, whichever agent has it.

    The server with less CPU has more memory. At any wrong placement some agent gains by moving; the best return is 0.
    """

    class Game(CloudEnv):
        def _scenario(self, rng, start):
            tasks = np.stack([rng.permutation([[5, 0.1], [0.1, 28]]) for _ in range(2)])
            return Scenario(tasks, np.ones((2, 2)), np.ones(1))

    def game(args, num_envs, held_out=False):
        return Game(num_envs, 2, rounds=1)

    assert CloudEnv(1, 2).capacity.tolist() == [[4, 32], [8, 16]]
    options = dict(n_agents=2, rounds=1, num_steps=1, num_envs=64, eval_every=10**9, num_minibatches=4, update_epochs=5)
    system = (game, analytic_model) if module is dgpg else (game,)
    untrained = module.train(module.Args(**options, learning_rate=3e-3, episodes=0), *system)
    # no longer: in a solved game noise is all that is left to standardise, a policy may leave the optimum for a while
    trained = module.train(module.Args(**options, learning_rate=3e-3, episodes=64 * 20), *system)
    assert trained["return"] > 0.1 * trained["random"]
    assert untrained["return"] < 0.5 * untrained["random"] < 0


def test_the_entropy_bonus_keeps_the_policy_from_deciding():
    entropies = []
    for weight in (0.0, 1.0):
        train(Args(n_agents=3, rounds=20, episodes=3, eval_every=3, ent_coef=weight, exp_name=str(weight)))
        entropies.append(scalars(str(weight))["losses/entropy"][-1][1])
    assert entropies[0] < entropies[1] - 0.05


@SCRIPTS
def test_annealing_takes_the_learning_rate_of_adam_to_0(script):
    options = {**TINY, "episodes": 4, "num_envs": 2, "num_steps": 5}
    script.train(script.Args(**options, learning_rate=0.01, anneal_lr=True))
    rates = [0.01, 0.005625, 0.0025, 0.000625]  # at the four updates, two an episode
    assert [value for _, value in scalars()["charts/learning_rate"]] == pytest.approx(
        [sum(rates[:2]) / 2, sum(rates[2:]) / 2]
    )


def test_everything_that_is_written(capsys):
    train(Args(**{**TINY, "num_steps": 5}, exp_name="name", seed=3, alpha_start=0.9, alpha_end=0.2))
    (run,) = pathlib.Path("runs").iterdir()
    assert run.name.startswith("name__n3__3__")
    logged = scalars()
    assert set(logged) == {
        *("charts/episodic_return", "charts/SPS", "charts/learning_rate"),
        *("eval/return", "eval/argmax", "eval/cost_ratio", "eval/heuristic", "eval/random"),
        *("losses/value_loss", "losses/policy_loss", "losses/entropy", "losses/approx_kl", "losses/clipfrac"),
        *("losses/explained_variance", "guidance/alpha", "guidance/deviation", "guidance/g_std"),
    }
    for tag, points in logged.items():
        assert [step for step, _ in points] == ([2] if tag == "eval/argmax" else [1, 2]), tag
    assert [value for _, value in logged["guidance/alpha"]] == pytest.approx([0.8125, 0.4625])  # means of 0, ¼ and ½, ¾
    tags = events().Tags()
    assert "hyperparameters/text_summary" in tags["tensors"] and tags["histograms"] == ["guidance/x_minus_x_ref"]
    last = dict(word.split("=") for word in capsys.readouterr().out.splitlines()[-1].split())
    assert last.keys() == {"episodes", "heuristic", "random", "return", "cost_ratio", "argmax", "seconds"}
    for name in ("heuristic", "random", "return", "argmax", "cost_ratio"):
        assert float(last[name]) == pytest.approx(logged[f"eval/{name}"][-1][1], abs=6e-4)
    # the actor in the checkpoint evaluates to what was printed, and runs at another N
    for path in (run, run / "checkpoint.pt"):
        again = train(Args(**{**TINY, "episodes": 0}, seed=3, init_actor=str(path)))
        assert again["return"] == pytest.approx(logged["eval/return"][-1][1], rel=1e-6)
    train(Args(**{**TINY, "episodes": 0, "n_agents": 8}, init_actor=str(run)))


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
