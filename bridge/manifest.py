"""What to convert: the models of a manifest, or of the sources named on the command line, checked as a whole.

Every mistake is collected before any is reported, each with its line and the nearest right key, so that a manifest is
mended in one go.
"""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from .errors import UsageError
from .spec import FUNCTION, Checked, ModelSpec, Options, ToleranceSpec


class ManifestError(UsageError):
    """A manifest with mistakes; the message lists all of them."""


class Manifest(Checked):
    """The whole file."""

    defaults: Options | None = None
    models: Annotated[list[ModelSpec], Field(min_length=1)]


def read_sources(sources: Sequence[str], overrides: Mapping[str, Any]) -> list[ModelSpec]:
    """The models of manifests (``.yaml``), ``.onnx`` files and ``package.module:function``.

    ``overrides``, the options of the command line, win over a manifest's ``defaults`` and over its models.
    Raises UsageError with every mistake of every source.
    """
    specs: list[ModelSpec] = []
    mistakes: list[str] = []
    try:
        Options.model_validate(overrides)
    except ValidationError as error:
        mistakes += [
            f"--{str(item['loc'][0]).replace('_', '-')}: {_explain(item, ())}" for item in _first_per_path(error)
        ]
        overrides = {}
    for source in sources:
        try:
            if source.endswith((".yaml", ".yml")):
                specs += load_manifest(Path(source), overrides)
            else:
                function = source.rpartition(":")[2].rpartition(".")[2]
                name = Path(source).stem if source.endswith(".onnx") else function or source
                specs.append(ModelSpec.model_validate({"name": name, "source": source, **overrides}))
        except UsageError as error:
            mistakes.append(str(error))
        except ValidationError as error:
            problem = next((item for item in _first_per_path(error) if item["loc"] == ("source",)), error.errors()[0])
            hint = "" if source.endswith(".onnx") or FUNCTION.fullmatch(source) else ", nor a .yaml manifest"
            mistakes.append(f"{_explain(problem, ())}{hint}")
    names = [spec.name for spec in specs]
    for name in sorted({name for name in names if names.count(name) > 1}):
        shared = " and ".join(spec.source for spec in specs if spec.name == name)
        mistakes.append(f"two models are named {name!r} ({shared}); give them names of their own in a manifest")
    if mistakes:
        raise UsageError("\n".join(mistakes))
    return specs


def load_manifest(path: Path, overrides: Mapping[str, Any] | None = None) -> list[ModelSpec]:
    """The models of a YAML 1.2 file, with its defaults filled in; relative paths are relative to the file.

    Raises ManifestError with every mistake in it.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        text = path.read_text(encoding="utf-8-sig")
        reader = YAML(typ="safe", pure=True)
        reader.allow_duplicate_keys = True  # found by _Lines, so that they are reported beside everything else
        lines = _Lines(reader.compose(text))
        values = reader.load(text)
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    except MarkedYAMLError as error:
        where = f"{path}:{error.problem_mark.line + 1}" if error.problem_mark else str(path)
        problem = " ".join(filter(None, (error.context, error.problem)))
        raise ManifestError(f"{where}: not YAML: {problem}") from error
    except (YAMLError, RecursionError, ValueError) as error:
        raise ManifestError(f"{path}: not YAML: {error}") from error

    mistakes = [(line, _placed(at, values, text)) for line, at, text in lines.duplicates]
    mistakes += _repeated_names(values, lines)
    manifest = None
    try:
        manifest = Manifest.model_validate(values, context={"folder": path.absolute().parent})
    except ValidationError as error:
        for item in _first_per_path(error):
            at, line = lines.find(item["loc"])
            holder = at[:-1] if item["type"] == "extra_forbidden" else at
            mistakes.append((line, _placed(holder, values, _explain(item, at))))
    if mistakes or manifest is None:
        listed = "\n".join(f"  {path}:{line}: {text}" for line, text in sorted(mistakes))
        raise ManifestError(f"{path}: {len(mistakes)} mistake{'s' if len(mistakes) > 1 else ''}\n{listed}")
    defaults = manifest.defaults.model_dump(exclude_unset=True) if manifest.defaults else {}
    return [_merged({**defaults, **model.model_dump(exclude_unset=True)}, overrides or {}) for model in manifest.models]


def _merged(given: dict[str, Any], overrides: Mapping[str, Any]) -> ModelSpec:
    """A model's options and those of the command line. A tolerance holds for the precision that it was written for."""
    if overrides.get("precision", given.get("precision")) != given.get("precision"):
        given.pop("tolerance", None)
    return ModelSpec.model_validate({**given, **overrides})


