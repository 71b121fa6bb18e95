"""Which TensorRT a model is converted for, and what that TensorRT can do. No other module compares versions."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal

from .errors import UsageError
from .result import TargetInfo
from .target_tables import NOT_IN, QUANTISATIONS, RESTRICTED, RTX_PLUGIN_ONLY, SETTINGS

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

Flavour = Literal["tensorrt", "tensorrt-rtx"]

MODULES: dict[Flavour, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}

_NAME = re.compile(r"(?P<flavour>tensorrt-rtx|tensorrt)(?:-(?P<version>\d+(?:\.\d+)*))?")

RTX_COMPUTE_CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1))
"""GPUs that TensorRT-RTX builds for; measured of 1.7.1, which refuses (9, 0)."""


@dataclass(frozen=True)
class Target:
    """One TensorRT: the parser that a model is rewritten for, and, where it is installed, the builder and runtime."""

    flavour: Flavour
    version: tuple[int, ...]
    installed: bool
    operators: frozenset[str] = field(repr=False)
    """ONNX operators that its parser has an importer for."""
    plugins: frozenset[tuple[str, str]] = field(default=frozenset(), repr=False)
    """Names and versions in its plugin registry."""

    def __str__(self) -> str:
        names = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
        return f"{names[self.flavour]} {self.version_text}"

    @property
    def version_text(self) -> str:
        return ".".join(map(str, self.version))

    @property
    def info(self) -> TargetInfo:
        return TargetInfo(self.flavour, self.version_text, self.installed, self.strongly_typed)

    @property
    def strongly_typed(self) -> bool:
        """Whether precision is what the graph says, rather than what builder flags allow."""
        return self.flavour == "tensorrt-rtx" or self.version >= (11,)

    @property
    def types(self) -> frozenset[str]:
        """NumPy (or ml_dtypes) names of the types that its tensors can have; none has float64."""
        types = {"float32", "float16", "int8", "int32", "bool"}
        if self.flavour == "tensorrt-rtx" or self.version >= (10,):
            types |= {"int64", "bfloat16", "float8_e4m3fn", "int4", "uint8"}
        return frozenset(types)

    @property
    def opset(self) -> int | None:
        """The newest opset whose forms its parser reads; None where that is not known to be a limit.

        TensorRT 8.5 and 8.6 name 17 in their operator tables; 8.5 takes no operator that 17 brought (measured). The 20
        of TensorRT 9 to 10.5 is assumed, on the safe side.
        """
        if self.flavour == "tensorrt-rtx" or self.version >= (10, 6):
            return None
        return 16 if self.version < (8, 6) else 17 if self.version < (9,) else 20

    @property
    def of_tensorrt_8(self) -> bool:
        """Whether its parser is one of TensorRT 8, which takes fewer forms of the operators that it has."""
        return self.flavour == "tensorrt" and self.version < (9,)

    @property
    def orders_integers(self) -> bool:
        """Whether TopK, ArgMax and ArgMin take int32; TensorRT 8.6 is the first."""
        return self.flavour == "tensorrt-rtx" or self.version >= (8, 6)

    @property
    def builds_elu_beside_loops(self) -> bool:
        """Whether an Elu is built in whatever place beside loops and recurrent layers; TensorRT-RTX 1.7.1 fails at it
        between two of them, and at some behind one (measured)."""
        return self.flavour == "tensorrt"

    @property
    def reads_functions(self) -> bool:
        """Whether its parser reads local functions."""
        return self.flavour == "tensorrt-rtx" or self.version >= (9,)

    def takes(self, operator: str) -> bool:
        """Whether the parser takes ``operator``: by itself, or by asking for a plugin that is there."""
        return operator in self.operators and not (self.only_by_plugin(operator) and not self.has_plugin(operator))

    def only_by_plugin(self, operator: str) -> bool:
        """Whether its parser knows ``operator`` and looks for a plugin of that name to do it."""
        return self.flavour == "tensorrt-rtx" and operator in RTX_PLUGIN_ONLY

    def has_plugin(self, name: str, version: str | None = None) -> bool:
        """Whether its registry has a plugin of this name, or one that is known to the passes loads into it."""
        from passes.plugins import loadable

        known = any(found == name and version in (None, number) for found, number in self.plugins)
        return known or loadable(self, name, version)

    @property
    def takes_python_plugins(self) -> bool:
        """Whether its ONNX parser takes plugins that are written in Python (IPluginV3)."""
        return self.flavour == "tensorrt-rtx" or self.version >= (10,)

    @property
    def keeps_timings(self) -> bool:
        """Whether its builder has a timing cache; TensorRT-RTX 1.7.1 has the calls, and they do nothing (measured)."""
        return self.flavour == "tensorrt"

    def refuses(self, node: gs.Node) -> bool:
        """Whether the parser is known to refuse this very node: the operator, or this form of it."""
        if not self.takes(node.op):
            return True
        restricted = RESTRICTED.get(node.op)
        return restricted is not None and restricted(node)

    def computes_in(self, node: gs.Node, dtype: str) -> bool:
        """Whether it computes ``node`` in ``dtype`` (a name as in ``types``), where it takes the node in float32."""
        refused = NOT_IN.get(node.op)
        return dtype in self.types and (refused is None or not refused(node, dtype))

    def advice(self, operator: str, domain: str = "") -> str:
        """What can be done about an operator that no pass rewrites; empty where nothing is known."""
        from .advice import hint

        return hint(self, operator, domain)

    def lacks_setting(self, name: str) -> str:
        """Why the builder setting ``name`` does nothing here, and what helps; empty where it does something."""
        known = SETTINGS.get(name)
        if known is None:
            return ""
        if self.flavour == "tensorrt-rtx":
            if known.rtx_needs_gpu and not gpu_compute_capabilities():
                return "needs a GPU to build such an engine; build on a machine that has one, or leave it out."
            return f"{known.rtx}; leave it out." if known.rtx else ""
        if self.version < known.since:
            first = ".".join(map(str, known.since))
            return f"has no such setting, TensorRT {first} is the first; leave it out, or take a newer target."
        if known.strongly_typed and not self.strongly_typed:
            return (
                "does this for strongly typed networks alone, and the bridge builds such ones for TensorRT 11 and "
                "TensorRT-RTX; leave it out, or take one of these targets."
            )
        return ""

    def lacks_type(self, dtype: str) -> str:
        """Why it cannot compute in ``float16`` or ``bfloat16``; empty where it can."""
        if dtype in self.types:
            return ""
        return f"has no {dtype}; TensorRT 10 is the first; take another precision or target"

    def lacks_quantisation(self, scheme: str, capabilities: Sequence[tuple[int, int]] | None = None) -> str:
        """Why it cannot compute in ``int8``, ``fp8`` or ``int4`` where a model quantises to it; empty where it can.

        ``capabilities``: of the GPUs that the engine is for, by default of the first one here.
        """
        kind, needed = QUANTISATIONS[scheme]
        if kind not in self.types:
            return f"has no {scheme} ({kind}); TensorRT 10 is the first; take int8, or a newer target"
        if capabilities is None:
            capabilities = gpu_compute_capabilities()[:1] if self.installed else ()
        old = [f"{major}.{minor}" for major, minor in capabilities if (major, minor) < needed]
        if not old:
            return ""
        first = ".".join(map(str, needed))
        return (
            f"computes in {scheme} on GPUs of compute capability {first} and newer, and the engine is for "
            f"{', '.join(old)} too; take int8, or build for newer GPUs alone"
        )

    @property
    def captures_branches(self) -> bool:
        """Whether a run with an If in it can be captured as a CUDA graph: TensorRT 8.5 ends the process (measured)."""
        return self.flavour == "tensorrt-rtx" or self.version >= (9,)

    @property
    def shares_profiles(self) -> bool:
        """Whether several execution contexts may use one optimization profile at the same time."""
        return self.flavour == "tensorrt-rtx" or self.version >= (10,)

    def why_not_load(
        self, version: str, capabilities: Sequence[str], here: tuple[int, int], *, newer: bool, ampere_plus: bool
    ) -> str:
        """Why it cannot load an engine that was built by ``version`` on the GPU ``here``; empty where it can.

        ``capabilities``: of the GPUs that it was built for, such as ``8.9``; none where that is not known. ``newer``:
        it was built to be loaded by newer versions of the same major number too; ``ampere_plus``: by newer GPUs too.
        """
        built = _version(version)
        if built != self.version and not (newer and built[0] == self.version[0] and built <= self.version):
            return f"it was built by version {version}, and {self} is installed"
        gpu = ".".join(map(str, here))
        if self.flavour == "tensorrt-rtx" and here not in RTX_COMPUTE_CAPABILITIES:
            return f"TensorRT-RTX does not support the GPU here (compute capability {gpu})"
        if capabilities and gpu not in capabilities and not (ampere_plus and here >= (8, 0)):
            return f"it was built for GPUs of compute capability {', '.join(capabilities)}, and the one here has {gpu}"
        return ""

    def module(self) -> Any:
        """The imported Python module of an installed target."""
        return importlib.import_module(MODULES[self.flavour])

    def why_not_run(self) -> str | None:
        """Why an engine for this target cannot run here; None where it can."""
        if not self.installed:
            return f"{self} is not installed here"
        capabilities = gpu_compute_capabilities()
        if not capabilities:
            return "no NVIDIA GPU here"
        if self.flavour == "tensorrt-rtx" and capabilities[0] not in RTX_COMPUTE_CAPABILITIES:
            major, minor = capabilities[0]
            return f"the GPU here (compute capability {major}.{minor}) is not one that TensorRT-RTX supports"
        return None


def resolve(name: str = "auto") -> Target:
    """The target called ``name``: ``auto``, a flavour, or a flavour with a version (``tensorrt-8.5``).

    ``auto`` is ``tensorrt`` where it is installed and a GPU is here, else ``tensorrt-rtx``. A version that is not the
    installed one gives a target that models are rewritten for, and not built. Raises UsageError for other names, and
    where nothing that could be meant is installed.
    """
    if name == "auto":
        return _automatic()
    match = _NAME.fullmatch(name)
    if match is None:
        raise UsageError(
            f"target {name!r}: not one of 'auto', 'tensorrt', 'tensorrt-rtx', or these with a version, "
            "such as 'tensorrt-8.5'."
        )
    flavour: Flavour = "tensorrt-rtx" if match["flavour"] == "tensorrt-rtx" else "tensorrt"
    here = installed(flavour)
    if match["version"] is None:
        if here is None:
            raise UsageError(
                f"target {name!r}: {_missing(flavour)}. {_how_to_install(flavour)} "
                f"To rewrite without building, name a version, such as '{flavour}-{_known_versions(flavour)[-1]}'."
            )
        return here
    version = tuple(map(int, match["version"].split(".")))
    if here is not None and here.version[: len(version)] == version:
        return here
    operators, plugins = _known_operators(flavour, version), _known_plugins(flavour, version)
    return Target(flavour, version, installed=False, operators=operators, plugins=plugins)


@functools.cache
def runtime(flavour: Flavour) -> Target:
    """The installed TensorRT of this flavour as far as running engines goes: its parser, which is slow, is not asked.

    Raises UsageError where there is none, or it does not load.
    """
    try:
        trt = importlib.import_module(MODULES[flavour])
    except (ImportError, OSError) as error:  # not there, or a library that it needs is not
        raise UsageError(f"{_missing(flavour)} ({error}). {_how_to_install(flavour)}") from error
    return Target(flavour, _version(trt.__version__), installed=True, operators=frozenset())


def likely_flavour() -> Flavour:
    """What a plan of unknown origin is taken to be of: TensorRT where it is installed, else TensorRT-RTX."""
    return "tensorrt" if importlib.util.find_spec(MODULES["tensorrt"]) is not None else "tensorrt-rtx"


def known_targets() -> list[Target]:
    """A target of each version that there is a table of; the installed one where it is of that version."""
    return [resolve(f"{flavour}-{version}") for flavour in MODULES for version in _known_versions(flavour)]


def _automatic() -> Target:
    full = installed("tensorrt")
    if full is not None and gpu_compute_capabilities():
        return full
    rtx = installed("tensorrt-rtx")
    if rtx is not None:
        return rtx
    reason = "tensorrt is installed, but there is no GPU for it" if full is not None else "no TensorRT is installed"
    raise UsageError(
        f"target 'auto': {reason}. {_how_to_install('tensorrt-rtx')} "
        "To rewrite without building, name a version, such as 'tensorrt-8.5'."
    )


def _missing(flavour: Flavour) -> str:
    return f"the Python package {MODULES[flavour]!r} is not installed, or does not load"


def _how_to_install(flavour: Flavour) -> str:
    extra = "rtx" if flavour == "tensorrt-rtx" else "tensorrt"
    note = "; it builds without a GPU" if flavour == "tensorrt-rtx" else ""
    return f"Install it with: pip install 'torch-tensorrt-bridge[{extra}]'{note}."


@functools.cache
def installed(flavour: Flavour) -> Target | None:
    """The installed TensorRT of this flavour, as its own parser describes it; None where there is none that works."""
    if importlib.util.find_spec(MODULES[flavour]) is None:
        return None
    if flavour == "tensorrt" and not gpu_compute_capabilities():
        # Without a driver this TensorRT cannot even make a builder, so its parser cannot be asked.
        version = _version(importlib.metadata.version("tensorrt"))
        operators, plugins = _known_operators(flavour, version), _known_plugins(flavour, version)
        return Target(flavour, version, installed=True, operators=operators, plugins=plugins)
    try:
        trt = importlib.import_module(MODULES[flavour])
    except (ImportError, OSError):  # a library that it needs is not there
        return None
    from .runtime.logger import trt_logger

    logger, version = trt_logger(trt), _version(trt.__version__)
    with logger.silent():  # what is asked here has no errors that concern a model
        operators = _asked_before(flavour, version) or ask_parser(trt, logger)
        plugins = _ask_registry(trt, logger)
    return Target(flavour, version, installed=True, operators=operators, plugins=plugins)


def _asked_before(flavour: Flavour, version: tuple[int, ...]) -> frozenset[str] | None:
    """The operators of exactly this version where a table holds them: TensorRT 8.5 takes seconds to make a parser."""
    tables = (_table(flavour, known) for known in _known_versions(flavour))
    return next((frozenset(table["operators"]) for table in tables if _version(table["asked"]) == version), None)


def ask_parser(trt: Any, logger: Any) -> frozenset[str]:
    """The operators that the parser of TensorRT's module ``trt`` has an importer for."""
    import onnx

    parser = trt.OnnxParser(trt.Builder(logger).create_network(network_flags(trt)), logger)
    names = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""}
    return frozenset(filter(parser.supports_operator, names))


