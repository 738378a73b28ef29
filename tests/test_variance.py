"""The noise of one agent's gradient: the shared return's grows like N, the guidance's does not grow."""

import pathlib

import numpy as np
import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def path_to_the_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmark")


def test_noise_of_the_return_grows_with_n_and_of_the_guidance_does_not():
    import runs
    import variance

    sizes = (12, 36, 96)
    rows = [variance.measure(n, scenarios=2, samples=64, rounds=20, alpha=0.5) for n in sizes]
    slopes = {name: runs.slope(np.array(sizes), np.array([row[name] for row in rows]))[0] for name in rows[0]}
    assert 0.75 < slopes["return_variance"] < 1.25
    assert 0.6 < slopes["return_noise"] < 1.5
    assert abs(slopes["guidance_variance"]) < 0.25
    assert abs(slopes["guidance_noise"]) < 0.3
    assert abs(slopes["expectation_variance"]) < 0.25
    assert slopes["mixture_variance"] > 0.6  # at a fixed α the return's noise is still there
    assert abs(slopes["optimum_variance"]) < 0.3  # at the best α it is not
    for row in rows:
        assert row["alpha_star"] == pytest.approx(row["alpha_measured"], abs=0.1)
        assert row["expectation_variance"] < 0.9 * row["guidance_variance"]


def test_the_expectation_over_the_own_action_is_the_mean_of_the_sampled_guidance():
    import variance

    samples = torch.stack(list(variance.gradients(6, samples=500, rounds=1, seed=3)))  # [S, N, 3, P]
    sampled, expected = samples[:, :, 1], samples[:, :, 2]
    error = sampled.std(0) / len(samples) ** 0.5
    assert ((sampled.mean(0) - expected.mean(0)).abs() < 5 * error + 1e-4).all()
    assert expected.mean(0).abs().max() > 0.01
