"""Which TensorRT is meant by a name, and what is known of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import onnx
import onnx_graphsurgeon as gs
import pytest

from bridge import target as targets
from bridge.errors import UsageError
from bridge.target import Target, resolve

from .support import RTX_INSTALLED


def described(flavour: Any, version: tuple[int, ...], **changes: Any) -> Target:
    return Target(flavour, version, **{"installed": True, "operators": frozenset(("Relu", "NonZero")), **changes})


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Says which TensorRTs and GPUs there are."""

    def make(*there: Target, gpus: tuple[tuple[int, int], ...] = ()) -> None:
        monkeypatch.setattr(targets, "installed", {item.flavour: item for item in there}.get)
        monkeypatch.setattr(targets, "gpu_compute_capabilities", lambda: gpus)

    return make


FULL, SMALL = described("tensorrt", (10, 9)), described("tensorrt-rtx", (1, 7, 1))


@pytest.mark.parametrize(
    ("there", "gpus", "expected"),
    [
        ((FULL, SMALL), ((8, 9),), FULL),
        ((FULL, SMALL), (), SMALL),
        ((SMALL,), ((9, 0),), SMALL),
        ((FULL,), ((9, 0),), FULL),
    ],
)
def test_auto_is_tensorrt_where_a_gpu_is_and_else_rtx(machine: Any, there: Any, gpus: Any, expected: Target) -> None:
    machine(*there, gpus=gpus)
    assert resolve("auto") is expected


@pytest.mark.parametrize(("there", "cause"), [((), "no TensorRT is installed"), ((FULL,), "there is no GPU for it")])
def test_auto_with_nothing_that_could_be_meant_says_why_and_what_to_do(machine: Any, there: Any, cause: str) -> None:
    machine(*there)
    with pytest.raises(UsageError) as caught:
        resolve("auto")
    assert all(word in str(caught.value) for word in (cause, "pip install", "tensorrt-8.5")), str(caught.value)


def test_a_name_is_the_installed_one_and_a_version_of_it_too(machine: Any) -> None:
    machine(FULL, SMALL)
    assert resolve("tensorrt") is FULL and resolve("tensorrt-rtx") is SMALL
    assert resolve("tensorrt-10") is FULL and resolve("tensorrt-10.9") is FULL and resolve("tensorrt-rtx-1.7") is SMALL


def test_a_version_that_is_not_installed_is_rewritten_for_and_not_built(machine: Any) -> None:
    machine(FULL)
    old = resolve("tensorrt-8.5")
    assert (old.flavour, old.version, old.installed) == ("tensorrt", (8, 5), False)
    assert old.why_not_run() == "TensorRT 8.5 is not installed here"
    assert not resolve("tensorrt-10.1").installed, "1 is not the beginning of 10.9"


@pytest.mark.parametrize("name", ["", "trt", "tensorrt-", "tensorrt-8.", "TensorRT", "tensorrt-rtx-x", "auto-8"])
def test_any_other_name_is_refused_with_those_that_there_are(name: str) -> None:
    with pytest.raises(UsageError, match=f"target {name!r}: not one of 'auto', 'tensorrt', 'tensorrt-rtx'"):
        resolve(name)


def test_a_flavour_that_is_not_installed_says_how_to_get_it_and_how_to_go_without(machine: Any) -> None:
    machine()
    with pytest.raises(UsageError) as caught:
        resolve("tensorrt")
    assert "'tensorrt' is not installed" in str(caught.value)
    assert "pip install 'torch-tensorrt-bridge[tensorrt]'" in str(caught.value)
    assert "name a version, such as 'tensorrt-" in str(caught.value)


def test_what_differs_between_versions(machine: Any) -> None:
    old, new, rtx = described("tensorrt", (8, 5)), described("tensorrt", (11, 0)), SMALL
    assert [item.strongly_typed for item in (old, FULL, new, rtx)] == [False, False, True, True]
    assert "int64" not in old.types and {"int64", "bfloat16"} <= FULL.types and {"int64", "bfloat16"} <= rtx.types
    assert all("float64" not in item.types for item in (old, FULL, new, rtx))
    assert [item.opset for item in (old, new, rtx)] == [16, None, None]


def test_an_engine_runs_where_a_gpu_of_its_kind_is(machine: Any) -> None:
    machine(FULL, SMALL)
    assert FULL.why_not_run() == "no NVIDIA GPU here"
    machine(FULL, SMALL, gpus=((9, 0),))
    assert FULL.why_not_run() is None
    assert "9.0" in str(SMALL.why_not_run())
    machine(FULL, SMALL, gpus=((8, 9),))
    assert SMALL.why_not_run() is None


