"""What an engine computes in: one setting for every target, by name (``int8+fp16``) or as a precision file.

A precision file (YAML or JSON) says it once, and by pattern where a part of the model differs::

    precision: int8+fp16
    io: keep
    fp32: [decoder.norm*, "op:Softmax", "node:node_conv_3"]
    fp16: [head]
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .errors import UsageError
from .result import Tolerance
from .target import Target

FLOATS = ("fp32", "fp16", "bf16")
SCHEMES = ("int8", "fp8", "int4")
IO = ("keep", "convert")
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""NumPy's (or ml_dtypes') names."""
KINDS = ("op", "module", "node")
"""What a pattern may be of; of two that fit, the later kind wins."""


@dataclass(frozen=True)
class Place:
    """What patterns are compared with of one node.

    Names and operators are its own and those of the exported model's node that a pass made it for: so a rule means the
    same whatever a target's passes make of a LayerNormalization.
    """

    names: tuple[str, ...]
    operators: tuple[str, ...]
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rule:
    """What the nodes of a pattern are computed in."""

    precision: str
    pattern: str
    """With ``*`` for any characters and ``?`` for one."""
    kind: str = ""
    """``op``, ``module`` or ``node``; empty for a module's path or a node's name."""

    @classmethod
    def of(cls, precision: str, text: str) -> Rule:
        """From ``op:Softmax``, ``node:node_conv_3``, ``module:decoder`` or ``decoder.norm*``."""
        kind, colon, pattern = text.partition(":")
        return cls(precision, pattern, kind) if colon and kind in KINDS else cls(precision, text)

    def __str__(self) -> str:
        return f"{self.kind}:{self.pattern}" if self.kind else self.pattern

    def fits(self, place: Place) -> int:
        """How specific it is for a node: 0 where it does not fit. A module's pattern fits all that is below it."""
        exact, below = _expressions(self.pattern)
        if self.kind in ("", "node") and any(map(exact.fullmatch, place.names)):
            return 3
        if self.kind in ("", "module") and any(map(below.fullmatch, filter(None, place.modules))):
            return 2
        return int(self.kind == "op" and any(map(exact.fullmatch, place.operators)))


