"""Golden inputs and outputs: written by a conversion on one machine, held against the engine on the one where it runs.

``golden.npz`` has the inputs of every case and what the source and the rewritten model compute of them; ``golden.json``
the tolerances, the checksums of the models and the engine, and the versions. ``verify`` runs the engine, and keeps what
it computed as ``engine-run.npz``, so that other tolerances can be asked about without running it again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from .. import target as targets
from ..compare import Tolerances, compare_stages, run_stage, tolerance_for
from ..digests import sha256
from ..errors import RunError, UsageError
from ..gpu import gpu_here
from ..inputs import Array, Case
from ..plugins.loading import read_plugins
from ..result import Comparison, ConversionResult, Tolerance
from ..runtime.record import record_of, sidecar_of
from ..target import Target
from ..workspace import ENGINE, ENGINE_RUN, ENGINE_RUN_ARRAYS, EXPORTED, GOLDEN, GOLDEN_ARRAYS, REWRITTEN, TYPED
from .bundle import Bundle, EvidenceError, read_bundle, write_bundle
from .verification import VerifyReport

Outputs = Sequence[Mapping[str, Array]]
"""By name, of each case."""

CHECKED = (ENGINE, *(name + end for name in (EXPORTED, REWRITTEN, TYPED) for end in ("", ".data")))
"""Files of the conversion's folder whose checksums are kept; those that are not there later are not missed."""


# --- writing -----------------------------------------------------------------------------------------------------


def write_golden(
    folder: Path,
    cases: Sequence[Case],
    outputs: Mapping[str, Outputs],
    result: ConversionResult,
    tolerance: Tolerances = None,
    files: Path | None = None,
) -> Path:
    """Writes ``golden.npz`` and ``golden.json`` into ``folder``, whole or not at all; returns the latter's path.

    ``outputs`` are those of ``torch`` (or ``exported``, where the source is an ONNX file) and of ``rewritten``, for
    each case; ``files`` is the folder with the models and the engine, if it is another. Raises OSError.
    """
    from ..batch import versions

    place = files or folder
    types = {item.name: item.dtype for item in result.outputs}
    used = {
        name: tolerance_for(name, array.dtype.name, types.get(name, array.dtype.name), tolerance, result.computed_in)
        for name, array in outputs["rewritten"][0].items()
    }
    facts = {
        "name": result.name,
        "written": _now(),
        "target": asdict(result.target) if result.target is not None else None,
        "precision": result.precision,
        "tolerance": {name: asdict(one) for name, one in used.items()},
        "files": {name: sha256(place / name) for name in CHECKED if (place / name).is_file()},
        "versions": versions(),
    }
    listed = [
        (case.name, {"inputs": case.feeds, **{stage: found[index] for stage, found in outputs.items()}})
        for index, case in enumerate(cases)
    ]
    write_bundle(folder / GOLDEN, folder / GOLDEN_ARRAYS, "golden", facts, listed)
    return folder / GOLDEN


def write_engine_run(
    folder: Path, golden: str, engine: str, names: Sequence[str], outputs: Outputs, into: Path | None = None
) -> None:
    """Keeps what the engine with the SHA-256 ``engine`` computed of the inputs in ``folder``'s evidence, whose digest
    is ``golden``. Raises OSError."""
    facts = {"golden": golden, "engine": engine, "gpu": gpu_here() or "unknown", "written": _now()}
    cases = [(name, {"engine": found}) for name, found in zip(names, outputs, strict=True)]
    into = into or folder
    write_bundle(into / ENGINE_RUN, into / ENGINE_RUN_ARRAYS, "engine run", facts, cases)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


# --- checking ----------------------------------------------------------------------------------------------------


