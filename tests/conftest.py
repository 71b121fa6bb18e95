"""Tests that hold a rule to ONNX Runtime are skipped where that ONNX Runtime is itself wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import onnxruntime
import pytest

_FUZZ = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
}
hypothesis.settings.register_profile("quick", max_examples=8, derandomize=True, **_FUZZ)
hypothesis.settings.register_profile("thorough", max_examples=300, print_blob=True, **_FUZZ)
hypothesis.settings.load_profile("quick")  # --hypothesis-profile chooses another

OLD_RUNTIME = {
    "cumprod_forward_and_backward": "does not read opset 26, which brings CumProd",
    "irfft_of_torch": "refuses an inverse one-sided DFT",
    "two_sided_stft_of_a_complex_signal": "returns garbage (values of 1e36)",
    "test_dilated_pooling[AveragePool-1": "divides by the wrong count at the borders",
    "test_dilated_pooling[AveragePool-3": "divides by the wrong count at the borders",
}
"""What ONNX Runtime 1.23, the last for Python 3.10, does to models of these tests."""


@pytest.fixture(autouse=True, scope="session")
def _no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For what is converted outside of a single test, once for many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BRIDGE_CACHE_DIR", str(tmp_path_factory.mktemp("engine-cache-of-all")))
        yield


@pytest.fixture(autouse=True)
def engine_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has an engine cache of its own, so that none is served with another's engine."""
    folder = tmp_path_factory.mktemp("engine-cache")
    monkeypatch.setenv("BRIDGE_CACHE_DIR", str(folder))
    monkeypatch.delenv("BRIDGE_CACHE_LIMIT", raising=False)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 24):
        return
    for item in items:
        for name, what in OLD_RUNTIME.items():
            if name in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=f"ONNX Runtime {onnxruntime.__version__} {what}"))
