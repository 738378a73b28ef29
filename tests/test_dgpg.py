"""The algorithm: formulas by hand and by enumeration, learning, the command line and what it writes."""

import itertools
import os
import pathlib
import runpy
import shutil
import subprocess
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dgpg
import ippo
import mappo
from dgpg import MLP, Args, ValueNorm, clipped_policy_loss, gae, guided_advantage, standardise, train

ROOT = pathlib.Path(dgpg.__file__).parent
TINY = dict(n_agents=3, episodes=2, rounds=10, load=2.0, eval_every=1, update_epochs=2, num_minibatches=3)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def scalars():
    """Every scalar of the only run under runs/: {tag: [(step, value), ...]}."""
    (run,) = pathlib.Path("runs").iterdir()
    events = EventAccumulator(str(run)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_own_action_baseline_leaves_the_expected_gradient_unchanged():
    """E[g_i ∇log π_i] over all joint actions of three agents on three servers, each with its own softmax policy."""
    torch.manual_seed(0)
    agents, servers = 3, 3
    reach = torch.stack([torch.randperm(servers) for _ in range(agents)])
    z = torch.rand(1, agents, servers, 2, dtype=torch.float64)
    x_before, x_ref = torch.rand(2, 1, servers, 2, dtype=torch.float64)
    probs = torch.randn(agents, 1, servers, dtype=torch.float64).softmax(-1)
    expected = {False: 0, True: 0}
    variance = {False: 0, True: 0}
    for joint in itertools.product(range(servers), repeat=agents):
        actions = torch.tensor(joint).unsqueeze(-1)
        x = x_before.clone()
        for i, a in enumerate(joint):
            x[0, reach[i, a]] += z[0, i, a]
        weight = torch.stack([probs[i, 0, a] for i, a in enumerate(joint)]).prod()
        score = torch.nn.functional.one_hot(actions[:, 0], servers) - probs[:, 0]  # ∇_logits log π_i(a_i)
        for baseline in (False, True):
            _, g = guided_advantage(torch.zeros(1, 1), x, x_ref, z, reach, actions, probs, 1.0, own_action_baseline=baseline)
            expected[baseline] = expected[baseline] + weight * g * score
            variance[baseline] = variance[baseline] + weight * (g * score) ** 2
    torch.testing.assert_close(expected[False], expected[True], rtol=1e-12, atol=1e-14)
    assert expected[True].abs().min() > 1e-6  # a gradient worth leaving unchanged


def test_mixed_advantage_by_hand():
    """One agent, two servers, two states: Â = (1, 3), own-action guidance worked out on paper."""
    reach, actions = torch.tensor([[0, 1]]), torch.tensor([[0, 1]])
    z = torch.tensor([[[[0.5, 0.0], [0.25, 0.0]]], [[[0.5, 0.0], [1.0, 0.0]]]])
    x = torch.tensor([[[1.5, 0.0], [0.25, 0.0]], [[0.0, 0.0], [2.0, 0.0]]])
    x_ref = torch.full((2, 2, 2), 0.5)
    x_ref[..., 1] = 0.0
    probs = torch.tensor([[[0.5, 0.5], [0.25, 0.75]]])
    # state 0: g(0) = (1.5 − 0.5)·0.5 = 0.5, g(1) = (0.25 + 0.25 − 0.5)·0.25 = 0; mean 0.25; g − mean = 0.25
    # state 1: g(0) = (0 + 0.5 − 0.5)·0.5 = 0, g(1) = (2 − 0.5)·1 = 1.5; mean 1.125; g − mean = 0.375
    mixed, g = guided_advantage(standardise(torch.tensor([[1.0, 3.0]])), x, x_ref, z, reach, actions, probs, 0.25)
    torch.testing.assert_close(g, torch.tensor([[0.25, 0.375]]))
    # both standardise to (−1, 1): 0.75·(−1, 1) − 0.25·(−1, 1)
    torch.testing.assert_close(mixed, torch.tensor([[-0.5, 0.5]]))
    mixed, _ = guided_advantage(torch.tensor([[1.0, 3.0]]), x, x_ref, z, reach, actions, probs, 0.25, norm_adv=False)
    torch.testing.assert_close(mixed, torch.tensor([[0.75 * 1 - 0.25 * 0.25, 0.75 * 3 - 0.25 * 0.375]]))


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


def test_clipped_policy_loss_element_by_element():
    torch.manual_seed(0)
    advantages, ratio = torch.randn(4, 5), torch.rand(4, 5) * 2
    loss = clipped_policy_loss(advantages, ratio, 0.2)
    for a, r, value in zip(advantages.flatten().tolist(), ratio.flatten().tolist(), loss.flatten().tolist()):
        assert value == pytest.approx(-min(r * a, min(max(r, 0.8), 1.2) * a), abs=1e-6)


def test_value_norm_is_the_weighted_mean_and_deviation():
    torch.manual_seed(0)
    norm, batches = ValueNorm(beta=0.5), [torch.randn(1, 8, 2) * 3 - 5 for _ in range(3)]
    assert [value.item() for value in norm()] == [0, 1]  # before any return
    for batch in batches:
        norm.update(batch)
    weights = torch.tensor([0.25, 0.5, 1.0]).repeat_interleave(16) / 16 / 1.75
    every = torch.cat([batch.flatten() for batch in batches])
    mean = (weights * every).sum()
    torch.testing.assert_close(norm(), (mean, (weights * (every - mean) ** 2).sum().sqrt()), rtol=1e-4, atol=1e-5)


def test_standardise():
    x = standardise(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    assert x.mean().item() == pytest.approx(0, abs=1e-6) and (x**2).mean().item() == pytest.approx(1, abs=1e-5)
    assert standardise(torch.full((3, 3), 7.0)).tolist() == [[0.0] * 3] * 3


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
    torch.testing.assert_close(stack.weights[1][0] @ stack.weights[1][0].T, 2 * torch.eye(8), rtol=1e-5, atol=1e-5)  # orthogonal, gain √2
    with pytest.raises(AssertionError):
        stack(torch.randn(2, 5, 4))


@pytest.mark.parametrize("share_parameters, minibatch_agents", [(True, 50), (True, 2), (False, 2)])
def test_first_minibatch_has_ratio_one_and_its_own_advantages(monkeypatch, share_parameters, minibatch_agents):
    """With one epoch of one minibatch, the only ratio is that of the policy that acted, to itself: here a decided one."""
    torch.save({"actor": MLP(1 if share_parameters else 9, 7, 32, 3.0).state_dict()}, "decided.pt")
    drawn, guided, used, randperm = [], [], [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n, **options: drawn.append(randperm(n, **options)) or drawn[-1])
    monkeypatch.setattr(dgpg, "guided_advantage", lambda *args: guided.append(guided_advantage(*args)) or guided[-1])
    monkeypatch.setattr(dgpg, "clipped_policy_loss", lambda *args: used.append(args) or clipped_policy_loss(*args))
    options = dict(n_agents=9, num_envs=2, update_epochs=1, num_minibatches=1, share_parameters=share_parameters, minibatch_agents=minibatch_agents)
    train(Args(**{**TINY, **options}, init_actor="decided.pt"))
    ((advantages, ratio, _),) = used
    assert ratio.shape == (2 if (share_parameters and minibatch_agents == 2) else 9, 20)
    assert torch.allclose(ratio, torch.ones(()), atol=1e-5)
    states, agents = drawn
    agents = agents[: len(ratio)] if share_parameters else torch.arange(9)
    assert torch.equal(advantages, guided[0][0][agents][:, states])
    logged = scalars()
    assert [value for _, value in logged["losses/approx_kl"]] == pytest.approx([0], abs=1e-6)
    assert [value for _, value in logged["losses/clipfrac"]] == [0]


def test_guided_policy_learns_and_the_others_do_not():
    """Ten episodes at N = 5: DG-PG comes near Best-Fit (score 1), random (0), untrained and unguided policies do not."""
    budget = dict(n_agents=5, episodes=10, eval_every=10)
    assert train(Args(**budget))["score"] > 0.96
    assert train(Args(**{**budget, "episodes": 0}))["score"] < 0.5
    assert train(Args(**budget, alpha_start=0, alpha_end=0))["score"] < 0.9


def test_everything_that_is_written(capsys):
    train(Args(**TINY, exp_name="name", seed=3, save_model=True, alpha_start=0.9, alpha_end=0.2))
    (run,) = pathlib.Path("runs").iterdir()
    assert run.name.startswith("name__n3__3__")
    events = EventAccumulator(str(run)).Reload()
    logged = scalars()
    references = {f"eval/{name}_return" for name in ("best_fit", "best_fit_global", "random")}
    assert set(logged) == references | {
        *("charts/episodic_return", "charts/SPS", "charts/learning_rate"),
        *("eval/return", "eval/return_argmax", "eval/score", "eval/cost_ratio"),
        *("losses/value_loss", "losses/policy_loss", "losses/entropy", "losses/approx_kl", "losses/clipfrac", "losses/explained_variance"),
        *("guidance/alpha", "guidance/deviation", "guidance/g_std"),
    }
    assert [step for step, _ in logged.pop("eval/return_argmax")] == [2]  # at the end only
    assert all([step for step, _ in points] == [1, 2] for points in logged.values())
    assert [value for _, value in logged["guidance/alpha"]] == pytest.approx([0.9, 0.2])
    value, best, worst = (logged[f"eval/{name}"][-1][1] for name in ("return", "best_fit_return", "random_return"))
    assert logged["eval/score"][-1][1] == pytest.approx((value - worst) / (best - worst), rel=1e-5)
    assert logged["eval/cost_ratio"][-1][1] == pytest.approx(value / best, rel=1e-5)
    assert "hyperparameters/text_summary" in events.Tags()["tensors"]
    image = events.Images("eval/utilisation_minus_reference")[-1]
    assert (image.height, image.width) == (3, 2 * 10)  # servers x rounds, CPU and memory
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(f"final episodes=2 return={value:.2f} best_fit={best:.2f} random={worst:.2f} score=")
    saved = torch.load(run / "name.pt", weights_only=True)
    assert saved["args"]["alpha_end"] == 0.2
    # the saved actor evaluates to what was printed, and runs at another N
    again = train(Args(**{**TINY, "episodes": 0}, seed=3, init_actor=str(run / "name.pt")))
    assert again["return"] == pytest.approx(value, rel=1e-6)
    train(Args(**{**TINY, "episodes": 0, "n_agents": 8}, init_actor=str(run / "name.pt")))


@pytest.mark.parametrize("script", [dgpg, mappo, ippo])
def test_annealing_takes_the_learning_rate_of_adam_to_0(script):
    script.train(script.Args(**{**TINY, "episodes": 4, "num_envs": 2}, learning_rate=0.01, anneal_lr=True))
    assert [value for _, value in scalars()["charts/learning_rate"]] == pytest.approx([0.01, 0.005])  # two updates


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


def run_script(monkeypatch, *options):
    """`python dgpg.py options` in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["dgpg.py", *options])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / "dgpg.py"), run_name="__main__")
    return exit.value.code


@pytest.mark.parametrize(
    "options, named",
    [
        ("--n-agents 0", "n_agents"),
        ("--servers-per-agent 0", "servers_per_agent"),
        ("--alpha-start 1.1", "alpha_start"),
        ("--alpha-end -0.1", "alpha_end"),
        ("--alpha-end nan", "alpha_end"),
        ("--load 0", "load"),
        ("--load nan", "load"),
        ("--rounds 0", "rounds"),
        ("--num-envs 0", "num_envs"),
        ("--num-minibatches 0", "num_minibatches"),
        ("--num-minibatches 101", "num_minibatches"),
        ("--episodes -1", "episodes"),
        ("--episodes 5 --num-envs 2", "episodes"),
        ("--seed -1", "seed"),
        ("--learning-rate -1", "learning_rate"),
        ("--trace missing.csv", "missing.csv"),
        ("--trace empty.csv", "empty.csv: line 1"),
        ("--trace short.csv", "trace too short"),
        ("--trace unsorted.csv", "line 4: arrival_s"),
        ("--trace negative.csv", "line 2: duration_s"),
        ("--trace nan.csv", "line 2: cpu"),
        ("--trace columns.csv", "memory_gib"),
        ("--trace header.csv", "header.csv: no rows"),
        ("--hidden 0", "hidden"),
        ("--minibatch-agents 0", "minibatch_agents"),
        ("--gamma 1.1", "gamma"),
        ("--learning-rate inf", "learning_rate"),
        ("--eval-every 0", "eval_every"),
        ("--n-agents x", "--n-agents"),
        ("--n-agents 1.5", "--n-agents"),
        ("--load much", "--load"),
        ("--rounds", "--rounds"),
        ("--no-such-option 3", "--no-such-option"),
        ("stray", "stray"),
        ("--resume missing", "missing"),
        ("--init-actor missing.pt", "missing.pt"),
        ("--init-actor short.csv", "short.csv"),
        ("--init-actor other.pt", "other.pt"),
    ],
)
def test_bad_input_gets_one_line_and_status_2_and_writes_nothing(monkeypatch, capsys, options, named):
    header = "arrival_s,duration_s,cpu,memory_gib\n"
    files = {
        "empty.csv": "",
        "short.csv": header + "0,1,1,1\n1,1,1,1\n",
        "unsorted.csv": header + "0,1,1,1\n2,1,1,1\n1,1,1,1\n",
        "negative.csv": header + "0,-1,1,1\n",
        "nan.csv": header + "0,1,nan,1\n",
        "header.csv": header,
        "columns.csv": "arrival_s,duration_s,cpu\n",
    }
    for name, text in files.items():
        pathlib.Path(name).write_text(text)
    torch.save({"actor": MLP(3, 7, 32, 0.01).state_dict()}, "other.pt")  # one actor for each of three agents
    before = sorted(os.listdir())
    assert run_script(monkeypatch, *options.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("dgpg.py: error: ") and named in line
    assert sorted(os.listdir()) == before


def test_a_runs_folder_that_cannot_be_written_is_one_line(monkeypatch, capsys):
    pathlib.Path("runs").write_text("in the way")
    assert run_script(monkeypatch, "--n-agents", "2", "--episodes", "1") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dgpg.py: error: ") and "runs" in line


def test_three_files_copied_elsewhere_run_by_themselves():
    for name in ("dgpg.py", "cloud_env.py", "analytic_model.py"):
        shutil.copy(ROOT / name, name)
    command = [sys.executable, "dgpg.py", "--n-agents", "2", "--episodes", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("final episodes=1 return=")
    assert done.stderr == ""