def verify(
    folder: str | Path,
    tolerance: Tolerances = None,
    *,
    engine: str | Path | None = None,
    against: str = "rewritten",
    run: bool | None = None,
) -> VerifyReport:
    """Holds an engine to the evidence in ``folder``, a conversion's that was made with ``golden=True``.

    Args:
        tolerance: instead of the conversion's: one for all outputs, or by name.
        engine: another engine than the folder's, built of the same model on this machine, say.
        against: ``rewritten``, the model that the engine was made of, or ``torch`` (``exported`` for an ONNX file).
        run: True runs the engine; False judges what it computed when it last ran, here or on another machine; None
            does so where ``tolerance`` is given and it did run, and else runs it.

    Returns:
        A report, whose status is ``not run`` where no GPU here can run the engine.

    Raises:
        UsageError: there is no evidence, or what is asked for is not in it.
        EvidenceError: the evidence, a model or the engine was cut short, changed, or belongs to another conversion.
        RunError: the engine was to run, and does not.
    """
    place = Path(folder)
    if not place.is_dir():
        raise UsageError(f"{place}: no such folder; give one that a conversion with golden=True (--golden) wrote.")
    if not (place / GOLDEN).is_file():
        raise UsageError(
            f"{place}: holds no {GOLDEN}; a conversion writes it with golden=True (--golden), beside {GOLDEN_ARRAYS}."
        )
    return _Check(place, Path(engine) if engine is not None else None, against).report(tolerance, run)


