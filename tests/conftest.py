import pathlib
import sys

import pytest
import torch

sys.path.append(str(pathlib.Path(__file__).parent.parent / "benchmark"))  # its files import each other by their names


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")
    torch.set_num_threads(1)  # as in the scripts


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
