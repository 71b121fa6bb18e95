"""A user's plugin, from ``bridge.register_plugin`` to the engine: for operators of torch and of ONNX files."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

torch = pytest.importorskip("torch")

import bridge  # noqa: E402
from bridge.errors import UsageError  # noqa: E402
from bridge.plugins.alias import empty_library  # noqa: E402
from bridge.plugins.loading import NeededPlugin, PluginError, load_plugins, read_plugins  # noqa: E402
from bridge.plugins.python import evaluate  # noqa: E402
from passes import all_rules  # noqa: E402
from passes.framework import RULES  # noqa: E402
from passes.plugins import PLUGINS, REPLACED  # noqa: E402
from tests import row_norms_plugin  # noqa: E402
from tests.row_norms_plugin import meaning  # noqa: E402
from tests.support import RTX, RTX_INSTALLED  # noqa: E402

needs_rtx = pytest.mark.skipif(not RTX_INSTALLED, reason="tensorrt_rtx is not installed")


@torch.library.custom_op("bridge_tests::row_norms", mutates_args=())
def row_norms(x: torch.Tensor, order: int, weight: torch.Tensor | None = None, scale: float = 1.0) -> torch.Tensor:
    norms = torch.linalg.vector_norm(x, order, -1) * scale
    return norms if weight is None else norms * weight


@row_norms.register_fake
def _(x: torch.Tensor, order: int, weight: torch.Tensor | None = None, scale: float = 1.0) -> torch.Tensor:
    return x.new_empty(x.shape[:-1])


class Net(torch.nn.Module):
    """Calls the operator twice, with other attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.bridge_tests.row_norms(self.linear(x), 1) + row_norms(x, 2, scale=3)


def wrong_meaning(g: Any, x: Any, weight: Any = None, *, order: int, scale: float) -> Any:
    return meaning(g, x, weight, order=2, scale=scale)


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    before = [(registry, dict(registry)) for registry in (all_rules(), PLUGINS, REPLACED)]
    yield
    for registry, items in before:
        registry.clear()
        registry.update(items)  # type: ignore[arg-type]


def converted(source: Any, inputs: Any, folder: Path, **options: Any) -> Any:
    return bridge.convert(source, inputs, workdir=folder, target=options.pop("target", RTX), **options)


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
PROFILES = {"x": ((1, 4), (3, 4), (8, 4))}


@needs_rtx
def test_a_custom_operator_of_torch_becomes_a_plugin_of_the_engine(tmp_path: Path) -> None:
    bridge.register_plugin(row_norms_plugin.RowNorms, reference=meaning, replaces="bridge_tests::row_norms")
    result = converted(Net(), (X,), tmp_path, profiles=PROFILES)
    assert result.status == "built", result.error
    assert {(item.reference, item.candidate) for item in result.comparisons} == {
        ("torch", "exported"),
        ("exported", "rewritten"),
    }
    assert all(item.agreed for item in result.comparisons)
    rewritten = onnx.load(result.onnx)
    calls = [node for node in rewritten.graph.node if node.op_type == "RowNorms"]
    assert [{a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}["order"] for node in calls] == [1, 2]
    assert any("RowNorms" in note and "row_norms_plugin" in note for note in result.notes), result.notes
    (listed,) = json.loads((tmp_path / "model.engine.json").read_text())["plugins"]
    assert listed["name"] == "RowNorms" and listed["module"] == "tests.row_norms_plugin"


def test_a_wrong_reference_body_is_found_out_by_the_comparison_with_torch(tmp_path: Path) -> None:
    bridge.register_plugin(row_norms_plugin.RowNorms, reference=wrong_meaning, replaces="bridge_tests::row_norms")
    result = converted(Net(), (X,), tmp_path)
    assert result.status == "failed" and result.stage == "export"
    assert "exported and torch differ" in result.error


