"""The examples' task checks: each passes on the model as its makers shipped it, and fails where the job is not done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
MANIFEST = YAML(typ="safe").load(ROOT / "examples" / "models.yaml")
MODELS = {model["name"]: MANIFEST["defaults"] | model for model in MANIFEST["models"]}

Run = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def missing_wheels() -> list[str]:
    pinned = (ROOT / "examples" / "requirements-no-deps.txt").read_text(encoding="utf-8").splitlines()
    wheels = [line.split("==")[0] for line in pinned if line and not line.startswith("#")]
    missing = []
    for wheel in (*wheels, "scikit-image", "transformers"):
        try:
            distribution(wheel)
        except PackageNotFoundError:
            missing.append(wheel)
    return missing


MISSING = missing_wheels()
pytestmark = pytest.mark.skipif(
    bool(MISSING),
    reason=f"not installed: {', '.join(MISSING)} (the extra `examples` and examples/requirements-no-deps.txt)",
)


def function(name: str) -> Callable[..., Any]:
    module, attribute = name.split(":")
    return getattr(import_module(module), attribute)


@cache
def source(name: str) -> tuple[Run, dict[str, Any]]:
    """The model as shipped, in PyTorch or ONNX Runtime, and its example inputs by name."""
    model, inputs = function(MODELS[name]["source"])()
    if isinstance(model, torch.nn.Module):
        input_names, output_names = MODELS[name]["input_names"], MODELS[name]["output_names"]

        def run(feed: Mapping[str, Any]) -> Mapping[str, Any]:
            with torch.no_grad():
                outputs = model(*(torch.from_numpy(np.ascontiguousarray(feed[each])) for each in input_names))
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            return {each: output.numpy() for each, output in zip(output_names, outputs, strict=True)}

        return remembering(run), {each: value.numpy() for each, value in zip(input_names, inputs, strict=True)}

    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    output_names = [output.name for output in session.get_outputs()]
    return remembering(lambda feed: dict(zip(output_names, session.run(None, dict(feed)), strict=True))), inputs


def remembering(run: Run) -> Run:
    """``run``, which computes once what checks ask for again and again."""
    known: dict[Any, Mapping[str, Any]] = {}

    def remembered(feed: Mapping[str, Any]) -> Mapping[str, Any]:
        key = tuple((name, array.shape, array.dtype.str, array.tobytes()) for name, array in sorted(feed.items()))
        if key not in known:
            known[key] = run(feed)
        return known[key]

    return remembered


def within_profiles(name: str, run: Run) -> Run:
    """``run``, refusing what an engine built for the manifest's profiles would refuse."""

    def checked(feed: Mapping[str, Any]) -> Mapping[str, Any]:
        example = source(name)[1]
        assert set(feed) == set(example), f"{sorted(feed)} given to a model with the inputs {sorted(example)}"
        for each, value in feed.items():
            least, _, most = MODELS[name]["profiles"].get(each, [list(example[each].shape)] * 3)
            assert value.dtype == example[each].dtype, (
                f"{each} is {value.dtype}, and {example[each].dtype} in the example"
            )
            assert len(value.shape) == len(least) and all(
                low <= size <= high for low, size, high in zip(least, value.shape, most, strict=True)
            ), f"{each} has the shape {value.shape}, outside {least} to {most}"
        return run(feed)

    return checked


@pytest.mark.parametrize("name", MODELS)
def test_the_check_passes_on_the_model_as_shipped_and_stays_in_its_profiles(name: str) -> None:
    sentence = function(MODELS[name]["task_check"])(within_profiles(name, source(name)[0]))
    assert any(character.isdigit() for character in sentence), f"no figures in {sentence!r}"


@pytest.mark.parametrize("name", MODELS)
def test_the_example_has_the_optimum_shapes_of_its_profiles(name: str) -> None:
    inputs = source(name)[1]
    shapes = {each: list(inputs[each].shape) for each in MODELS[name]["profiles"]}
    optimum = {each: shapes for each, (_, shapes, _) in MODELS[name]["profiles"].items()}
    assert shapes == optimum


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", ["min", "max"])
def test_the_model_runs_at_the_ends_of_its_profiles(name: str, shape: str) -> None:
    run, example = source(name)
    profiles = MODELS[name]["profiles"]
    feed = {
        each: np.resize(value, profiles[each][0 if shape == "min" else 2]) if each in profiles else value
        for each, value in example.items()
    }
    for each, output in run(feed).items():
        assert np.isfinite(output).all(), f"{each} is not finite at the {shape} shapes"


def zeros(outputs: Mapping[str, Any]) -> Mapping[str, Any]:
    return {name: np.zeros_like(value) for name, value in outputs.items()}


def not_a_number(outputs: Mapping[str, Any]) -> Mapping[str, Any]:
    return {name: np.full_like(value, np.nan) for name, value in outputs.items()}


def shuffled(outputs: Mapping[str, Any]) -> Mapping[str, Any]:
    random = np.random.default_rng(0)
    return {name: random.permutation(value.ravel()).reshape(value.shape) for name, value in outputs.items()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("damage", [zeros, not_a_number, shuffled])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_check_fails_on_damaged_outputs(name: str, damage: Callable[..., Any]) -> None:
    run = source(name)[0]
    with pytest.raises(AssertionError, match=r"\d|nan"):
        function(MODELS[name]["task_check"])(lambda feed: damage(run(feed)))


def first_of_batch(outputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """A batch of which only the first item is computed, as by an axis made constant in the export."""
    return {name: np.repeat(value[:1], len(value), axis=0) for name, value in outputs.items()}


@pytest.mark.parametrize("name", ["mobilenetv2", "mtcnn-pnet", "rxnmapper-albert", "magika", "basic-pitch"])
def test_the_check_fails_where_every_item_of_a_batch_is_the_first(name: str) -> None:
    run = source(name)[0]
    with pytest.raises(AssertionError, match=r"\d|nan"):
        function(MODELS[name]["task_check"])(lambda feed: first_of_batch(run(feed)))


def test_silero_is_found_out_when_it_forgets_its_state() -> None:
    run = source("silero-vad")[0]
    with pytest.raises(AssertionError, match="chunks agree"):
        function(MODELS["silero-vad"]["task_check"])(lambda feed: run({**feed, "state": np.zeros_like(feed["state"])}))


def test_albert_is_found_out_when_it_ignores_the_mask() -> None:
    run = source("rxnmapper-albert")[0]
    with pytest.raises(AssertionError, match="padding"):
        function(MODELS["rxnmapper-albert"]["task_check"])(
            lambda feed: run({**feed, "attention_mask": np.ones_like(feed["attention_mask"])})
        )


def test_swift_f0_is_found_out_when_it_is_a_quarter_tone_flat() -> None:
    run = source("swift-f0")[0]

    def flat(feed: Mapping[str, Any]) -> Mapping[str, Any]:
        outputs = run(feed)
        return {**outputs, "pitch": outputs["pitch"] * 2 ** (-1 / 24)}

    with pytest.raises(AssertionError, match="cents"):
        function(MODELS["swift-f0"]["task_check"])(flat)
