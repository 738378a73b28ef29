"""What the README shows is what is there."""

import ast
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dgpg

ROOT = pathlib.Path(dgpg.__file__).parent
README = (ROOT / "README.md").read_text()
GUIDANCE, SNIPPET = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_lines_of_the_guidance_are_those_of_dgpg():
    parts = GUIDANCE.split("# … and in every minibatch PPO's loss, over all own actions\n")
    assert len(parts) == 2
    for part, depth in zip(parts, (12, 20)):
        assert textwrap.indent(part, " " * depth) in (ROOT / "dgpg.py").read_text()


def test_the_snippet_runs_a_trained_policy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dgpg.train(dgpg.Args(n_agents=4, rounds=10, episodes=1))
    (checkpoint,) = tmp_path.glob("runs/*/checkpoint.pt")
    assert len(SNIPPET.splitlines()) <= 10
    names = {}
    exec(SNIPPET.replace("runs/…/checkpoint.pt", str(checkpoint)), names)
    _, reward, _, _, _ = names["env"].step(names["actions"])
    assert reward.shape == (1,) and names["actions"].shape == (1, 200)
    # the policy is the trained one, not a new network's
    trained = torch.load(checkpoint, weights_only=True)["actor"]
    assert all(weight.equal(trained[name]) for name, weight in names["actor"].state_dict().items())


def test_every_tag_is_explained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dgpg.train(dgpg.Args(n_agents=2, rounds=10, episodes=1))
    (run,) = tmp_path.glob("runs/*")
    for tag in EventAccumulator(str(run)).Reload().Tags()["scalars"]:
        group, name = tag.split("/")
        if group != "eval":  # the figures of the final line
            assert f"`{name}`" in README[README.index(f"`{group}/`") :], tag
    assert "`return_argmax`" in README


def test_the_commands_of_the_two_systems_find_their_modules(tmp_path):
    folders = re.findall(r"PYTHONPATH=(\S+) python -P dgpg.py", README)
    assert folders == ["examples/traffic", "examples/power"]
    bests = set()
    for folder in folders:
        command = [sys.executable, "-P", str(ROOT / "dgpg.py"), "--n-agents", "2", "--rounds", "10", "--episodes", "0"]
        paths = {**os.environ, "PYTHONPATH": str(ROOT / folder)}
        out = subprocess.run(command, cwd=tmp_path, env=paths, capture_output=True, text=True, check=True).stdout
        bests |= set(re.findall(r"best_fit=(\S+)", out))
    assert len(bests) == 2


def test_the_contract_names_what_dgpg_imports():
    imported = [
        name.name
        for node in ast.parse((ROOT / "dgpg.py").read_text()).body
        if isinstance(node, ast.ImportFrom) and node.module in ("cloud_env", "analytic_model")
        for name in node.names
    ]
    contract = (ROOT / "examples" / "README.md").read_text()
    assert len(imported) == 7
    for name in imported:
        assert f"`{name}" in contract, name