def test_where_the_target_cannot_load_the_plugin_its_reference_body_is_built(tmp_path: Path) -> None:
    bridge.register_plugin(row_norms_plugin.RowNorms, reference=meaning, replaces="bridge_tests::row_norms")
    result = converted(Net(), (X,), tmp_path, target="tensorrt-8.5", build=False)
    assert result.status == "rewritten", result.error
    assert {node.op_type for node in onnx.load(result.onnx).graph.node} >= {"ReduceL1", "ReduceL2"}


def test_a_custom_operator_that_nothing_replaces_is_answered_with_what_to_do(tmp_path: Path) -> None:
    result = converted(Net(), (X,), tmp_path)
    assert "bridge.register_plugin(..., replaces='bridge_tests::row_norms')" in result.error


def custom_file(path: Path, functions: str = "") -> Path:
    text = f"""<ir_version: 9, opset_import: ["" : 18, "their.lib" : 1]>
        g (float[3, 4] x) => (float[3] y) {{ a = Relu(x) b = their.lib.Norms<order = 1>(a) y = Neg(b) }} {functions}"""
    onnx.save(onnx.parser.parse_model(text), path)
    return path


@needs_rtx
@pytest.mark.parametrize("inside", [False, True], ids=["of no known meaning", "with a function in the file"])
def test_an_operator_of_an_onnx_file_becomes_a_plugin(tmp_path: Path, inside: bool) -> None:
    own = """<domain: "their.lib", opset_import: ["" : 18]> Norms <order> (x) => (y)
        { axes = Constant<value_ints = [-1]>() y = ReduceL1<keepdims = 0>(x, axes) }"""
    path = custom_file(tmp_path / "source.onnx", own if inside else "")
    bridge.register_plugin(row_norms_plugin.RowNorms, reference=meaning, replaces=("their.lib", "Norms"))
    result = converted(path, None, tmp_path / "out")
    assert result.status == "built", result.error
    rewritten = onnx.load(result.onnx)
    assert [node.op_type for node in rewritten.graph.node] == ["Relu", "RowNorms", "Neg"]
    assert {item.domain for item in rewritten.functions} == {"bridge.plugins"}
    assert any("reference body" in note for note in result.notes) != inside


def test_a_reference_body_that_is_not_what_the_files_function_computes_is_found_out(tmp_path: Path) -> None:
    own = (
        '<domain: "their.lib", opset_import: ["" : 18]> Norms <order> (x) => (y) { y = ReduceMax<keepdims = 0>(x, a) }'
    )
    own = own.replace("{ y", "{ a = Constant<value_ints = [-1]>() y")
    path = custom_file(tmp_path / "source.onnx", own)
    bridge.register_plugin(row_norms_plugin.RowNorms, reference=meaning, replaces=("their.lib", "Norms"))
    result = converted(path, None, tmp_path / "out", build=False)
    assert result.status == "failed" and "the passes changed what the model computes" in result.error


def test_attributes_that_the_plugin_does_not_have_are_named(tmp_path: Path) -> None:
    bridge.register_plugin("RowNorms", reference=meaning, replaces=("their.lib", "Norms"))
    result = converted(custom_file(tmp_path / "source.onnx"), None, tmp_path / "out")
    assert result.status == "failed" and "plugin 'RowNorms' has no attribute 'order'" in result.error


def test_an_operator_of_an_onnx_file_that_nothing_knows_is_answered_with_what_to_do(tmp_path: Path) -> None:
    result = converted(custom_file(tmp_path / "source.onnx"), None, tmp_path / "out")
    assert result.status == "failed" and "replaces=('their.lib', 'Norms')" in result.error


@needs_rtx
def test_an_operator_of_an_onnx_file_without_a_domain_becomes_a_plugin(tmp_path: Path) -> None:
    path = custom_file(tmp_path / "source.onnx")
    model = onnx.load(path)
    model.graph.node[1].domain = ""
    onnx.save(model, path)
    unknown = converted(path, None, tmp_path / "out")
    assert unknown.status == "failed" and "replaces=('', 'Norms')" in unknown.error
    bridge.register_plugin(row_norms_plugin.RowNorms, reference=meaning, replaces=("", "Norms"))
    result = converted(path, None, tmp_path / "out")
    assert result.status == "built", result.error
    assert [node.op_type for node in onnx.load(result.onnx).graph.node] == ["Relu", "RowNorms", "Neg"]


