"""The algorithm: formulas by hand and by enumeration, what the loop makes of them, and learning."""

import itertools
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from torch.distributions import Categorical

import dgpg
import ippo
import mappo
from analytic_model import local_influence, reference_state
from cloud_env import CloudEnv, Scenario
from dgpg import Args, gae, guidance
from tests.helpers import SCRIPTS, SYSTEMS, only_run, play, scalars

TINY = dict(n_agents=3, episodes=2, rounds=10, load=2.0, eval_every=1, update_epochs=2, num_minibatches=3, num_steps=10)


@SYSTEMS
def test_what_the_guidance_descends_by_enumeration(system, model):
    """E[g_i ∇log π_i] over all joint actions is ∇E[d + ½ Σ_i ‖z_i‖²], less a baseline or not; so is the expectation
    over the own action, E[Σ_a π_i(a) g_i(a) ∇log π_i(a)], which has less variance."""
    env = system(1, 3, 100, 0.3, 3)
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    probs = logits.softmax(-1)
    pi, agents = probs.detach(), torch.arange(3)
    score = torch.eye(3, dtype=torch.float64) - pi.unsqueeze(1)  # ∇_logits log π_i(a) [N, K of a, K]
    potential = gradients = squares = 0
    for joint in itertools.product(range(3), repeat=3):
        actions = torch.tensor([joint])
        _, played = play(env, actions=actions.numpy())
        x, x_ref, (z, touched) = played["x"], model.reference_state(**played), model.local_influence(**played)
        own = z[0, agents, joint]  # [N, J, R]
        chance = probs[agents, joint].prod()
        potential = potential + chance * 0.5 * ((x - x_ref).square().sum() + own.square().sum())
        (of_action,) = guidance(x, x_ref, z, touched, actions)  # [N, K]
        g = of_action.gather(1, actions.T)
        expected = ((x - x_ref)[0, touched[0, agents, joint]] * own).sum((-2, -1))
        torch.testing.assert_close(g.squeeze(1), expected, rtol=1e-10, atol=1e-12)
        mean = (pi * of_action).sum(1, keepdim=True)
        every = (pi * (of_action - mean)).unsqueeze(-1) * score  # [N, K of a, K]
        own_score = score[agents, joint]
        samples = torch.stack([g * own_score, (g - mean) * own_score, every.sum(1)])  # the paper's, less a baseline, …
        gradients = gradients + chance.detach() * samples
        squares = squares + chance.detach() * samples.square().sum((1, 2))
    (expected,) = torch.autograd.grad(potential, logits)
    for gradient in gradients:
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    assert expected.abs().max() > 1e-4  # a gradient worth leaving unchanged
    # all have the same mean, so that the squares' order is that of the variances
    paper, sampled, expectation = squares
    assert expectation < 0.9 * min(paper, sampled)


def test_guidance_on_a_shared_link_by_hand_and_shapes_that_do_not_fit():
    """Two routes that share link 0, the second one shorter and padded; a state for each of them taken."""
    touched = torch.tensor([[[[0, 1], [0, 0]]]]).expand(2, 1, 2, 2)
    z = torch.tensor([[[[[1.0], [2.0]], [[3.0], [0.0]]]]]).expand(2, 1, 2, 2, 1)
    x, x_ref = torch.tensor([[[5.0], [7.0]], [[6.0], [5.0]]]), torch.tensor([[[1.0], [1.0]], [[2.0], [1.0]]])
    given = dict(x=x, x_ref=x_ref, z=z, touched=touched, actions=torch.tensor([[0], [1]]))
    # route 0 taken: g(0) = 4·1 + 6·2 = 16; instead route 1: link 0 at 5 − 1 + 3: g(1) = 6·3 = 18
    # route 1 taken: g(1) = 4·3 = 12; instead route 0: link 0 at 6 − 3 + 1, link 1 at 5 + 2: g(0) = 2·1 + 6·2 = 14
    torch.testing.assert_close(guidance(**given), torch.tensor([[[16.0, 18.0]], [[14.0, 12.0]]]))
    for wrong in (dict(x_ref=x_ref[:, :1]), dict(touched=touched[..., :1]), dict(actions=given["actions"][:1])):
        with pytest.raises(AssertionError):
            guidance(**given | wrong)


