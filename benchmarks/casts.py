"""What casting a model to float16 or bfloat16 costs, in seconds and in memory, beyond a calibration.

    python -m benchmarks.casts nodes [--nodes 4000]
    python -m benchmarks.casts large [--layers 28] [--width 5120] [--folder DIR]

``nodes`` is a deep model of small tensors (blocks of a transformer in operators of their own), ``large`` one of few
nodes with many weights (28 layers of 5120 by 5120 are 2.8 GB), which are written first, to a file beside the model.
Each is read, assigned, cast and written in a process of its own. Memory: the highest resident set of that process, with
pages of mapped files, less what it had before the model was read; and the highest proportional set (PSS), sampled.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx

MIB = 1 << 20
CHILD = """
import json, resource, sys, time
from pathlib import Path
import onnx, onnxruntime
import bridge.target, passes
from benchmarks.overhead import watching
from bridge.assignment import assign
from bridge.precision import Precision
from passes.casts import cast

model, name, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
target, precision = bridge.target.resolve("tensorrt-rtx"), Precision.of(name)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
before, samples, seconds = peak(), [], {}
with watching(samples):
    began = time.perf_counter()
    def lap(step):
        global began
        now = time.perf_counter()
        seconds[step], began = now - began, now
    graph = passes.read(model)
    lap("read")
    assignment = assign(graph, precision, None, target)
    lap("assign")
    log = cast(graph, precision.half_dtype, assignment.fp32, saturated=assignment.saturated)
    lap("cast")
    passes.write(graph, out)
    lap("write")
print(json.dumps({
    "seconds": seconds, "rss": peak() - before,
    "pss": max(item[1] for item in samples) - samples[0][1] if samples else None,
    "nodes": len(assignment.nodes), "low": len(assignment.of(name)), "casts": log.casts,
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("nodes", "large"))
    parser.add_argument("--nodes", type=int, default=4000)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--width", type=int, default=5120)
    parser.add_argument("--folder", type=Path, help="where the models are written; by default a temporary folder")
    options = parser.parse_args()
    packages = ("onnx", "onnxruntime", "onnx-graphsurgeon", "numpy", "ml_dtypes")
    print(f"{platform.machine()}, {os.cpu_count()} cores; " + ", ".join(f"{p} {version(p)}" for p in packages))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "model.onnx"
        if options.model == "nodes":
            size = write_deep(path, options.nodes)
        else:
            size = write_large(path, options.layers, options.width)
        for precision in ("fp16", "bf16"):
            print_row(precision, size, measure(path, precision, Path(folder) / f"{precision}.onnx"))


def measure(model: Path, precision: str, out: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(model), precision, str(out)], check=True, capture_output=True, text=True
    )
    for file in out.parent.glob(f"{out.name}*"):
        file.unlink()
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def print_row(precision: str, size: int, row: dict[str, Any]) -> None:
    steps = ", ".join(f"{name} {seconds:.2f}" for name, seconds in row["seconds"].items())
    print(f"{precision}: {row['low']} of {row['nodes']} nodes low, {row['casts']} casts")
    print(f"  {sum(row['seconds'].values()):.2f} s ({steps})")
    for kind in ("rss", "pss"):
        if row[kind] is not None:
            print(
                f"  {kind}: {row[kind] / MIB:.0f} MiB, {row[kind] / size:.2f} times the {size / MIB:.0f} MiB of weights"
            )


def write_deep(path: Path, count: int) -> int:
    """Blocks of attention and of a perceptron, with a layer norm in operators of its own, of ``count`` nodes in all."""
    rng = np.random.default_rng(0)
    width = 32
    nodes: list[onnx.NodeProto] = []
    weights: dict[str, Any] = {
        "two": np.array(2, np.float32),
        "eps": np.array(1e-5, np.float32),
        "scale": np.array(width**-0.5, np.float32),
        "last": np.array([-1], np.int64),
    }

    def add(op: str, *inputs: str, **attributes: Any) -> str:
        name = f"{op}_{len(nodes)}"
        nodes.append(onnx.helper.make_node(op, list(inputs), [f"t_{len(nodes)}"], name, **attributes))
        return str(nodes[-1].output[0])

    def linear(x: str) -> str:
        key = f"w_{len(nodes)}"
        weights[key] = rng.standard_normal((width, width)).astype(np.float32) * width**-0.5
        weights[f"{key}_b"] = rng.standard_normal(width).astype(np.float32)
        return add("Add", add("MatMul", x, key), f"{key}_b")

    def norm(x: str) -> str:
        centred = add("Sub", x, add("ReduceMean", x, "last"))
        variance = add("ReduceMean", add("Pow", centred, "two"), "last")
        return add("Div", centred, add("Sqrt", add("Add", variance, "eps")))

    x = "x"
    while len(nodes) < count:
        y = norm(x)
        q, k, v = linear(y), linear(y), linear(y)
        scores = add("Mul", add("MatMul", q, add("Transpose", k, perm=[0, 2, 1])), "scale")
        x = add("Add", x, linear(add("MatMul", add("Softmax", scores), v)))
        hidden = linear(norm(x))
        x = add("Add", x, linear(add("Mul", hidden, add("Sigmoid", hidden))))
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "deep",
        [info("x", onnx.TensorProto.FLOAT, [1, 16, width])],
        [info(x, onnx.TensorProto.FLOAT, [1, 16, width])],
        [onnx.numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(onnx.shape_inference.infer_shapes(model), str(path))
    return sum(int(values.nbytes) for values in weights.values())


def write_large(path: Path, layers: int, width: int) -> int:
    """Matrices one after the other, whose weights lie in a file beside the model."""
    rng = np.random.default_rng(0)
    nodes, initializers = [], []
    data = path.with_name(path.name + ".data")
    size = 4 * width * width
    with data.open("wb") as file:
        for layer in range(layers):
            file.write((rng.standard_normal((width, width), np.float32) * np.float32(width**-0.5)).tobytes())
            weight = onnx.TensorProto(name=f"w{layer}", data_type=onnx.TensorProto.FLOAT, dims=[width, width])
            weight.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", data.name), ("offset", layer * size), ("length", size)):
                weight.external_data.add(key=key, value=str(value))
            initializers.append(weight)
            nodes.append(onnx.helper.make_node("MatMul", [f"x{layer}", f"w{layer}"], [f"h{layer}"], f"matmul_{layer}"))
            nodes.append(onnx.helper.make_node("Relu", [f"h{layer}"], [f"x{layer + 1}"], f"relu_{layer}"))
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "large",
        [info("x0", onnx.TensorProto.FLOAT, [1, width])],
        [info(f"x{layers}", onnx.TensorProto.FLOAT, [1, width])],
        initializers,
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return layers * size


if __name__ == "__main__":
    main()
