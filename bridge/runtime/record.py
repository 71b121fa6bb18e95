"""What has to be known of an engine beside its plan: who built it, for which GPU, and what it needs where it runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import RunError
from ..target import Flavour


@dataclass(frozen=True)
class Record:
    """Checked before a plan is given to TensorRT. What is empty is not known, and not checked."""

    flavour: Flavour
    version: str = ""
    """Of the TensorRT that built it."""
    inputs: tuple[str, ...] = ()
    """Their names, in the order of the module's."""
    outputs: tuple[str, ...] = ()
    compute_capabilities: tuple[str, ...] = ()
    sha256: str = ""
    plugins: tuple[Mapping[str, Any], ...] = ()
    """``NeededPlugin.record()`` of each."""
    source_types: Mapping[str, str] = field(default_factory=dict)
    """dtype of each input and output in the torch module, where the engine has another one."""
    newer_versions: bool = False
    """Whether newer versions of the same major number load it."""
    ampere_plus: bool = False
    """Whether it runs on every GPU from compute capability 8.0 on."""
    stripped: bool = False
    """Whether its weights were left out, and have to be put in by a refit."""
    branches: bool = False
    """Whether there is an If in it."""

    def pack(self) -> dict[str, Any]:
        """Plain values that JSON and ``torch.load(weights_only=True)`` take."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def unpack(cls, values: Mapping[str, Any]) -> Record:
        plain: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**plain)

    def of(self, plan: bytes) -> Record:
        """The same for the serialised ``plan``."""
        return replace(self, sha256=hashlib.sha256(plan).hexdigest())

    def check(self, plan: bytes, what: str) -> None:
        """Raises RunError where ``plan`` is not the one that this is about."""
        if self.sha256 and hashlib.sha256(plan).hexdigest() != self.sha256:
            raise RunError(
                f"{what}: its checksum is not the one that was written down when it was built: the file is cut short "
                "or damaged. Copy it again, or convert the model again."
            )


def sidecar_of(engine: Path) -> dict[str, Any] | None:
    """What ``convert`` wrote beside an engine file; None where there is nothing."""
    path = engine.with_name(f"{engine.name}.json")
    try:
        sidecar: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise RunError(f"{path}: is not the JSON that convert writes beside an engine ({error}).") from error
    return sidecar


def record_of(sidecar: Mapping[str, Any]) -> Record:
    """The record in a sidecar."""
    target, builder = sidecar["target"], sidecar.get("builder") or {}
    tensors = (*sidecar["inputs"], *sidecar["outputs"])
    return Record(
        target["flavour"],
        target["version"],
        tuple(item["name"] for item in sidecar["inputs"]),
        tuple(item["name"] for item in sidecar["outputs"]),
        tuple(sidecar["compute_capabilities"]),
        sidecar["engine_sha256"],
        tuple(sidecar["plugins"]),
        {item["name"]: item["source_dtype"] for item in tensors if item["source_dtype"] != item["dtype"]},
        newer_versions=bool(builder.get("version_compatible")),
        ampere_plus=builder.get("hardware_compatibility") == "ampere_plus",
        stripped=bool(builder.get("strip_weights")),
        branches=bool(sidecar.get("branches")),
    )
