import importlib.util
import pathlib
import runpy
import sys

import pytest
import torch


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")
    torch.set_num_threads(1)  # as in the scripts


def load_example(system, name):
    """A module of examples/<system> by its path: the project's own one of that name stays what it was."""
    path = pathlib.Path(__file__).parent.parent / "examples" / system / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{system}_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def train_on(monkeypatch, tmp_path):
    """`train` of an unchanged dgpg.py that finds these two modules. Returns the final figures."""
    monkeypatch.chdir(tmp_path)

    def train(env_module, model, **options):
        monkeypatch.setitem(sys.modules, "cloud_env", env_module)
        monkeypatch.setitem(sys.modules, "analytic_model", model)
        script = runpy.run_path(str(pathlib.Path(__file__).parent.parent / "dgpg.py"))
        return script["train"](script["Args"](**options))

    return train
