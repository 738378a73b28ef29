"""The three scripts repeat each other to the letter: what they share by name has the same source."""

import ast
import difflib
import itertools
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = ("dgpg.py", "mappo.py", "ippo.py")
PACKAGES = {"numpy", "torch", "tyro"}
# a default differs only where tuning made the baseline better
TUNED = {
    "num_envs",
    "num_steps",
    "episodes",
    "eval_every",
    "anneal_lr",
    "num_minibatches",
    "learning_rate",
    "ent_coef",
}


def parse(script):
    source = (ROOT / script).read_text()
    return source, ast.parse(source).body


def definitions(script):
    """{name: source} of every top-level function and class but `train` and `Args`, which differ by the method."""
    source, body = parse(script)
    nodes = [node for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return {node.name: ast.get_source_segment(source, node) for node in nodes if node.name not in ("train", "Args")}


def options(script):
    """{name: (annotation, default, comment)} of `Args`."""
    source, body = parse(script)
    (args,) = [node for node in body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    fields = {}
    for field in args.body:
        comment = source.splitlines()[field.lineno - 1].split("  # ")[1]  # the option's help
        fields[field.target.id] = ast.unparse(field.annotation), ast.unparse(field.value), comment
    return fields


@pytest.mark.parametrize("one, other", list(itertools.combinations(SCRIPTS, 2)))
def test_what_two_scripts_share_is_the_same(one, other):
    first, second = definitions(one), definitions(other)
    shared = first.keys() & second.keys()
    assert shared == {"check", "MLP", "ValueNorm", "gae", "evaluate", "restore"}
    for name in shared:
        assert first[name] == second[name], name
    first, second = options(one), options(other)
    for name in first.keys() & second.keys():
        assert first[name][::2] == second[name][::2], name
        assert first[name][1] == second[name][1] or name in TUNED, name


def train_lines(script):
    """The lines of `train` without the comments behind them."""
    source, body = parse(script)
    (node,) = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == "train"]
    return [line.split("  # ")[0].strip() for line in ast.get_source_segment(source, node).splitlines()]


def changed(one, other):
    """Lines of `train` that only the first script has, and that only the other one has."""
    lines = list(difflib.ndiff(train_lines(one), train_lines(other)))
    return [[line[2:] for line in lines if line[0] == sign] for sign in "-+"]


def test_train_is_the_same_but_for_the_critic_and_the_guidance():
    gone, new = changed("mappo.py", "ippo.py")
    assert gone == [
        'critic = MLP(1, info["state"].shape[-1], 64, output_gain=1.0)',
        'states.append(tensor(info["state"]))',
        'states.append(tensor(info["state"]))',
    ]
    assert new == [
        "critic = MLP(actor.copies, next_obs[0, 0].size, 64, output_gain=1.0)",
        "states.append(obs.flatten(2))",
        "states.append(tensor(next_obs).transpose(0, 1).flatten(2))",
    ]
    gone, new = changed("mappo.py", "dgpg.py")
    assert gone == [
        "steps, states, rewards = [], [], []",
        "steps.append((obs, actions, dist.log_prob(actions)))",
        "b_obs, b_actions, b_logprobs = (torch.stack(part, 1).flatten(1, 2) for part in zip(*steps))",
        "more = (explained_variance,)",
        "logratio = dist.log_prob(b_actions[sample]) - b_logprobs[sample]",
        "ratio, advantage = logratio.exp(), b_advantages[sample]",
        "policy_loss = torch.max(-advantage * ratio, -advantage * clipped).mean()",
        "approx_kl = (ratio - 1 - logratio).mean()",
        "clipfrac = ((ratio - 1).abs() > args.clip_coef).float().mean()",
        'tags += "losses/explained_variance"',
    ]
    assert 22 < len(new) < 28
    assert "b_advantages = (1 - alpha) * b_advantages - alpha * weights * g / (g_std + 1e-8)" in new


def test_only_dgpg_knows_of_guidance():
    assert options("mappo.py").keys() == options("ippo.py").keys()
    assert options("dgpg.py").keys() - options("mappo.py").keys() == {
        "alpha_start",
        "alpha_end",
        "own_action_expectation",
    }
    assert options("mappo.py").keys() <= options("dgpg.py").keys()
    one, other = options("mappo.py"), options("ippo.py")
    assert {name for name in one if one[name][1] != other[name][1]} == {"learning_rate"}  # tuned for each


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_import_only_what_they_may(script):
    _, body = parse(script)
    imported = {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in body if isinstance(node, ast.ImportFrom)}
    modules = {"cloud_env", "analytic_model"} if script == "dgpg.py" else {"cloud_env"}
    assert {name.split(".")[0] for name in imported} - sys.stdlib_module_names == PACKAGES | modules
