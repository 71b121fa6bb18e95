"""Tests that hold a rule to ONNX Runtime are skipped where that ONNX Runtime is itself wrong."""

from __future__ import annotations

import signal
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
    "bits_of_float32-": "does not read opset 26, which brings BitCast",
    "bits_of_another_integer-": "does not read opset 26, which brings BitCast",
    "python_remainder": "does not read opset 26, which gives Mod of floats the divisor's sign",
    "test_remainders_of_floats": "does not read opset 26, which gives Mod of floats the divisor's sign",
    "tensor_scatter_as_scatter-": "does not read opset 24, which brings TensorScatter",
    "irfft_of_torch": "refuses an inverse one-sided DFT",
    "stft_of_a_complex_signal": "gives other values, of up to 1e36",
    "test_deform_conv_is_onnx_runtimes": "has no kernel of DeformConv-19",
    "deform_conv_by_plugin-": "has no kernel of DeformConv-19",
    "einsum_as_products-sum_and_transpose": "refuses this Einsum",
    "cubic_over_three_axes": "refuses this Resize",
    "scales_of_chosen_axes_in_another_order": "refuses this Resize",
    "quantize_in_float-half_precision": "gives other values in half precision",
    "quantisation_of_int8-of_a_tensor_in_half_precision": "gives other values in half precision",
    "layer_norm_as_reductions-around_a_large_mean": "gives other values",
    "layer_norm_as_reductions-with_mean_and_deviation_in_half": "gives other values",
    "lrn_by_average_pooling-": "gives other values",
    "group_query_attention_of_the_standard-a_token_with_a_window": "gives other values",
    "operators_that_onnx_has_now": "ends the process",
    "tfidf_as_comparisons-numbers_and_pairs": "gives other values",
    "test_dilated_pooling[AveragePool-1": "divides by the wrong count at the borders",
    "test_dilated_pooling[AveragePool-3": "divides by the wrong count at the borders",
    "test_a_rule_leaves_the_outputs_of_any_model": "ends the process at some Resize, and gives other values elsewhere",
}
"""What ONNX Runtime 1.23, the last for Python 3.10, does to models of these tests."""


@pytest.fixture(autouse=True, scope="session")
def _interrupts_reach_children() -> None:
    """A shell has what it starts in the background ignore them, and so would the processes that tests interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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
