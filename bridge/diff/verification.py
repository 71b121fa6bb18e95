"""What ``bridge verify`` found, for people and for programs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..compare import disagreement, nothing_finite
from ..result import Comparison

SCHEMA = 1


@dataclass(frozen=True)
class VerifyReport:
    """Whether an engine computes what the evidence says."""

    name: str
    status: Literal["verified", "differs", "not run"]
    engine: str
    reason: str = ""
    """Why the engine was not run."""
    ran: str = ""
    """Where it ran, and when if not just now."""
    against: str = "rewritten"
    comparisons: list[Comparison] = field(default_factory=list)
    """Of every output and case."""
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    """Of what the evidence was written with."""
    built: bool = True
    """Whether there is an engine, or was one when the evidence was written."""

    @property
    def ok(self) -> bool:
        return self.status == "verified"

    @property
    def exit_status(self) -> int:
        """0 where the engine agrees, 1 where it differs, 2 where it cannot run here."""
        return {"verified": 0, "differs": 1, "not run": 2}[self.status]

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.status == "not run":
            return f"{'built, ' if self.built else ''}not run: {self.reason}"
        if self.status == "differs":
            return f"differs, {self.ran}: {disagreement(self.comparisons)}"
        worst = max((item.tolerance_used or 0.0 for item in self.comparisons), default=0.0)
        but = f", though nothing of {', '.join(map(repr, self.idle))} is finite" if self.idle else ""
        return (
            f"verified, {self.ran}: all {len(self.comparisons)} comparisons with the {self.against} model agree{but}; "
            f"the worst uses {100 * worst:.3g} % of its tolerance"
        )

    @property
    def idle(self) -> list[str]:
        """Outputs of which nothing was finite in any case, so that they cannot but agree."""
        outputs = dict.fromkeys(item.output for item in self.comparisons)
        return [name for name in outputs if nothing_finite([item for item in self.comparisons if item.output == name])]

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "verdict": self.verdict, **asdict(self)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.verdict}"]
        for item in self.comparisons:
            limit = f"rtol {item.tolerance.rtol:g}, atol {item.tolerance.atol:g}"
            state = "agrees" if item.agreed else "DIFFERS"
            lines.append(f"  {item.inputs}: {item.output} {state}: {_figure(item)} ({limit})")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines) + "\n"


def _figure(item: Comparison) -> str:
    if item.max_abs_error is not None:
        return f"off by {item.max_abs_error:.3g} at most"
    if not item.agreed:
        return item.note or "not finite in the same places"
    return "nothing of it is finite" if nothing_finite([item]) else "it is empty"