@SCRIPTS
def test_gae_bootstraps_from_the_truncated_state_by_hand(script):
    rewards, values = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.5, 0.0], [1.0, 0.0], [4.0, 0.0]])
    # γ = 0.5, λ = 0.2: δ_1 = 2 + 0.5·4 − 1 = 3, δ_0 = 1 + 0.5·1 − 0.5 = 1, Â_0 = 1 + 0.1·3; the second: 1 + 0.1·2
    torch.testing.assert_close(script.gae(rewards, values, 0.5, 0.2), torch.tensor([[1.3, 1.2], [3.0, 2.0]]))


def test_networks_are_orthogonal_and_give_a_number_for_each_row():
    net, x = dgpg.network(4, 8, 0.01), torch.randn(3, 5, 2, 4)
    torch.testing.assert_close(net(x)[2, 1], net(x[2, 1]))
    hidden, last = net[2].weight, net[4].weight
    torch.testing.assert_close(hidden @ hidden.T, 2 * torch.eye(8), rtol=1e-5, atol=1e-5)  # gain √2
    assert last.norm().item() == pytest.approx(0.01) and not any(net[k].bias.any() for k in (0, 2, 4))


class Recorded(CloudEnv):
    """Keeps what it is asked and what it answers, in training and held out."""

    seen = {}

    def __init__(self, args, num_envs, held_out=False):
        super().__init__(num_envs, args.n_agents, args.rounds, args.load)
        self.record = self.seen[held_out] = defaultdict(list)
        self.constants["x"] = 0  # the model can not be given the x that was played, too

    def reset(self, seed):
        self.record["seeds"] += range(seed, seed + self.num_envs)
        return super().reset(seed)

    def step(self, actions):
        self.record["actions"].append(actions.copy())
        obs, reward, *rest = super().step(actions)
        self.record["reward"].append(reward)
        actions[...] = 0  # an environment may write into its actions
        return obs, reward, *rest

    def _observe(self, **played):
        obs, info = super()._observe(**played)
        for name, value in dict(obs=obs, state=info["state"], **played).items():
            self.record[name].append(value)
        return obs, info


def train_recorded(script, name="recorded", **options):
    """Train for an episode of four rounds. Returns the checkpoint, the scalars, and what was seen of it [T, E, ...]."""
    small = dict(n_agents=3, rounds=4, load=6.0, num_steps=4, num_minibatches=1, update_epochs=1) | options
    script.train(script.Args(**small, num_envs=2, episodes=2, exp_name=name), Recorded)
    saved = torch.load(only_run(name) / "checkpoint.pt", weights_only=True)
    seen = {key: torch.tensor(np.stack(values[-4:])) for key, values in Recorded.seen[False].items()}
    obs, state = (torch.tensor(np.stack(Recorded.seen[False][key][-5:])) for key in ("obs", "state"))
    seen["obs"], seen["reward"] = obs[:-1], seen["reward"].float()
    # what the critic sees [T + 1, E, ...], and the rewards of its values
    seen["inputs"] = obs.flatten(-2) if script is ippo else state
    seen["rewards"] = seen["reward"].unsqueeze(-1) if script is ippo else seen["reward"]
    return saved, scalars(name), seen


def first_adam_step(net, saved, loss, rate, max_norm):
    """The weights are where the first step of Adam along the clipped gradient of `loss` leads to."""
    loss.backward()
    assert torch.nn.utils.clip_grad_norm_(net.parameters(), max_norm) > 2 * max_norm
    largest = max(weight.grad.abs().max() for weight in net.parameters())
    for name, weight in net.named_parameters():
        step = rate * weight.grad / (weight.grad.abs() + 1e-5)
        clear = weight.grad.abs() > 1e-4 * largest  # not a rounding error
        torch.testing.assert_close(saved[name][clear], (weight - step).detach()[clear], rtol=1e-4, atol=3e-5)
        assert clear.any() or name == "4.bias"  # the same for all actions: it moves no probability