def test_an_operator_that_only_a_plugin_implements_is_taken_where_that_is_registered() -> None:
    lacking = described("tensorrt-rtx", (1, 7), operators=frozenset(("LinearAttention", "NonZero")))
    assert not lacking.takes("LinearAttention") and "plugin of that name" in lacking.advice("LinearAttention")
    registered = dataclasses.replace(lacking, plugins=frozenset((("LinearAttention", "1"),)))
    assert registered.takes("LinearAttention") and registered.advice("LinearAttention") == ""
    assert lacking.takes("NonZero"), "the bridge has a plugin of its own for it"
    assert FULL.takes("NonZero") and FULL.advice("NonZero") == ""
    assert "'my.dom'" in FULL.advice("Frobnicate", "my.dom")


def test_forms_of_an_operator_that_are_refused_are_known() -> None:
    x, y, mean = gs.Variable("x"), gs.Variable("y"), gs.Variable("mean")
    target = described("tensorrt-rtx", (1, 7), operators=frozenset(("LayerNormalization", "Attention")))
    assert not target.refuses(gs.Node("LayerNormalization", inputs=[x], outputs=[y]))
    assert target.refuses(gs.Node("LayerNormalization", inputs=[x], outputs=[y, mean]))
    assert target.refuses(gs.Node("Attention", inputs=[x, x, x], outputs=[y]))
    assert target.refuses(gs.Node("Unheard", inputs=[x], outputs=[y]))


def test_the_tables_of_versions_that_are_not_installed_hold_operators_of_their_time() -> None:
    old = Target("tensorrt", (8, 5), False, targets._known_operators("tensorrt", (8, 5)))
    assert old.takes("Conv") and old.takes("Einsum")
    assert not old.takes("LayerNormalization") and not old.takes("DFT")
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
    for flavour in targets.MODULES:
        for version in targets._known_versions(flavour):
            operators = targets._known_operators(flavour, targets._version(version))
            assert len(operators) > 80, (flavour, version)
            assert len(operators & known) > 80, (flavour, version)


@pytest.mark.skipif(not RTX_INSTALLED, reason="tensorrt_rtx is not installed")
def test_what_the_installed_parser_says_is_what_the_table_of_its_version_holds() -> None:
    from bridge.runtime.logger import trt_logger

    here = resolve("tensorrt-rtx")
    trt = here.module()
    assert here.operators == targets.ask_parser(trt, trt_logger(trt))
    assert here.installed and str(here) == f"TensorRT-RTX {here.version_text}"
    assert here.takes("Conv") and not here.takes("DFT")
    assert here.info.flavour == "tensorrt-rtx" and here.info.strongly_typed
    if targets._known_versions("tensorrt-rtx")[-1] == ".".join(map(str, here.version[:2])):
        assert here.operators == targets._known_operators("tensorrt-rtx", here.version)


def test_quantisation_is_refused_where_the_version_or_the_gpu_has_it_not(machine: Any) -> None:
    machine()
    old, rtx = resolve("tensorrt-8.5"), resolve("tensorrt-rtx-1.7")
    assert [old.lacks_quantisation(scheme) for scheme in ("int8", "fp8", "int4")] == [
        "",
        "has no fp8 (float8_e4m3fn); TensorRT 10 is the first; take int8, or a newer target",
        "has no int4 (int4); TensorRT 10 is the first; take int8, or a newer target",
    ]
    assert not any(rtx.lacks_quantisation(scheme, [(8, 9), (12, 0)]) for scheme in ("int8", "fp8", "int4"))
    assert rtx.lacks_quantisation("fp8", [(8, 6), (8, 9)]) == (
        "computes in fp8 on GPUs of compute capability 8.9 and newer, and the engine is for 8.6 too; "
        "take int8, or build for newer GPUs alone"
    )
    assert "8.0 and newer" in rtx.lacks_quantisation("int4", [(7, 5)]) and not rtx.lacks_quantisation("int8", [(7, 5)])


def test_quantisation_is_judged_by_the_gpu_here_where_the_target_builds_here(machine: Any) -> None:
    machine(FULL, gpus=((8, 6),))
    assert "the engine is for 8.6 too" in FULL.lacks_quantisation("fp8") and not FULL.lacks_quantisation("int4")
    assert not described("tensorrt", (10, 3), installed=False).lacks_quantisation("fp8")
