"""Ranges of tensors over samples: those of bodies too, without keeping tensors, and never hiding what is not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from bridge import ranges
from bridge.errors import RunError, UsageError
from bridge.ranges import Range, measure


def model_file(folder: Path, text: str) -> Path:
    path = folder / "model.onnx"
    onnx.save(onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18]>\n{text}'), str(path))
    return path


def floats(*values: float) -> dict[str, Any]:
    return {"x": np.array(values, np.float32)}


SIMPLE = """
main (float[n] x) => (float[n] y) {
  two = Constant <value = float {2.0}> ()
  h = Mul (x, two)
  y = Neg (h)
  i = Cast <to = 7> (h)
}
"""


def test_every_tensor_has_the_range_of_all_samples_and_nothing_else_has_one(tmp_path: Path) -> None:
    path = model_file(tmp_path, SIMPLE)
    found = measure(path, [floats(1, 5), floats(-3), floats()])
    assert found == {"x": Range(-3, 5), "h": Range(-6, 10), "y": Range(-10, 6), "two": Range(2, 2)}
    assert found["h"].largest == 10
    assert measure(path, iter([floats(1)]), names=["h", "no such tensor"]) == {"h": Range(2, 2)}


def test_what_is_not_finite_is_said_and_the_rest_still_measured(tmp_path: Path) -> None:
    path = model_file(tmp_path, "main (float[n] x) => (float[n] y) { l = Log (x) \n y = Abs (l) }")
    e = float(np.exp(np.float32(2)))
    found = measure(path, [floats(1, e), floats(0, 1), floats(-1), floats(e, e * e)])
    assert not found["l"].finite and not found["y"].finite and found["x"] == Range(-1, np.float32(e * e))
    assert (found["l"].low, found["l"].high) == pytest.approx((0, 4))
    assert measure(path, [floats(-1)])["l"] == Range(0, 0, finite=False), "of NaN alone there is no range"
    large = measure(path, [floats(3e38, 3e38)])["x"]
    assert large.finite and large.high == pytest.approx(3e38), "the sum overflows, the values do not"


BODIES = """
main (float[n] x, int64 rounds, bool low) => (float[n] y, float[k, n] z) {
  yes = Constant <value = bool {1}> ()
  y, z = Loop (rounds, yes, x) <body = body (int64 i, bool c, float[n] v) => (bool d, float[n] w, float[n] s) {
    d = Identity (c)
    f = Cast <to = 1> (i)
    w = If (low) <
      then_branch = smaller () => (float[n] p) { a = Sub (v, f) \n p = Identity (a) },
      else_branch = larger () => (float[n] q) {
        b = Add (v, f)
        ten = Constant <value = float {10.0}> ()
        q = Mul (b, ten)
      }
    >
    s = Neg (w)
  }>
}
"""


def test_tensors_of_nested_bodies_are_seen_over_all_rounds_and_those_never_computed_are_absent(tmp_path: Path) -> None:
    path = model_file(tmp_path, BODIES)
    feeds = {"x": np.array([1, 2], np.float32), "rounds": np.array(3), "low": np.array(True)}
    found = measure(path, [feeds])
    assert found["a"] == Range(-2, 2) and found["f"] == Range(0, 2) and found["s"] == Range(-2, 2)
    assert "b" not in found and "q" not in found, "this branch was not taken"
    both = measure(path, [feeds, {**feeds, "low": np.array(False)}])
    assert both["a"] == Range(-2, 2) and both["b"].low == 1 and both["q"] == Range(10, both["b"].high * 10)
    none = measure(path, [{**feeds, "rounds": np.array(0)}])
    assert "a" not in none and none["x"] == none["y"] == Range(1, 2)


def test_tensors_of_a_scan_and_of_loops_in_loops_are_seen(tmp_path: Path) -> None:
    text = """
    main (float[3, n] x, float[n] start) => (float[n] total, float[3, n] steps) {
      total, steps = Scan <num_scan_inputs = 1, body = b (float[n] sum, float[n] row) => (float[n] more, float[n] out) {
        more = Add (sum, row)
        r = Constant <value = int64 {2}> ()
        t = Constant <value = bool {1}> ()
        out = Loop (r, t, row) <body = inner (int64 i, bool c, float[n] v) => (bool d, float[n] u) {
          d = Identity (c)
          deep = Add (v, v)
          u = Identity (deep)
        }>
      }> (start, x)
    }
    """
    feeds = {"x": np.array([[1], [2], [-3]], np.float32), "start": np.zeros(1, np.float32)}
    found = measure(model_file(tmp_path, text), [feeds])
    assert found["more"] == Range(0, 3) and found["deep"] == Range(-12, 8) and found["out"] == Range(-12, 8)
    overflow = {**feeds, "x": np.array([[1], [2], [3e38]], np.float32)}
    assert not measure(model_file(tmp_path, text), [overflow])["deep"].finite


def test_half_precision_is_measured_and_weights_may_lie_beside_the_model(tmp_path: Path) -> None:
    weight = np.arange(4096, dtype=np.float16).reshape(2, 2048)
    proto = helper.make_model(
        helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"])],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["n", 2])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["n", 2048])],
            [onnx.numpy_helper.from_array(weight, "w")],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
    )
    onnx.save(proto, str(tmp_path / "m.onnx"), save_as_external_data=True, location="m.data", size_threshold=0)
    found = measure(tmp_path / "m.onnx", [{"x": np.array([[1, 2]], np.float16)}])
    assert found["x"] == Range(1, 2) and found["y"].low == 2 * 2048 and found["y"].high == pytest.approx(10237, abs=8)


@pytest.mark.parametrize("method", ["entropy", "percentile"])
def test_rare_large_values_are_cut_off_alike_from_a_list_and_from_an_iterator(
    tmp_path: Path, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model_file(tmp_path, SIMPLE)
    rng = np.random.default_rng(0)
    samples = [{"x": rng.normal(size=50_000).astype(np.float32)} for _ in range(3)]
    samples[1]["x"][7] = 40
    found = measure(path, samples, method)
    assert found["h"].low == pytest.approx(2 * samples[0]["x"].min(), abs=4) and 6 < found["h"].high < 12, found
    assert found["x"].high < 6 and found["two"] == Range(2, 2) and found["y"].low > -12
    monkeypatch.setattr(ranges, "BATCH_BYTES", 300_000)  # a tensor at a time
    assert measure(path, iter(samples), method) == found


def test_a_tensor_that_is_zero_or_not_finite_keeps_what_was_seen_by_every_method(tmp_path: Path) -> None:
    path = model_file(tmp_path, "main (float[n] x) => (float[n] y) { l = Log (x) \n y = Sub (x, x) }")
    found = measure(path, [floats(0, 1)], "entropy")
    assert found["y"] == Range(0, 0) and found["l"] == Range(0, 0, finite=False)


def test_memory_stays_near_that_of_a_plain_run(tmp_path: Path) -> None:
    """Thirty tensors of 32 MB each: kept, they would take a gigabyte."""
    import resource
    import subprocess
    import sys

    nodes = "\n".join(f"t{i + 1} = Neg (t{i})" for i in range(30))
    path = model_file(tmp_path, f"main (float[n] t0) => (float[n] t30) {{ {nodes} }}")
    code = (
        "import sys, resource, numpy as np\nfrom pathlib import Path\nfrom bridge.ranges import measure\n"
        "x = np.ones(8 << 20, np.float32)\nbefore = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "found = measure(Path(sys.argv[1]), [{'t0': x}])\nassert len(found) == 31, len(found)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    assert resource.RLIMIT_AS is not None
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    more = int(done.stdout) / 1024
    assert more < 250, f"{more:.0f} MB more"


def test_what_cannot_be_measured_is_refused_in_words(tmp_path: Path) -> None:
    path = model_file(tmp_path, SIMPLE)
    with pytest.raises(UsageError, match="calibration method 'mean': not one of 'max', 'entropy', 'percentile'"):
        measure(path, [floats(1)], "mean")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="holds no inputs"):
        measure(path, [])
    with pytest.raises(UsageError, match="a sample lacks the input 'x'"):
        measure(path, [{"y": np.zeros(1, np.float32)}])
    with pytest.raises(RunError, match="a calibration sample does not run in ONNX Runtime"):
        measure(path, [{"x": np.zeros((1, 1), np.float32)}])
    strange = model_file(tmp_path, "main (float[n] x) => (float[n] y) { y = nowhere.Op (x) }")
    with pytest.raises(RunError, match="does not run in ONNX Runtime"):
        measure(strange, [floats(1)])


def test_an_exported_module_is_measured_as_torch_computes_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 2))
    path, x = tmp_path / "module.onnx", torch.randn(2, 3, 8, 8)
    torch.onnx.export(module.eval(), (x,), str(path), dynamo=True, verbose=False)
    found = measure(path, [{"x": x.numpy()} if "x" in _inputs(path) else {_inputs(path)[0]: x.numpy()}])
    with torch.no_grad():
        hidden = module[0](x)
    seen = {(round(item.low, 4), round(item.high, 4)) for item in found.values()}
    assert (round(float(hidden.min()), 4), round(float(hidden.max()), 4)) in seen


def _inputs(path: Path) -> list[str]:
    return [item.name for item in onnx.load(str(path)).graph.input]


@pytest.mark.parametrize(
    ("shape", "values"),
    [
        ("few", lambda random: 0.38 + 0.03 * random.standard_normal(96)),
        ("far from zero", lambda random: 0.38 + 0.03 * random.standard_normal(50_000)),
        ("two clusters", lambda random: np.where(random.random(50_000) < 0.5, 0.2, 0.9)),
    ],
)
def test_entropy_cuts_off_outliers_and_not_the_values(tmp_path: Path, shape: str, values: Any) -> None:
    found = values(np.random.default_rng(0)).astype(np.float32)
    model = model_file(tmp_path, "main (float[n] x) => (float[n] y) { y = Neg(x) }")
    cut = measure(model, [{"x": found}], "entropy")["x"]
    inside = float((np.abs(found) <= cut.largest).mean())
    assert inside >= 0.999, f"{shape}: {1 - inside:.1%} of the values are beyond {cut.largest:.3g}"


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e30])
def test_entropy_is_of_values_of_any_size(tmp_path: Path, size: float) -> None:
    values = np.random.default_rng(0).standard_normal(4096).astype(np.float32)
    model = model_file(tmp_path, "main (float[n] x) => (float[n] y) { y = Neg(x) }")
    one, other = (measure(model, [{"x": values * np.float32(by)}], "entropy")["x"].largest for by in (1, size))
    assert other == pytest.approx(one * size, rel=1e-3)


@pytest.mark.parametrize("spread", ["one channel of many", "heavy tails"])
def test_entropy_keeps_the_rare_values_that_hold_most_of_what_there_is(tmp_path: Path, spread: str) -> None:
    random = np.random.default_rng(0)
    found = random.standard_normal((2048, 64)).astype(np.float32)
    if spread == "heavy tails":
        found = np.sinh(2 * found)
    else:
        found[:, 0] *= 200
    model = model_file(tmp_path, "main (float[n,m] x) => (float[n,m] y) { y = Neg(x) }")
    cut = measure(model, [{"x": found}], "entropy")["x"]
    lost = np.maximum(np.abs(found) - cut.largest, 0)
    share = float((lost**2).sum() / (found**2).sum())
    assert share <= 0.011, f"{share:.1%} of the squares is beyond {cut.largest:.4g}"
