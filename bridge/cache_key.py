"""What makes two builds the same: a SHA-256 over all that reaches the builder, and over nothing else.

The model counts by its content: where it lies, how its files are called, and what is written in it for people (doc
strings, the source lines of its nodes) make no difference. Node names do: an engine's layers are called after them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, TensorProto

from . import __version__
from .digests import Region, region_digests
from .gpu import gpu_here
from .inputs import Case
from .plugins.loading import NeededPlugin
from .settings import Settings
from .tensors import to_numpy

FORMAT = 1
"""Of the key and of the entries; another one makes every older entry unknown."""


Place = tuple[int, int, int, int, int]
"""Of bytes in a file: its device, inode and time of change, the offset and the length. Renaming changes none."""


class NoKey(Exception):
    """Something that reaches the builder cannot be part of a key."""


def engine_key(
    model: Path,
    settings: Settings,
    plan: Any,
    plugins: Sequence[NeededPlugin],
    known: Mapping[Place, bytes] | None = None,
) -> str:
    """The key of the engine that ``model`` becomes.

    ``plan`` holds the profiles and what else was found for the builder from the settings and the model; ``known`` are
    the digests of weights that were made before.

    Raises OSError where a file that belongs to it cannot be read, and NoKey where a setting has no plain form.
    """
    target = settings.target
    told = {
        item.name: getattr(settings, item.name) for item in dataclasses.fields(settings) if item.name not in _OTHERS
    }
    parts = {
        "format": [FORMAT, __version__],
        "model": model_digest(model, known or {}),
        "plan": plan,
        "settings": told,
        "plugins": [_plugin(plugin) for plugin in plugins],
        "target": [target.flavour, target.version_text],
        "gpu": gpu_here() if settings.compute_capabilities is None else None,
    }
    try:
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=_plain).encode()).hexdigest()
    except TypeError as error:  # the keys of a mapping, for instance
        raise NoKey(f"a setting has no plain form: {error}") from error


_OTHERS = frozenset(
    (
        *("target", "profiles", "builder", "calibration", "calibration_algorithm"),  # in the key in another form
        *("input_names", "output_names", "opset", "constants"),  # seen in the model
        *("tolerance", "task_check", "build", "build_timeout", "seed", "int_range", "prove", "cache"),
        *("layers", "latency", "golden"),
    )
)
"""Settings that do not reach the builder; one that is not named here is taken to be the builder's."""


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if hasattr(value, "detach"):
        value = to_numpy(value)
    if isinstance(value, (np.ndarray, np.generic)):
        return [str(value.dtype), value.shape, _array_digest(value)]
    if hasattr(value, "__len__") and hasattr(value, "__getitem__"):  # a data set, for instance
        return [value[index] for index in range(len(value))]
    raise NoKey(f"a {type(value).__name__} among the settings cannot be told from another one")