def _ask_registry(trt: Any, logger: Any) -> frozenset[tuple[str, str]]:
    """Names and versions of the plugins that are there."""
    if hasattr(trt, "init_libnvinfer_plugins"):
        trt.init_libnvinfer_plugins(logger, "")
    registry = trt.get_plugin_registry()
    creators = registry.all_creators if hasattr(registry, "all_creators") else registry.plugin_creator_list
    return frozenset((creator.name, creator.plugin_version) for creator in creators)


def network_flags(trt: Any) -> int:
    """What ``create_network`` of TensorRT's module ``trt`` is given for a network of explicit batch, as all are since
    TensorRT 10."""
    explicit = getattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None)
    return 1 << int(explicit) if explicit is not None and _version(trt.__version__) < (10,) else 0


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:4])


def _known_operators(flavour: Flavour, version: tuple[int, ...]) -> frozenset[str]:
    """The operators of the newest table that is no newer than ``version``, or of the oldest."""
    tables = {_version(known): known for known in _known_versions(flavour)}
    older = [known for known in tables if known <= version]
    return frozenset(_table(flavour, tables[max(older) if older else min(tables)])["operators"])


def _known_plugins(flavour: Flavour, version: tuple[int, ...]) -> frozenset[tuple[str, str]]:
    """The plugins that this very version brings along; empty where no table holds it: they come and go."""
    name = next((known for known in _known_versions(flavour) if _version(known) == version[:2]), None)
    listed = _table(flavour, name).get("plugins", ()) if name is not None else ()
    return frozenset((plugin, number) for plugin, number in listed)


def _table(flavour: Flavour, name: str) -> Any:
    text = (resources.files(__package__) / "targets" / f"{flavour}-{name}.json").read_text(encoding="utf-8")
    return json.loads(text)


def _known_versions(flavour: Flavour) -> list[str]:
    names = [item.name for item in (resources.files(__package__) / "targets").iterdir()]
    found = [match[1] for name in names if (match := re.fullmatch(rf"{flavour}-(\d[\d.]*)\.json", name))]
    return sorted(found, key=_version)


@functools.cache
def gpu_compute_capabilities() -> tuple[tuple[int, int], ...]:
    """Of each GPU that the driver shows, (major, minor); empty where there is no driver or no GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    return tuple((_attribute(driver, 75, index), _attribute(driver, 76, index)) for index in range(count.value))


def _attribute(driver: ctypes.CDLL, attribute: int, index: int) -> int:
    value = ctypes.c_int()
    driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, index)
    return value.value
