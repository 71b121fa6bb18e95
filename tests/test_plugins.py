"""Plugins: calls carry their meaning along, ONNX Runtime runs it, and the target's own plugin is what is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from bridge import target as targets
from bridge.plugins.loading import needed_plugins
from passes import all_rules, read, rewrite, write
from passes.framework import RULES, example, has_plugin, lacks, rule
from passes.ir import is_reference
from passes.plugins import PLUGINS, Plugin, loadable, plugin_calls, register
from tests.support import RTX, example_inputs, run_onnx

OLD = targets.resolve("tensorrt-8.5")


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """Leaves the registries of rules and plugins as they were."""
    rules, plugins = dict(all_rules()), dict(PLUGINS)
    yield
    for registry, before in ((RULES, rules), (PLUGINS, plugins)):
        registry.clear()
        registry.update(before)  # type: ignore[arg-type]


def scaled(g: Any, x: gs.Tensor, factor: float, bias: Any) -> gs.Tensor:
    result = g.op.Mul(x, g.constant(factor, x.dtype))
    return result if bias is None else g.op.Add(result, g.constant(bias, x.dtype))


def scale_plugin(**changes: Any) -> Plugin:
    options: dict[str, Any] = {"attributes": {"factor": 2.0, "bias": None}, "reference": scaled, "library": "no.so"}
    return Plugin("Scale", **{**options, **changes})


def one_call(*attributes: dict[str, Any], shape: tuple[Any, ...] = (2, 3)) -> gs.Graph:
    """A chain of calls with these attributes."""
    plugin = register(scale_plugin())

    def build(g: Any, x: gs.Tensor) -> gs.Tensor:
        for item in attributes:
            x = g.plugin(plugin, [x], item)
        return x

    return example({"x": ("float32", list(shape))}, build)


def saved(graph: gs.Graph, path: Path) -> onnx.ModelProto:
    write(graph, path)
    model = onnx.load(path)
    onnx.checker.check_model(model)
    return model


def test_onnx_runtime_runs_a_call_by_its_reference_body(tmp_path: Path) -> None:
    model = saved(one_call({"factor": 3}, {}, {"bias": 1.5}, shape=("n", 3)), tmp_path / "m.onnx")
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    (found,) = run_onnx(model, {"x": x}).values()
    np.testing.assert_allclose(found, (x * 3 * 2) * 2 + 1.5)
    node = model.graph.node[0]
    fields = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    assert fields == {"factor": 3.0, "plugin_version": b"1", "plugin_namespace": b""}
    assert node.op_type == "Scale" and isinstance(fields["factor"], float)


def test_calls_that_mean_the_same_share_a_body_and_others_have_their_own() -> None:
    graph = one_call({"factor": 3.0}, {"factor": 3.0}, {"factor": 4.0}, {})
    domains = [node.domain for node in graph.nodes]
    assert domains == ["bridge.plugins", "bridge.plugins", "bridge.plugins.2", "bridge.plugins.3"]
    assert [function.domain for function in graph.functions] == [
        "bridge.plugins",
        "bridge.plugins.2",
        "bridge.plugins.3",
    ]


def test_passes_leave_calls_alone_where_the_target_has_the_plugin(tmp_path: Path) -> None:
    before = saved(one_call({"factor": 3.0}), tmp_path / "before.onnx")
    graph = read(tmp_path / "before.onnx")
    assert rewrite(graph, OLD).nodes.keys() == {"lower_opset"}
    after = saved(graph, tmp_path / "after.onnx")
    assert [node.op_type for node in after.graph.node] == ["Scale"]
    assert [list(item.node) for item in after.functions] == [list(item.node) for item in before.functions]


def test_a_reference_body_is_brought_down_to_the_opset_of_the_target_with_the_model(tmp_path: Path) -> None:
    def reference(g: Any, x: gs.Tensor) -> gs.Tensor:
        return g.op.Mul(g.op.Gelu(x), g.op.ReduceMax(x, g.constant([1]), keepdims=1))

    plugin = register(scale_plugin(attributes={}, reference=reference))
    graph = example({"x": ("float32", [2, 3])}, lambda g, x: g.plugin(plugin, [g.op.Neg(x)]))
    before = saved(graph, tmp_path / "before.onnx")
    rewrite(graph, OLD)
    after = saved(graph, tmp_path / "after.onnx")
    assert {item.version for item in after.functions[0].opset_import} == {16}
    feeds = example_inputs(before)
    found, expected = (next(iter(run_onnx(model, feeds).values())) for model in (after, before))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_call_becomes_its_reference_body_where_the_target_lacks_the_plugin(tmp_path: Path) -> None:
    before = saved(one_call({"factor": 3.0}), tmp_path / "before.onnx")
    PLUGINS.clear()
    graph = read(tmp_path / "before.onnx")
    rewrite(graph, OLD)
    after = saved(graph, tmp_path / "after.onnx")
    assert [node.op_type for node in after.graph.node] == ["Mul"] and not after.functions
    feeds = example_inputs(before)
    np.testing.assert_allclose(*(list(run_onnx(model, feeds).values()) for model in (before, after)))


def test_what_has_to_be_loaded_for_a_model_is_known() -> None:
    graph = one_call({"factor": 3.0}, {"factor": 4.0})
    (needed,) = needed_plugins(graph, OLD)
    assert needed.loaded and needed.library == "no.so"
    PLUGINS.clear()
    own = dataclasses.replace(OLD, plugins=frozenset((("Scale", "1"),)))
    assert [(item.name, item.loaded) for item in needed_plugins(graph, own)] == [("Scale", False)]
    masks = example({"x": ("float32", [3])}, lambda g, x: g.op.NonZero(x))
    assert not needed_plugins(masks, OLD)
    register(Plugin("NonZero", module="bridge.plugins.nonzero"))
    assert [item.module for item in needed_plugins(masks, targets.resolve(RTX))] == ["bridge.plugins.nonzero"]


def test_attributes_that_do_not_fit_the_plugin_are_refused() -> None:
    plugin = scale_plugin(attributes={"factor": float, "bias": None})
    for attrs, words in (({}, "needs the attribute 'factor'"), ({"factr": 1.0, "factor": 1.0}, "no attribute 'factr'")):
        with pytest.raises(ValueError, match=words):
            example({"x": ("float32", [2])}, lambda g, x, attrs=attrs: g.plugin(plugin, [x], attrs))
    with pytest.raises(ValueError, match="no reference body"):
        example({"x": ("float32", [2])}, lambda g, x: g.plugin(scale_plugin(reference=None), [x]))
    register(scale_plugin())
    with pytest.raises(ValueError, match="registered twice"):
        register(scale_plugin())


def test_a_plugin_with_several_outputs_and_an_input_left_out(tmp_path: Path) -> None:
    def reference(g: Any, x: gs.Tensor, y: gs.Tensor | None, z: gs.Tensor) -> list[gs.Tensor]:
        assert y is None and z.dtype == np.int64
        return [x, g.op.Add(x, g.cast(z, np.float32)), x]

    plugin = Plugin("Three", outputs=3, reference=reference, library="no.so")
    inputs = {"x": ("float32", [2]), "z": ("int64", [2])}
    graph = example(inputs, lambda g, x, z: g.plugin(plugin, [x, None, z], types=[("float32", [2])] * 3))
    feeds = {"x": np.array([1, 2], np.float32), "z": np.array([3, 4])}
    a, b, c = run_onnx(saved(graph, tmp_path / "m.onnx"), feeds).values()
    np.testing.assert_array_equal([a, b, c], [[1, 2], [4, 6], [1, 2]])


def test_a_rule_may_match_an_operator_of_another_domain(tmp_path: Path) -> None:
    plugin = register(scale_plugin())

    @rule("triple", domain="mylib", when=has_plugin("Scale"))
    def triple(node: gs.Node, g: Any) -> Any:
        """mylib::triple is what the plugin does."""
        return g.plugin(plugin, node.inputs, {"factor": 3.0})

    x = gs.Variable("x", np.dtype(np.float32), ["n", 2])
    y = gs.Variable("y", np.dtype(np.float32), ["n", 2])
    nodes = [gs.Node("triple", "a", {}, [x], [y], domain="mylib")]
    graph = gs.Graph(nodes, [x], [y], opset=20, ir_version=10)
    log = rewrite(graph, OLD)
    assert log.nodes.keys() == {"triple", "lower_opset"} and [node.op for node in plugin_calls(graph)] == ["Scale"]
    assert all(is_reference(function) for function in graph.functions)
    (found,) = run_onnx(saved(graph, tmp_path / "m.onnx"), {"x": np.ones((2, 2), np.float32)}).values()
    np.testing.assert_array_equal(found, np.full((2, 2), 3, np.float32))


def test_conditions_combine() -> None:
    rtx = targets.resolve(RTX)
    nms = has_plugin("EfficientNMS_TRT")
    assert nms(OLD) and not nms(rtx) and (~nms)(rtx)
    assert (lacks("LayerNormalization") & nms)(OLD) and not (lacks("Conv") & nms)(OLD) and (lacks("DFT") | nms)(rtx)


def test_the_plugins_of_a_target_that_is_not_installed_are_those_of_its_table() -> None:
    assert OLD.has_plugin("CustomQKVToContextPluginDynamic", "3") and not OLD.has_plugin("EfficientNMS_TRT", "2")
    assert not targets.resolve("tensorrt-8.6").plugins, "of a version without a table nothing is known"
    assert len(OLD.plugins) == 70
    register(scale_plugin())
    register(Plugin("Python", module="somewhere", reference=scaled))
    assert loadable(OLD, "Scale") and not loadable(OLD, "Python") and targets.resolve(RTX).has_plugin("Python", "1")