@functools.lru_cache(1024)
def _expressions(pattern: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    text = "".join({"*": ".*", "?": "."}.get(letter, re.escape(letter)) for letter in pattern)
    return re.compile(text, re.DOTALL), re.compile(rf"{text}(\..*)?", re.DOTALL)


@dataclass(frozen=True)
class Precision:
    """What is computed in what."""

    low: str = "fp32"
    """``fp32``, ``fp16`` or ``bf16``: what is computed in where nothing else says so."""
    quantised: str = ""
    """``int8``, ``fp8`` or ``int4``: what is quantised of the operators that can be; empty for none."""
    rules: tuple[Rule, ...] = ()
    """The most specific wins (node over module over operator); of equal ones the last."""
    io: Literal["keep", "convert"] = "keep"
    """Whether the float inputs and outputs keep the types that they have in the source, or ``convert`` to ``low``."""

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("low", self.low, FLOATS),
            ("quantised", self.quantised, ("", *SCHEMES)),
            ("io", self.io, IO),
        ):
            if value not in allowed:
                raise UsageError(f"precision: {name} {value!r}: not one of {', '.join(map(repr, allowed))}.")
        for rule in self.rules:
            if rule.precision not in (*FLOATS, *SCHEMES):
                raise UsageError(f"precision: {rule.precision!r} for {str(rule)!r}: not one of {_listed()}.")
            if rule.kind and rule.kind not in KINDS:
                raise UsageError(f"precision: {rule.kind!r} for {rule.pattern!r}: not one of {', '.join(KINDS)}.")
            if not rule.pattern:
                raise UsageError(f"precision: an empty pattern for {rule.precision}; '*' means everything.")
        for what, names in (("16-bit type", FLOATS[1:]), ("quantisation", SCHEMES)):
            asked = [name for name in names if name in (self.low, self.quantised, *(r.precision for r in self.rules))]
            if len(asked) > 1:
                raise UsageError(
                    f"precision: {' and '.join(asked)} in one model: only one {what} is possible; drop one."
                )
        if self.io == "convert" and not self.half:
            raise UsageError("precision: io 'convert' needs fp16 or bf16 to convert to.")

    @property
    def name(self) -> str:
        """The low types that any node is to be in, be it by a rule, such as ``int8+fp16``.

        What an engine has to be allowed, and how far its outputs may be off, goes by it."""
        return _joined(self.scheme, self.half)

    def __str__(self) -> str:
        return self.name

    @property
    def plain(self) -> bool:
        """Whether everything is computed in the types that the model has."""
        return not (self.half or self.scheme)

    @property
    def half(self) -> str:
        """``fp16`` or ``bf16``, where any node is to be computed in it; else empty."""
        asked = (self.low, *(rule.precision for rule in self.rules))
        return next((name for name in asked if name in FLOATS[1:]), "")

    @property
    def half_dtype(self) -> str:
        """``float16`` or ``bfloat16``; empty where nothing is computed in either."""
        return DTYPES[self.half] if self.half else ""

    @property
    def scheme(self) -> str:
        """``int8``, ``fp8`` or ``int4``, where any node is to be quantised; else empty."""
        asked = (self.quantised, *(rule.precision for rule in self.rules))
        return next((name for name in asked if name in SCHEMES), "")

    def rule_for(self, place: Place) -> Rule | None:
        """The rule that says what a node is computed in, if there is one."""
        best, found = 0, None
        for rule in self.rules:
            specific = rule.fits(place)
            if specific and specific >= best:
                best, found = specific, rule
        return found

    def check_rules(self, places: Iterable[Place]) -> None:
        """Raises UsageError where a pattern fits none of the nodes."""
        there = list(places)
        for rule in self.rules:
            if any(map(rule.fits, there)):
                continue
            known = {
                "op": {operator for place in there for operator in place.operators},
                "module": _paths(there),
                "node": {name for place in there for name in place.names},
            }
            kinds = (rule.kind,) if rule.kind else ("module", "node")
            names = sorted({name for kind in kinds for name in known[kind] if name})
            near = difflib.get_close_matches(rule.pattern, names, 5, 0.5) or names[:5]
            hint = f"; near are {', '.join(near)}" if near else ""
            raise UsageError(f"precision: {rule.precision}: {str(rule)!r} fits no node of the model{hint}.")

    def file_text(self) -> str:
        """The precision file that ``of`` reads as this."""
        lines = [f"precision: {_joined(self.quantised, self.low)}", f"io: {self.io}"]
        groups = {name: [rule for rule in self.rules if rule.precision == name] for name in self._in_order()}
        if [rule for rules in groups.values() for rule in rules] == list(self.rules):
            for name, rules in groups.items():
                lines += [f"{name}:", *(f"  - {_quoted(rule)}" for rule in rules)]
        else:  # which of them comes later counts
            lines += ["rules:", *(f"  - {rule.precision}: {_quoted(rule)}" for rule in self.rules)]
        return "\n".join(lines) + "\n"

    def _in_order(self) -> list[str]:
        return list(dict.fromkeys(rule.precision for rule in self.rules))

    @classmethod
    def of(cls, value: str | Path | Mapping[str, Any] | Precision) -> Precision:
        """From a name (``int8+fp16``), a precision file's path, or what such a file holds.

        Raises UsageError for what is none of these.
        """
        if isinstance(value, Precision):
            return value
        if isinstance(value, Mapping):
            return cls._of_mapping(value, "precision")
        if is_path(value):
            return cls._of_mapping(_read_file(Path(value)), str(value))
        return cls(*_named(value))

    @classmethod
    def _of_mapping(cls, values: Mapping[str, Any], where: str) -> Precision:
        unknown = [str(key) for key in values if key not in ("precision", "io", "rules", *FLOATS, *SCHEMES)]
        if unknown:
            raise UsageError(
                f"{where}: {unknown[0]!r} is not known; a precision file has precision, io, rules, and patterns by "
                f"{_listed()}."
            )
        rules = [
            Rule.of(name, pattern)
            for key, listed in values.items()
            if key not in ("precision", "io")
            for name, pattern in _patterns(key, listed, where)
        ]
        try:
            low, quantised = _named(values.get("precision", "fp32"))
            return cls(low, quantised, tuple(rules), values.get("io", "keep"))
        except UsageError as error:
            raise UsageError(f"{where}: {error}" if where != "precision" else str(error)) from None


def labels(given: Sequence[Any]) -> dict[str, Precision]:
    """Several precisions by what each is called: its name or that of its file, with a number where that is taken.

    Raises UsageError for what is none, and where one stands there twice.
    """
    found: dict[str, Precision] = {}
    for item in given:
        precision = Precision.of(item)
        label = wanted = Path(str(item)).stem if is_path(item) else precision.name
        number = 2
        while label in found:
            if found[label] == precision:
                raise UsageError(f"precision: {label} stands there twice.")
            label, number = f"{wanted}-{number}", number + 1
        found[label] = precision
    if not found:
        raise UsageError("precision: the list is empty; give one at least.")
    return found