@dataclass
class _Check:
    """One engine, and the evidence that it is held to."""

    folder: Path
    own_engine: Path | None
    against: str

    def __post_init__(self) -> None:
        self.golden: Bundle = read_bundle(self.folder / GOLDEN, "golden")
        self.notes: list[str] = []
        self.engine = self.own_engine or self.folder / ENGINE
        known = [group for group in self.golden.groups if group != "inputs"]
        if self.against not in known:
            raise UsageError(f"against: {self.against!r} is not in the evidence, which has {' and '.join(known)}.")
        if self.own_engine is not None and not self.own_engine.is_file():
            raise UsageError(f"{self.own_engine}: no such file.")
        self.sha256 = self._check_files()

    def report(self, tolerance: Tolerances, run: bool | None) -> VerifyReport:
        limits = self._limits(tolerance)
        kept = self._kept_run() if run is False or (run is None and tolerance is not None) else None
        if kept is not None:
            ran = f"as it ran on {kept.facts['gpu']}, {kept.facts['written']}"
            return self._judged(kept.tensors("engine"), limits, ran)
        if run is False:
            return self._not_run(f"there is no {ENGINE_RUN} of this engine and evidence: it has not run yet")
        reason = self._why_not_run()
        if reason:
            return self._not_run(reason)
        outputs = self._run()
        report = self._judged(outputs, limits, f"run here, on {gpu_here() or 'a GPU'}")
        try:
            write_engine_run(self.folder, self.golden.digest, self.sha256, self.golden.names, outputs)
        except OSError as error:
            report.notes.append(f"what the engine computed was not kept: {error.strerror or error}")
        return report

    def _check_files(self) -> str:
        """Raises EvidenceError where a model or the engine is not the one of the evidence; returns the engine's
        SHA-256, which is empty where there is none."""
        stated: Mapping[str, str] = self.golden.facts["files"]
        for name, wanted in stated.items():
            path = self.folder / name
            if path.is_file() and sha256(path) != wanted:
                way_out = ", or give an engine that was built anew with --engine" if name == ENGINE else ""
                raise EvidenceError(
                    f"{path}: is not the file that {GOLDEN} was written for: it was cut short, changed or replaced. "
                    f"Copy the folder again{way_out}."
                )
        if self.own_engine is not None:
            self.notes.append(f"{self.own_engine} is not the engine that the evidence was written beside")
            return sha256(self.own_engine)
        if not self.engine.is_file():
            return ""
        if ENGINE not in stated:
            self.notes.append(f"{ENGINE} was not there when the evidence was written")
        return stated.get(ENGINE) or sha256(self.engine)

    def _limits(self, given: Tolerances) -> dict[str, Tolerance]:
        """Those of the evidence, where no others are given."""
        stated = {name: Tolerance(**values) for name, values in self.golden.facts["tolerance"].items()}
        if given is None:
            return stated
        wanted = {"": given} if isinstance(given, Tolerance) else dict(given)
        unknown = [name for name in wanted if name and name not in stated]
        if unknown:
            raise UsageError(f"tolerance: {unknown[0]!r} is no output; the outputs are {', '.join(stated)}.")
        if "" in wanted:
            stated = {name: one if self._counts(name) else wanted[""] for name, one in stated.items()}
        return stated | {name: one for name, one in wanted.items() if name}

    def _counts(self, output: str) -> bool:
        """Whether an output is of integers or booleans, which a tolerance for all does not loosen."""
        return self.golden.tensors("rewritten")[0][output].dtype.kind in "biu"

    def _kept_run(self) -> Bundle | None:
        """What this engine computed of this evidence's inputs; None where it has not been kept."""
        if not (self.folder / ENGINE_RUN).is_file():
            return None
        kept = read_bundle(self.folder / ENGINE_RUN, "engine run")
        wanted, own = self.sha256 or self.golden.facts["files"].get(ENGINE), kept.facts["engine"]
        if kept.facts["golden"] != self.golden.digest or (wanted and own != wanted):
            self.notes.append(
                f"{ENGINE_RUN} is of another engine (its SHA-256 is {own}) or other inputs, and was not looked at"
            )
            return None
        if not wanted:
            self.notes.append(f"nothing here tells which engine {ENGINE_RUN} is of; its SHA-256 is {own}")
        return kept

    # running

    @property
    def _sidecar(self) -> dict[str, Any] | None:
        """What is known of the engine; of one that was built elsewhere, that of the folder's."""
        return sidecar_of(self.engine) or sidecar_of(self.folder / ENGINE)

    @property
    def _target(self) -> Target:
        stated = self.golden.facts["target"]
        return targets.runtime(stated["flavour"] if stated else targets.likely_flavour())

    def _why_not_run(self) -> str:
        """Why the engine cannot run here; empty where it can."""
        if not self.sha256:
            return (
                f"there is no {ENGINE} in {self.folder}: build one of {REWRITTEN} on the machine that is to run it, "
                "and give it with --engine"
            )
        try:
            target = self._target
        except UsageError as error:
            return str(error).rstrip(".")
        reason, sidecar = target.why_not_run(), self._sidecar
        if reason or sidecar is None or self.own_engine is not None:
            return reason or ""
        record = record_of(sidecar)
        if record.stripped:
            return "its weights are stripped; refit it, and give the engine with them with --engine"
        here = targets.gpu_compute_capabilities()[0]
        return target.why_not_load(
            record.version,
            record.compute_capabilities,
            here,
            newer=record.newer_versions,
            ampere_plus=record.ampere_plus,
        )

    def _run(self) -> list[dict[str, Array]]:
        from ..runtime.runner import engine_runner

        sidecar = self._sidecar
        plugins = read_plugins(sidecar["plugins"]) if sidecar is not None else []
        return run_stage(
            "engine", lambda: engine_runner(self.engine, self._target, plugins), self.golden.tensors("inputs")
        )

    # judging

    def _judged(self, outputs: Outputs, limits: Mapping[str, Tolerance], ran: str) -> VerifyReport:
        reference = self.golden.tensors(self.against)
        missing = [name for name in reference[0] if name not in outputs[0]]
        if missing:
            raise RunError(
                f"{self.engine}: has no output {missing[0]!r}; its outputs are {', '.join(outputs[0])}. "
                "It was built of another model."
            )
        comparisons = compare_stages(
            (self.against, "engine"),
            self.golden.names,
            [{name: _real(array) for name, array in case.items()} for case in reference],
            [{name: _real(case[name]) for name in reference[0]} for case in outputs],
            dict(limits),
            self.golden.facts["precision"],
        )
        agreed = all(item.agreed for item in comparisons)
        return self._made("verified" if agreed else "differs", "", ran, comparisons)

    def _not_run(self, reason: str) -> VerifyReport:
        return self._made("not run", reason, "", [])

    def _made(self, status: Any, reason: str, ran: str, comparisons: list[Comparison]) -> VerifyReport:
        facts = self.golden.facts
        engine = str(self.engine)
        built = bool(self.sha256) or ENGINE in facts["files"]
        return VerifyReport(
            facts["name"], status, engine, reason, ran, self.against, comparisons, self.notes, facts["versions"], built
        )


def _real(array: Array) -> Array:
    """Complex numbers as pairs of real ones, along a new last axis."""
    if array.dtype.kind != "c":
        return array
    return np.stack([array.real, array.imag], axis=-1)