@pytest.mark.parametrize("domain", ["", "TRT", "trt.plugins"])
@pytest.mark.parametrize("target", ["tensorrt-8.5", RTX])
def test_a_plugin_of_tensorrts_own_in_an_onnx_file_is_known(tmp_path: Path, domain: str, target: str) -> None:
    """Detectors are exported with it at their end, and ONNX Runtime has a schema of it in ONNX's own domain."""
    text = """<ir_version: 9, opset_import: ["" : 17]> g (float[1, 20, 4] boxes, float[1, 20, 3] scores) => (
        int32[1, 1] count, float[1, 10, 4] found, float[1, 10] best, int32[1, 10] classes) {
        above = Sigmoid (scores)
        count, found, best, classes = EfficientNMS_TRT <max_output_boxes = 10, iou_threshold = 0.5,
            score_threshold = 0.25, background_class = -1, box_coding = 0, score_activation = 0,
            plugin_version = "1"> (boxes, above) }"""
    model = onnx.parser.parse_model(text)
    model.graph.node[1].domain = domain
    if domain:
        model.opset_import.add(domain=domain, version=1)
    onnx.save(model, tmp_path / "source.onnx")
    corners = np.sort(np.random.default_rng(0).random((1, 20, 2, 2), np.float32), 2).reshape(1, 20, 4)
    scores = np.random.default_rng(1).standard_normal((1, 20, 3)).astype(np.float32)
    inputs = {"boxes": corners, "scores": scores}
    result = converted(tmp_path / "source.onnx", inputs, tmp_path / "out", target=target)
    assert result.status == ("built" if target == RTX and RTX_INSTALLED else "rewritten"), result.error
    assert len(result.comparisons) == 4 and all(item.agreed for item in result.comparisons)
    called = {node.op_type for node in onnx.load(result.onnx).graph.node}
    assert ("EfficientNMS_TRT" in called) == (target != RTX)