@pytest.mark.parametrize("form, script", [("expectation", dgpg), ("sampled", dgpg), ("mappo", mappo), ("ippo", ippo)])
def test_one_update_follows_the_gradient_of_the_formulas(form, script):
    """The actor's and the critic's weights after it, computed again from what the environment saw.

    At ρ = 1 the gradient of the clipped loss is that of −Σ_a ρ(a) A(a) with A(a) = (1−α) 1[a drawn] Â − α w(a) ĝ(a).
    """
    options = dict(learning_rate=0.01, max_grad_norm=1e-4, ent_coef=5.0)
    if script is dgpg:
        options |= dict(alpha_start=0.3, own_action_expectation=form == "expectation")
    saved, logged, seen = train_recorded(script, **options)
    torch.manual_seed(1)  # the weights that it began with
    actor, critic = script.network(7, 32, 0.01), script.network(seen["inputs"].shape[-1], 64, 1.0)
    values = critic(seen["inputs"]).detach()
    advantages = gae(seen["rewards"], values, 0.97, 0.9)
    returns = advantages + values[:-1]
    targets = (returns - returns.mean()) / returns.std(correction=0)
    value_loss = torch.nn.functional.huber_loss(critic(seen["inputs"][:-1]), targets, delta=10.0)
    first_adam_step(critic, saved["critic"], value_loss, 0.01, 1e-4)

    logprobs = actor(seen["obs"]).log_softmax(-1)  # [T, E, N, K]
    old = logprobs.detach()
    taken = torch.nn.functional.one_hot(seen["actions"], 3)
    mixed = (advantages - advantages.mean()) / advantages.std(correction=0)
    mixed = taken * mixed.view(4, 2, -1, 1)  # per agent in IPPO
    known = dict(value_loss=value_loss)
    if script is dgpg:
        x, load, demand, actions = (seen[key].flatten(0, 1) for key in ("x", "offered_load", "demand", "actions"))
        constants = {name: torch.tensor(value) for name, value in CloudEnv(2, 3).constants.items()}
        x_ref = reference_state(load, **constants)
        g = guidance(x, x_ref, *local_influence(demand, **constants), actions).view(4, 2, 3, 3).float()
        g = g - (old.exp() * g).sum(-1, keepdim=True)
        weight = old.exp() if form == "expectation" else taken
        spread = (weight * g**2).sum(-1).mean().sqrt()
        mixed = 0.7 * mixed - 0.3 * weight * g / spread
        assert logged["guidance/g_std"][0][1] == pytest.approx(spread.item(), rel=1e-4)
        distance = (x - x_ref).square().sum((-2, -1)).mean().item() / 2
        assert logged["guidance/deviation"][0][1] == pytest.approx(distance, rel=1e-4)
    known["policy_loss"] = -((logprobs - old).exp() * mixed).sum(-1).mean()
    known["entropy"] = -(logprobs.exp() * logprobs).sum(-1).mean()
    first_adam_step(actor, saved["actor"], known["policy_loss"] - 5 * known["entropy"], 0.01, 1e-4)

    known["explained_variance"] = 1 - advantages.var(correction=0) / returns.var(correction=0)
    for tag, value in known.items():
        assert logged[f"losses/{tag}"][0][1] == pytest.approx(value.item(), rel=1e-3, abs=1e-5), tag


@SCRIPTS
def test_ratios_are_clipped(script):
    """With a clip range of 0 a probability that has moved as its advantage asks moves no further; as is logged."""
    moved, outside = {}, {}
    for clip in (0.0, 1e3):
        _, logged, _ = train_recorded(script, f"clip {clip}", update_epochs=30, learning_rate=0.01, clip_coef=clip)
        moved[clip], outside[clip] = (logged[f"losses/{name}"][0][1] for name in ("approx_kl", "clipfrac"))
    assert 0 < moved[0.0] < 0.5 * moved[1e3]
    assert outside[0.0] > 0.9 and outside[1e3] == 0


@SCRIPTS
def test_values_are_in_the_rewards_units_and_the_targets_standard_scores(script):
    """Running sums of R and R²: a second update counts 1, the first one 0.9. The first scales the second's values."""
    for sums, expected in (([1e-8, 0, 1e-8], [0, 1]), ([1, 3, 8.9999], [3, 0.01])):
        torch.testing.assert_close(torch.stack(script.mean_std(torch.tensor(sums))), torch.tensor(expected).float())
    saved, logged, seen = train_recorded(script, num_steps=2, learning_rate=0.0)
    sums, critic = saved["critic"].pop("sums"), script.network(seen["inputs"].shape[-1], 64, 1.0)
    critic.load_state_dict(saved["critic"])
    outputs = critic(seen["inputs"]).detach()
    first = gae(seen["rewards"][:2], outputs[:3], 0.97, 0.9) + outputs[:2]
    values = outputs[2:] * first.std(correction=0) + first.mean()
    second = gae(seen["rewards"][2:], values, 0.97, 0.9) + values[:-1]
    mean, square = ((0.9 * (first**k).mean() + (second**k).mean()) / 1.9 for k in (1, 2))
    torch.testing.assert_close(torch.stack(script.mean_std(sums)), torch.stack([mean, (square - mean**2).sqrt()]))
    assert logged["charts/episodic_return"] == [(2, pytest.approx(seen["reward"].sum(0).mean().item(), rel=1e-5))]