def _array_digest(array: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def _plugin(plugin: NeededPlugin) -> dict[str, Any]:
    """What the engine has of a plugin; where its library or module lies makes no difference."""
    record = plugin.record()
    del record["library"]
    if plugin.module is None:
        return record
    try:
        found = importlib.util.find_spec(plugin.module)
    except ImportError:  # the package that it should be in is not there
        found = None
    if found is None or found.origin is None:
        raise OSError(f"the source of the plugin module {plugin.module} is not there")
    sources = (Path(found.origin), Path(__file__).with_name("plugins") / "python.py")
    return {**record, "sources": [hashlib.sha256(path.read_bytes()).hexdigest() for path in sources]}


def weight_digests(path: Path) -> dict[Place, bytes]:
    """The digests of what the model has in files beside it. Raises OSError where one cannot be read."""
    from passes.reading import read_proto

    regions = [_region(tensor, path.parent) for tensor in _undress_graph(read_proto(path).graph)]
    outside = list({region: None for region in regions if region is not None and isinstance(region.source, Path)})
    return dict(zip(_places(outside), region_digests(outside), strict=True))


def _places(regions: Sequence[Region]) -> list[Place]:
    """Where regions of files are."""
    files = {source: source.stat() for source in {region.source for region in regions} if isinstance(source, Path)}
    found = [(files[source], offset, length) for source, offset, length in regions if isinstance(source, Path)]
    return [(file.st_dev, file.st_ino, file.st_mtime_ns, offset, length) for file, offset, length in found]


def model_digest(path: Path, known: Mapping[Place, bytes]) -> str:
    """Of the graph and of the bytes that its tensors have, inside of the file or beside it."""
    from passes.reading import read_proto

    model = read_proto(path)
    for name in ("doc_string", "producer_name", "producer_version", "metadata_props", "model_version"):
        model.ClearField(name)
    tensors = list(_undress_graph(model.graph))
    for function in model.functions:
        function.ClearField("doc_string")
        function.ClearField("metadata_props")
        tensors += _undress_nodes(function.node)
        for info in function.value_info:
            _undress(info)
    regions = [_region(tensor, path.parent) for tensor in tensors]
    digests = _digests([region for region in regions if region is not None], known)
    for tensor, region in zip(tensors, regions, strict=True):
        if region is not None:
            for field in ("external_data", "raw_data"):
                tensor.ClearField(field)
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="sha256", value=f"{digests[region].hex()} of {region.length}")
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def _digests(regions: Sequence[Region], known: Mapping[Place, bytes]) -> dict[Region, bytes]:
    outside = list({region: None for region in regions if isinstance(region.source, Path)})
    found = {r: known[place] for r, place in zip(outside, _places(outside), strict=True) if place in known}
    left = list({region: None for region in regions if region not in found})
    return {**found, **dict(zip(left, region_digests(left), strict=True))}


def _undress(proto: Any) -> None:
    proto.ClearField("doc_string")
    proto.ClearField("metadata_props")


def _undress_graph(graph: GraphProto) -> Iterator[TensorProto]:
    """Takes off what is written for people; yields the tensors."""
    _undress(graph)
    for info in (*graph.input, *graph.output, *graph.value_info):
        _undress(info)
    for tensor in graph.initializer:
        _undress(tensor)
        yield tensor
    yield from _undress_nodes(graph.node)


def _undress_nodes(nodes: Any) -> Iterator[TensorProto]:
    for node in nodes:
        _undress(node)
        for attribute in node.attribute:
            kind = attribute.type
            if attribute.doc_string:
                attribute.ClearField("doc_string")
            if kind == AttributeProto.TENSOR:
                _undress(attribute.t)
                yield attribute.t
            elif kind == AttributeProto.TENSORS:
                yield from attribute.tensors
            elif kind == AttributeProto.GRAPH:
                yield from _undress_graph(attribute.g)
            elif kind == AttributeProto.GRAPHS:
                for graph in attribute.graphs:
                    yield from _undress_graph(graph)


def _region(tensor: TensorProto, folder: Path) -> Region | None:
    """Where the tensor's bytes are; None where it has them as numbers, which are few."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return Region(raw, 0, len(raw)) if (raw := tensor.raw_data) else None
    from passes.ir import tensor_bytes

    entries = {entry.key: entry.value for entry in tensor.external_data}
    length = int(entries.get("length", 0)) or tensor_bytes(tensor.data_type, tuple(tensor.dims))
    return Region(folder / entries["location"], int(entries.get("offset", 0)), length)


def feeds_key(cases: Sequence[Case]) -> str:
    """Of the inputs that a model is run with, and of what runs it."""
    import onnxruntime

    parts = []
    for case in cases:
        for name, array in case.feeds.items():
            parts.append([case.name, name, str(array.dtype), array.shape, _array_digest(array)])
    versions = [FORMAT, onnxruntime.__version__, onnx.__version__, np.__version__]
    return hashlib.sha256(json.dumps([versions, parts]).encode()).hexdigest()
