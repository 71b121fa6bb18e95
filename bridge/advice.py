"""What can be done about a node that a target refuses. The words are here alone; who needs them asks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .target import Target

Kind = Literal["declined", "plugin", "restriction", "none"]

STANDARD = ("", "ai.onnx")


@dataclass(frozen=True)
class Advice:
    """One thing that would help, or that nothing is known that would."""

    kind: Kind
    """``declined``: a rule that could not; ``plugin``: one that could be registered; ``restriction``: a limit of the
    target, with the way around it; ``none``: no known way."""
    text: str

    def __str__(self) -> str:
        return self.text


NO_WAY = Advice("none", "No way is known to write it for this target: keep it outside of the engine.")

UNBOUNDED = (
    "Where the size of the result has a bound, write it without one: "
    "torch.where or a multiplication in place of a mask."
)

RESTRICTIONS = {
    "TopK": "TensorRT's TopK returns at most 3840 elements: ask for fewer.",
    "MaxPool": "TensorRT's MaxPool gives no indices and knows no dilation.",
    "LpPool": "TensorRT's LpPool is of p = 1 or p = 2.",
    "BatchNormalization": "TensorRT has only its inference form: call module.eval() before the export.",
    "Dropout": "TensorRT has only its inference form, which does nothing: call module.eval() before the export.",
    "NonZero": f"The size of its result depends on the data. {UNBOUNDED}",
    "Compress": f"The size of its result depends on the data. {UNBOUNDED}",
    "Unique": f"The size of its result depends on the data. {UNBOUNDED}",
    "NonMaxSuppression": "The size of its result depends on the data. Let the engine give boxes and scores, and select "
    "among them after it.",
}
"""By operator: what every TensorRT that was measured is known to lack of it, and what to do instead."""

_SEQUENCES = ("ConcatFromSequence", "SplitToSequence")
_TEXT = ("RegexFullMatch", "StringConcat", "StringNormalizer", "StringSplit", "TfIdfVectorizer")


def advise(
    target: Target,
    operator: str,
    domain: str = "",
    *,
    declined: Sequence[tuple[str, str]] = (),
    types: Collection[str] = (),
    attributes: Mapping[str, Any] | None = None,
    outputs: int = 1,
) -> list[Advice]:
    """What would help where ``target`` refuses a node of this operator; never empty.

    ``declined`` has each rule that looked at the node, with the reason why it left it; ``types`` the NumPy names of the
    types that the node reads and makes; ``attributes`` and ``outputs`` are the node's own, for a plugin to have.
    """
    found = [Advice("declined", f"The rule {rule} rewrites such nodes, and declined: {why}.") for rule, why in declined]
    missing = sorted(set(types) - target.types - {"int64"})  # where there is no int64, parsers narrow it themselves
    if missing:
        words = f"{target} has no tensors of {' or '.join(missing)} here: cast to another type before it."
        found.append(Advice("restriction", words))
    foreign = _foreign(operator, domain)
    restriction = foreign or (RESTRICTIONS.get(operator, "") if domain in STANDARD else "")
    if restriction:
        found.append(Advice("restriction", restriction))
    if foreign:  # of types that no plugin could take either
        return found
    call = _call(operator, domain, attributes or {}, outputs)
    if is_plugin_domain(domain):
        found.append(Advice("restriction", hint(target, operator, domain)))
    elif domain not in STANDARD:
        found.append(Advice("plugin", f"It is an operator of the domain {domain!r}. {call}"))
    elif not target.takes(operator):
        found.append(Advice("plugin", " ".join(filter(None, (hint(target, operator), call)))))
    return found or [NO_WAY]


def is_plugin_domain(domain: str) -> bool:
    """Whether the operators of the domain are calls of registered plugins."""
    from passes.ir import PLUGIN_DOMAIN

    return domain == PLUGIN_DOMAIN or domain.startswith(f"{PLUGIN_DOMAIN}.")


def hint(target: Target, operator: str, domain: str = "") -> str:
    """The advice that concerns plugins; empty where the operator needs none."""
    if is_plugin_domain(domain):
        return (
            f"It calls the plugin {operator!r}, and TensorRT could not make it: its own words, in build.log, say why."
        )
    if domain not in STANDARD:
        return (
            _foreign(operator, domain)
            or f"It is an operator of the domain {domain!r}. {_call(operator, domain, {}, 1)}"
        )
    if target.only_by_plugin(operator) and not target.has_plugin(operator):
        return f"{target} takes {operator} through a plugin of that name alone, and none is registered. {UNBOUNDED}"
    return ""


def _foreign(operator: str, domain: str) -> str:
    """What to do about an operator of values that no TensorRT has, nor a plugin; empty where it is of tensors."""
    if domain == "ai.onnx.ml":
        return (
            "TensorRT has none of ai.onnx.ml's operators, and the passes rewrite those of numbers (encoders, scalers, "
            "trees, linear models, support vectors): compute what stays before or after the engine."
        )
    if domain in STANDARD and operator in _TEXT:
        return "TensorRT has no text: compute it before or after the engine."
    if domain == "com.microsoft.nchwc":
        return (
            "ONNX Runtime has put the weights into an order for the processor that it saved the model on: save it with "
            "GraphOptimizationLevel.ORT_ENABLE_EXTENDED, or convert the model that ONNX Runtime was given."
        )
    if domain not in STANDARD:
        return ""
    if operator.startswith("Sequence") or operator in _SEQUENCES:
        return "TensorRT has no sequences of tensors: write torch.stack, torch.cat or a fixed number of tensors."
    if operator.startswith("Optional"):
        return "TensorRT has no optional values: give the model the tensor, or another model."
    return ""


def _call(operator: str, domain: str, attributes: Mapping[str, Any], outputs: int) -> str:
    """How a plugin for the operator is made known."""
    values = {name: value for name, value in attributes.items() if isinstance(value, (bool, int, float, str, list))}
    parts = [f"{operator!r}", f"replaces={(domain, operator)!r}"]
    parts += [f"attributes={values!r}"] if values else []
    parts += [f"outputs={outputs}"] if outputs != 1 else []
    parts += [f"library='lib{operator.lower()}.so'", "reference=..."]
    return f"A TensorRT plugin named {operator!r} would serve: bridge.register_plugin({', '.join(parts)})."
