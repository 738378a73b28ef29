import pytest
import torch


def pytest_configure():
    torch.set_num_threads(1)  # as in the scripts


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