def save_actor(gain, system="CloudEnv"):
    """A checkpoint, decided.pt, of an actor with outputs of this size."""
    actor = dgpg.network(7, 32, gain)
    torch.save({"actor": actor.state_dict(), "system": system}, "decided.pt")
    return actor


@SCRIPTS
def test_a_minibatch_has_some_states_and_some_agents(script):
    """Every epoch goes through all states once; the agents are drawn, as the entropy tells that is logged."""
    actor, drawn = save_actor(3.0, "Recorded"), []
    for seed in range(1, 9):
        options = dict(seed=seed, minibatch_agents=1, learning_rate=0.0, init_actor="decided.pt")
        _, logged, seen = train_recorded(script, str(seed), **options)
        entropy = Categorical(logits=actor(seen["obs"])).entropy().mean((0, 1)).tolist()  # of each agent
        drawn += [i for i in range(3) if logged["losses/entropy"][0][1] == pytest.approx(entropy[i], rel=1e-5)]
    assert len(drawn) == 8 and set(drawn) == {0, 1, 2}
    # six states in three minibatches, then two in two, in two epochs each
    saved, _, _ = train_recorded(script, "steps", num_minibatches=3, update_epochs=2, num_steps=3)
    assert saved["optimizer"]["state"][0]["step"] == 10


EDGES = {
    "one of everything": dict.fromkeys(("n_agents", "rounds", "num_steps", "num_minibatches", "minibatch_agents"), 1),
    "more than there are": dict(servers_per_agent=99, minibatch_agents=10**9, num_minibatches=99),
    "a last batch of one state, one server in reach": dict(rounds=7, num_steps=3, servers_per_agent=1),
    "nothing is learnt": dict(learning_rate=0, gamma=0, gae_lambda=0, clip_coef=0, max_grad_norm=0, eval_every=10**9),
    "far too much load, no discount, the largest seed": dict(load=1000, gamma=1, gae_lambda=1, seed=99_999),
    # π_old(a) = 0 in single precision: ρ(a) may be infinite after a step, its weight is 0
    "all but impossible actions": dict(n_agents=9, learning_rate=0.1, update_epochs=8, init_actor="decided.pt"),
}


@SCRIPTS
@pytest.mark.parametrize("options", EDGES.values(), ids=EDGES)
def test_options_at_their_edges_train(script, options):
    save_actor(3000.0)
    script.train(script.Args(**{**TINY, "num_envs": 1, **options}))
    assert all(math.isfinite(value) for points in scalars().values() for _, value in points)


@SCRIPTS
def test_argmax_is_the_return_of_the_most_likely_actions(script):
    actor = save_actor(3.0)
    options = dict(n_agents=6, rounds=10, load=2.0, servers_per_agent=3, episodes=0, init_actor="decided.pt")
    result = script.train(script.Args(**options))
    env = CloudEnv(40, 6, 10, 2.0, 3, held_out=True)
    most_likely = dgpg.evaluate(env, lambda obs: actor(torch.tensor(obs)).argmax(-1).numpy())
    assert result["argmax"] == most_likely != result["return"]
    assert result["heuristic"] == dgpg.evaluate(env, lambda obs: env.heuristic())
    assert result["cost_ratio"] == result["return"] / result["heuristic"]


def test_evaluated_on_scenarios_that_no_training_has():
    """Also with the largest seed: environment e of `reset(seed)` draws the scenario of seed + e."""
    training, held_out = [], []
    for n_agents, scenarios, seed in ((3, 40, 1), (3, 40, 99_999), (200, 10, 2), (1500, 2, 3)):
        dgpg.train(Args(**{**TINY, "n_agents": n_agents, "episodes": 4}, num_envs=2, seed=seed), Recorded)
        training += Recorded.seen[False]["seeds"][2:]  # the first two are reset for the shapes
        held_out += set(Recorded.seen[True]["seeds"])
        assert len(set(Recorded.seen[True]["seeds"])) == scenarios
    assert len(set(training)) == 4 * 4 and not set(training) & set(held_out)


def test_guided_policy_learns_and_the_others_do_not():
    """Four episodes at N = 5: DG-PG is at Best-Fit (cost ratio 1), untrained and unguided policies are far from it."""
    budget = dict(n_agents=5, episodes=4, eval_every=4)
    assert dgpg.train(Args(**budget))["cost_ratio"] < 1
    assert dgpg.train(Args(**{**budget, "episodes": 0}))["cost_ratio"] > 8
    assert dgpg.train(Args(**budget, alpha_start=0, alpha_end=0))["cost_ratio"] > 2