def _patterns(key: str, listed: Any, where: str) -> list[tuple[str, str]]:
    """Precisions and their patterns, from a list under a precision, or from one of pairs under ``rules``."""
    items = [listed] if isinstance(listed, (str, Mapping)) else listed
    if isinstance(items, (list, tuple)):
        if key != "rules" and all(isinstance(item, str) for item in items):
            return [(key, item) for item in items]
        if key == "rules" and all(
            isinstance(item, Mapping) and all(isinstance(text, str) for pair in item.items() for text in pair)
            for item in items
        ):
            return [(name, pattern) for item in items for name, pattern in item.items()]
    wanted = "a list of pairs such as 'fp32: decoder.norm*'" if key == "rules" else "a list of patterns"
    raise UsageError(f"{where}: {key}: {listed!r}: give {wanted}, each a text; a number such as 0 needs quotes.")


def _joined(scheme: str, low: str) -> str:
    return "+".join(part for part in (scheme, low) if part not in ("", "fp32")) or "fp32"


def _quoted(rule: Rule) -> str:
    return json.dumps(str(rule), ensure_ascii=False)


def _listed() -> str:
    return ", ".join((*FLOATS, *SCHEMES))


def _paths(places: Iterable[Place]) -> set[str]:
    """The modules that nodes come from, and those around them."""
    found: set[str] = set()
    for module in (module for place in places for module in place.modules):
        parts = module.split(".")
        found.update(".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return found


def _named(name: Any) -> tuple[str, str]:
    """The float type and the quantisation of a name such as ``int8+fp16``."""
    parts = [part.strip().lower() for part in name.split("+")] if isinstance(name, str) else []
    floats = [part for part in parts if part in FLOATS]
    schemes = [part for part in parts if part in SCHEMES]
    if not parts or len(floats) + len(schemes) < len(parts) or len(floats) > 1 or len(schemes) > 1:
        raise UsageError(
            f"precision {name!r}: not one of {_listed()}, nor a quantisation and a float type (int8+fp16), nor the "
            "path of a precision file."
        )
    return (floats or ["fp32"])[0], (schemes or [""])[0]


def is_path(value: Any) -> bool:
    """Whether it is a precision file's, and no name."""
    if not isinstance(value, str):
        return isinstance(value, Path)
    return value.lower().endswith((".yaml", ".yml", ".json")) or "/" in value


def _read_file(path: Path) -> Mapping[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        words = error.strerror if isinstance(error, OSError) else "is no text"
        raise UsageError(f"precision file {path}: cannot be read: {words}.") from error
    try:
        values = YAML(typ="safe").load(text)  # which JSON is, too
    except YAMLError as error:
        raise UsageError(f"precision file {path}: is neither YAML nor JSON: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"precision file {path}: holds no mapping; write such as 'precision: fp16'.")
    return values


NOTHING = 1e-6
"""Of an element: outputs that are small all over, as the probabilities of many classes, are held to their own size."""
TOLERANCES = {
    "fp16": Tolerance(1e-2, NOTHING, whole=True),
    "bf16": Tolerance(5e-2, NOTHING, whole=True),
    "int8": Tolerance(0.2, NOTHING, whole=True),
    "fp8": Tolerance(0.2, NOTHING, whole=True),
    "int4": Tolerance(0.3, NOTHING, whole=True),
}
"""By default, of what is computed in a lower precision than the model has; the coarser part of a name counts."""


def default_tolerance(precision: str) -> Tolerance | None:
    """For a name such as ``int8+fp16``; None for ``fp32``."""
    found = [TOLERANCES[name] for name in precision.split("+") if name in TOLERANCES]
    return max(found, key=lambda item: item.rtol, default=None)


def check_precision(precision: Precision, target: Target, capabilities: Sequence[tuple[int, int]] | None) -> None:
    """Raises UsageError where ``target`` cannot compute in it, on the GPUs that the engine is for."""
    reason = ""
    if precision.half:
        reason = target.lacks_type(precision.half_dtype)
    if precision.scheme and not reason:
        reason = target.lacks_quantisation(precision.scheme, capabilities)
    if reason:
        raise UsageError(f"precision {precision.name!r}: {target} {reason}.")
