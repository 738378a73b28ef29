import torch


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")
    torch.set_num_threads(1)  # as in the scripts