@SCRIPTS
def test_finds_the_best_policy_of_a_known_game(script):
    """Two agents, two servers, one round: one task fits one server only, the other the other, whichever agent has it.

    The server with less CPU has more memory. At any wrong placement some agent gains by moving; the best return is 0.
    """

    class Game(CloudEnv):
        def __init__(self, args, num_envs, held_out=False):
            super().__init__(num_envs, 2, rounds=1)

        def _scenario(self, rng, start):
            tasks = np.stack([rng.permutation([[5, 0.1], [0.1, 28]]) for _ in range(2)])
            return Scenario(tasks, np.ones((2, 2)), np.ones(1))

    assert CloudEnv(1, 2).capacity.tolist() == [[4, 32], [8, 16]]
    options = dict(n_agents=2, rounds=1, num_steps=1, num_envs=64, eval_every=10**9, num_minibatches=4, update_epochs=5)
    # no longer: in a solved game noise is all that is left to standardise, a policy may leave the optimum for a while
    args = script.Args(**options, learning_rate=3e-3, episodes=64 * 20)
    trained = script.train(args, Game)
    args.episodes = 0
    untrained = script.train(args, Game)
    assert trained["return"] > 0.1 * trained["random"]
    assert untrained["return"] < 0.5 * untrained["random"] < 0


@SCRIPTS
def test_everything_that_is_written(script, capsys):
    options = {**TINY, "episodes": 6, "num_envs": 2, "num_steps": 5, "eval_every": 3}  # two updates an episode
    options |= dict(exp_name="name", seed=3, learning_rate=0.01, anneal_lr=True)
    script.train(script.Args(**options | (dict(alpha_start=0.9, alpha_end=0.2) if script is dgpg else {})))
    run, logged = only_run(), scalars()
    assert run.name.startswith("name__n3__3__")
    assert set(logged) == {
        *("charts/episodic_return", "charts/SPS", "charts/learning_rate"),
        *("eval/return", "eval/argmax", "eval/cost_ratio", "eval/heuristic", "eval/random"),
        *("losses/value_loss", "losses/policy_loss", "losses/entropy", "losses/approx_kl", "losses/clipfrac"),
        "losses/explained_variance",
        *(("guidance/alpha", "guidance/deviation", "guidance/g_std") if script is dgpg else ()),
    }
    for tag, points in logged.items():
        expected = [6] if tag == "eval/argmax" else [4, 6] if tag.startswith("eval/") else [2, 4, 6]
        assert [step for step, _ in points] == expected, tag
    # means over the updates at 0 and 1/6, at 2/6 and 3/6, and at 4/6 and 5/6 of the training
    rates = [0.01 * ((6 - k) ** 2 + (5 - k) ** 2) / 36 / 2 for k in (0, 2, 4)]
    assert [value for _, value in logged["charts/learning_rate"]] == pytest.approx(rates)
    if script is dgpg:
        alphas = [0.9 - 0.7 * (k + 0.5) / 6 for k in (0, 2, 4)]
        assert [value for _, value in logged["guidance/alpha"]] == pytest.approx(alphas)
    last = dict(word.split("=") for word in capsys.readouterr().out.splitlines()[-1].split())
    assert last.keys() == {"episodes", "heuristic", "random", "return", "cost_ratio", "argmax", "seconds"}
    for name in last.keys() - {"episodes", "seconds"}:
        assert float(last[name]) == pytest.approx(logged[f"eval/{name}"][-1][1], abs=6e-4)
    script.train(script.Args(**{**TINY, "episodes": 0, "n_agents": 8}, num_envs=1, init_actor=str(run)))  # another N


def test_same_seed_same_numbers_however_often_it_is_evaluated():
    logged = []
    for run, (every, seed) in enumerate([(1, 1), (1, 1), (9, 1), (1, 2)]):
        dgpg.train(Args(**{**TINY, "eval_every": every}, seed=seed, exp_name=str(run)))
        logged.append(scalars(str(run)))
        del logged[-1]["charts/SPS"]  # wall time
    assert logged[0] == logged[1]
    assert all(points[-1] == logged[0][tag][-1] for tag, points in logged[2].items())  # with fewer evaluations
    assert logged[0]["losses/policy_loss"] == logged[2]["losses/policy_loss"]
    assert all(logged[0][tag] != logged[3][tag] for tag in ("eval/return", "losses/policy_loss", "guidance/g_std"))