def test_a_pattern_of_the_users_own_becomes_the_plugin(tmp_path: Path) -> None:
    def norms_of_neg(node: Any, g: Any) -> Any:
        """The norm of what was negated is that of the thing itself."""
        x = node.inputs[0]
        if not x.inputs or x.inputs[0].op != "Neg":
            return None
        return g.plugin(plugin, [x.inputs[0].inputs[0]], {"order": 1})

    norms_of_neg.ops = ("ReduceL1",)  # type: ignore[attr-defined]
    plugin = bridge.register_plugin(row_norms_plugin.RowNorms, reference=meaning, replaces=norms_of_neg)
    text = """<ir_version: 9, opset_import: ["" : 18]> g (float[3, 4] x) => (float[3] y)
        { a = Neg(x) axes = Constant<value_ints = [-1]>() y = ReduceL1<keepdims = 0>(a, axes) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "source.onnx")
    result = converted(tmp_path / "source.onnx", None, tmp_path / "out", build=False)
    assert result.status == "rewritten", result.error
    assert [node.op_type for node in onnx.load(result.onnx).graph.node] == ["RowNorms"]
    assert next(iter(RULES)) == "norms_of_neg", "the user's rules come first"


def test_the_command_line_calls_what_makes_plugins_known(tmp_path: Path, capfd: Any) -> None:
    from bridge.cli import main

    path = custom_file(tmp_path / "norms.onnx")
    options = ["--plugins", "tests.row_norms_plugin:register_for_files", "--target", "tensorrt-rtx-1.7", "--no-build"]
    status = main(["convert", str(path), "-o", str(tmp_path / "out"), *options])
    result = json.loads((tmp_path / "out" / "norms" / "result.json").read_text())
    assert status == 0 and result["status"] == "rewritten", (result["error"], capfd.readouterr())


def test_what_does_not_fit_together_is_refused() -> None:
    for options, words in (
        ({"plugin": "A", "reference": None}, "reference: plugin 'A' needs a function"),
        ({"plugin": "A", "library": "a.so", "module": "json"}, "from the one or the other"),
        ({"plugin": "A", "module": "__main__"}, "a module of its own"),
        ({"plugin": "A", "module": "no.such.module"}, "there is no module 'no.such.module'"),
        ({"plugin": row_norms_plugin.RowNorms, "version": "2"}, "tells all"),
        ({"plugin": "A", "replaces": "row_norms"}, "neither 'namespace::name'"),
        ({"plugin": "A", "replaces": lambda node, g: None}, "which operators"),
    ):
        with pytest.raises(UsageError, match=words):
            bridge.register_plugin(**{"reference": meaning, **options})
    bridge.register_plugin("B", reference=meaning)
    with pytest.raises(UsageError, match="registered already"):
        bridge.register_plugin("B", reference=meaning)


# --- loading -----------------------------------------------------------------------------------------------------


@needs_rtx
def test_a_library_that_is_missing_or_holds_another_plugin_is_named(tmp_path: Path) -> None:
    for content, words in (
        (None, "no such file"),
        (b"text", "does not load"),
        (empty_library("own.so", "libm.so.6"), "no creator"),
    ):
        library = tmp_path / "libnorms.so"
        if content is not None:
            library.write_bytes(content)
        PLUGINS.clear()
        bridge.register_plugin(
            "RowNorms",
            reference=meaning,
            replaces=("their.lib", "Norms"),
            attributes={"order": 2, "scale": 1.0},
            library=library,
        )
        result = converted(custom_file(tmp_path / "source.onnx"), None, tmp_path / "out")
        assert result.status == "failed" and result.stage == "build"
        assert "plugin 'RowNorms' version 1" in result.error and words in result.error, result.error
        assert str(library) in result.error


@needs_rtx
def test_a_module_that_does_not_import_in_the_process_that_builds_is_named(tmp_path: Path) -> None:
    trt = __import__("tensorrt_rtx")
    with pytest.raises(PluginError, match=r"plugin 'X' version 1: the Python module no\.such does not load"):
        load_plugins([NeededPlugin("X", "1", module="no.such")], trt)


def test_an_engine_is_not_run_with_another_library_than_it_was_built_with(tmp_path: Path) -> None:
    library = tmp_path / "libnorms.so"
    library.write_bytes(b"one")
    plugin = NeededPlugin("RowNorms", "1", library=str(library))
    assert read_plugins([plugin.record()]) == [plugin]
    record = plugin.record()
    library.write_bytes(b"two")
    with pytest.raises(PluginError, match="is not the library that the engine was built with"):
        read_plugins([record])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="about Linux's dynamic linker")
def test_a_loaded_library_gets_a_second_name(tmp_path: Path) -> None:
    code = """if True:
        import ctypes
        from bridge.plugins.alias import ensure_name
        try:
            ctypes.CDLL("libbridge-second-name.so")
        except OSError:
            print("unknown before")
        ensure_name("libbridge-second-name.so", "libm.so.6")
        print(ctypes.CDLL("libbridge-second-name.so").cosf is not None)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[:2] == ["unknown before", "True"], done.stderr
    with pytest.raises(OSError, match="libno-such-thing"):
        path = tmp_path / "x.so"
        path.write_bytes(empty_library("libx.so", "libno-such-thing.so"))
        ctypes.CDLL(str(path))


def test_the_kernel_computes_what_the_reference_body_says() -> None:
    for order in (1, 2):
        (found,) = evaluate(row_norms_plugin.RowNorms({"order": order, "scale": 3.0}), [X])
        np.testing.assert_allclose(found, np.linalg.norm(X.numpy(), order, axis=-1) * 3, rtol=1e-5)