class _Lines:
    """The line of every key and item of a YAML document, and the keys that stand twice."""

    def __init__(self, root: Any) -> None:
        self.lines: dict[tuple[str, ...], int] = {}
        self.duplicates: list[tuple[int, tuple[str, ...], str]] = []
        self._seen: set[int] = set()
        self._visit(root, ())

    def _visit(self, node: Any, path: tuple[str, ...]) -> None:
        if id(node) in self._seen:  # an alias, which may even hold itself: its mistakes are those of its anchor
            return
        self._seen.add(id(node))
        kind = getattr(node, "id", None)
        if kind == "mapping":
            first: dict[Hashable, int] = {}
            for key, value in node.value:
                name, line = str(key.value), key.start_mark.line + 1
                if name in first and name != "<<":
                    self.duplicates.append((line, path, f"{name!r} stands here again, after line {first[name]}"))
                first.setdefault(name, line)
                self.lines.setdefault((*path, name), line)
                self._visit(value, (*path, name))
        elif kind == "sequence":
            for index, value in enumerate(node.value):
                inner = (*path, str(index))
                self.lines[inner] = value.start_mark.line + 1
                self._visit(value, inner)

    def find(self, loc: Iterable[Any]) -> tuple[tuple[str, ...], int]:
        """The innermost path of ``loc`` that stands in the file, and its line; pydantic mixes its own words in."""
        path: tuple[str, ...] = ()
        for part in loc:
            if (*path, str(part)) in self.lines:
                path = (*path, str(part))
        return path, self.lines.get(path, 1)


def _repeated_names(values: Any, lines: _Lines) -> list[tuple[int, str]]:
    models = values.get("models") if isinstance(values, dict) else None
    found: dict[str, int] = {}
    mistakes = []
    for index, model in enumerate(models if isinstance(models, list) else ()):
        name = model.get("name") if isinstance(model, dict) else None
        if isinstance(name, str):
            line = lines.find(("models", index, "name"))[1]
            if name in found:
                mistakes.append((line, f"the name {name!r} is taken by the model of line {found[name]}"))
            found.setdefault(name, line)
    return mistakes


def _first_per_path(error: ValidationError) -> list[Any]:
    found: dict[Any, Any] = {}
    for item in error.errors(include_url=False):
        found.setdefault(item["loc"], item)
    return list(found.values())


def _placed(path: tuple[str, ...], values: Any, text: str) -> str:
    """``text`` with its place before it, for people: ``model 'a': profiles.x`` rather than ``models.3.profiles.x``."""
    parts = []
    models = values.get("models") if isinstance(values, dict) else None
    if isinstance(models, list) and path[:1] == ("models",) and len(path) > 1:
        model = dict(enumerate(models)).get(int(path[1]))
        name = model.get("name") if isinstance(model, dict) else None
        parts = [f"model {name!r}" if isinstance(name, str) else f"model number {int(path[1]) + 1}"]
        path = path[2:]
    return ": ".join([*parts, *([".".join(path)] if path else []), text])


def _explain(item: Any, path: tuple[str, ...]) -> str:
    """One mistake found by pydantic, in the words of a manifest."""
    key = str(item["loc"][-1]) if item["loc"] else ""
    if item["type"] == "extra_forbidden":
        return _unknown_key(key, path[:-1])
    if item["type"] == "missing":
        return f"the key {key!r} is missing"
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    if item["type"] in ("model_type", "dict_type"):
        example = " such as {rtol: 1e-3, atol: 1e-5}" if path[-1:] == ("tolerance",) else ""
        return f"should be a mapping{example}, not {reprlib.repr(item['input'])}"
    if item["type"] == "too_short":
        return "is empty; at least one is needed"
    if item["type"] == "string_type":
        number = isinstance(item["input"], (int, float)) and math.isfinite(item["input"])
        return f"should be text, not {reprlib.repr(item['input'])}" + ("; put it in quotes" if number else "")
    message = str(item["msg"]).replace("Input should", "should").replace("Value should", "should")
    return f"{message}, not {reprlib.repr(item['input'])}" if message.startswith("should") else message


def _unknown_key(key: str, parent: tuple[str, ...]) -> str:
    kind: type[BaseModel] = ToleranceSpec
    if not parent:
        kind = Manifest
    elif parent == ("defaults",):
        kind = Options
    elif parent[0] == "models" and len(parent) == 2:
        kind = ModelSpec
    if kind is Options and key in ModelSpec.model_fields:
        return f"{key!r} belongs to a model, not to defaults"
    known = list(kind.model_fields)
    near = difflib.get_close_matches(key, known, n=1)
    return f"unknown key {key!r}; " + (f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(known)}")
