"""What the README shows is what is there."""

import pathlib
import re

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dgpg

README = (pathlib.Path(dgpg.__file__).parent / "README.md").read_text()


def test_the_snippet_runs_a_trained_policy_and_every_tag_is_explained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dgpg.train(dgpg.Args(n_agents=4, rounds=10, episodes=1))
    (run,) = tmp_path.glob("runs/*")
    (snippet,) = re.findall(r"```python\n(import torch\n.*?)```", README, re.DOTALL)
    names = {}
    exec(snippet.replace("runs/…/checkpoint.pt", str(run / "checkpoint.pt")), names)
    _, reward, _, _, _ = names["env"].step(names["actions"])
    assert reward.shape == (1,) and names["actions"].shape == (1, 200)
    trained = torch.load(run / "checkpoint.pt", weights_only=True)["actor"]
    assert all(weight.equal(trained[name]) for name, weight in names["actor"].state_dict().items())
    rows = [line.split("|")[1] for line in README.splitlines() if line.startswith("| `")]
    explained = set()
    for row in rows:
        first, *others = re.findall(r"`([^`]*)`", row)
        explained |= {first} | {f"{first.split('/')[0]}/{other}" for other in others}
    tags = EventAccumulator(str(run)).Reload().Tags()
    assert explained == {*tags["scalars"], *tags["histograms"]}
