"""What a conversion has to do with the engine cache. Whatever is wrong there is a note, and the engine is built."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import filelock

from passes import ModelError, all_rules

from .build import BuildOutcome
from .cache import Damaged, EngineCache, Outputs
from .cache_key import NoKey, Place, engine_key, feeds_key, weight_digests
from .errors import BuildTimeout
from .gpu import gpu_here
from .inputs import Case
from .plugins.loading import NeededPlugin
from .result import ConversionResult
from .settings import Settings
from .target import Target


@dataclass
class Caching:
    """The cache of one conversion, or none; its notes go to the result."""

    settings: Settings
    result: ConversionResult
    key: str = ""
    """Empty where the cache is not used."""
    feeds: str = ""
    weights: dict[Place, bytes] = field(default_factory=dict, repr=False)
    """Digests of weights that were made while there was something else to wait for."""
    _known: Outputs | None = field(default=None, repr=False)

    @property
    def cache(self) -> EngineCache | None:
        settings = self.settings
        return settings.cache if settings.build and settings.target.installed else None

    @contextlib.contextmanager
    def foreseeing(self, model: Path) -> Iterator[None]:
        """While the block runs, hashes the weights of an exported model, to which the rewritten one will refer, and
        imports the rules that will rewrite it."""
        if self.cache is None:
            yield
            return
        with ThreadPoolExecutor(1) as pool:
            made = pool.submit(weight_digests, model)
            rules = pool.submit(all_rules)
            yield
        rules.result()
        with contextlib.suppress(OSError, ModelError):  # the key has the same trouble, and tells
            self.weights.update(made.result())

    def outputs(self, model: Path, plan: Any, plugins: Sequence[NeededPlugin], cases: Sequence[Case]) -> Outputs | None:
        """Looks for the engine of the rewritten ``model``; returns what the model is known to compute for ``cases``."""
        cache = self.cache
        if cache is None:
            return None
        with self._noted(cache):
            try:
                self.key = engine_key(model, self.settings, plan, plugins, self.weights)
            except NoKey as error:
                self._note(f"the engine cache was not used: {error}")
                return None
            self.feeds = feeds_key(cases)
            with contextlib.ExitStack() as stack:
                if not self._lock(cache, stack, 0):
                    return None
                entry = cache.find(self.key)
                self._known = cache.outputs(entry, self.feeds) if entry is not None else None
        return self._known

    def build(
        self, make: Callable[[float | None], BuildOutcome], files: Mapping[str, Path], outputs: Outputs
    ) -> tuple[BuildOutcome, str | None]:
        """The engine out of the cache, or the one that ``make(time-out)`` builds; and its SHA-256, if it is known.

        ``files``, by name, are what a build makes: the engine, and others that it may or may not.
        """
        cache, timeout = self.cache, self.settings.build_timeout
        if cache is None or not self.key:
            return make(timeout), None
        with contextlib.ExitStack() as stack:
            began = time.monotonic()
            with self._noted(cache):
                if not self._lock(cache, stack, timeout):
                    raise BuildTimeout(
                        f"another process has been building this engine for longer than the time-out of {timeout:g} s."
                    )
            with self._noted(cache):
                found = self._take(cache, files)
                if found is not None:
                    if self._known is None:
                        cache.put_outputs(self.key, self.feeds, outputs)
                    return found
            waited = round(time.monotonic() - began, 1)
            left = None if timeout is None else max(0.1, timeout - waited) if waited else timeout
            for path in files.values():  # of a damaged entry: read-only, and shared with others
                path.unlink(missing_ok=True)
            outcome, sha256 = make(left), None
            if outcome.by_value:  # others, for other values, have the same key
                return outcome, None
            with self._noted(cache):
                name, target = self.result.name, str(self.settings.target)
                # What was to be said of that build is not said again of the engine.
                sha256 = cache.put(self.key, files, name, target, {**asdict(outcome), "notes": []})
                cache.put_outputs(self.key, self.feeds, outputs)
            return outcome, sha256

    def _take(self, cache: EngineCache, files: Mapping[str, Path]) -> tuple[BuildOutcome, str] | None:
        entry = cache.find(self.key)
        if entry is None:
            return None
        try:
            cache.take(entry, files)
            outcome = BuildOutcome(**entry.outcome)
        except (Damaged, TypeError) as error:
            cache.damaged(self.key, str(error))
            return None
        self.result.from_cache = True
        self.result.notes.append(f"engine from the cache, built on {entry.built[:10]}")
        return outcome, entry.engine_sha256

    def _lock(self, cache: EngineCache, stack: contextlib.ExitStack, timeout: float | None) -> bool:
        """False where another process has the key for longer than ``timeout``. What can only be read has no locks."""
        try:
            stack.enter_context(cache.locked(self.key, timeout))
        except filelock.Timeout:
            return False
        except (OSError, NotImplementedError) as error:
            self._note(f"nothing can be written to the engine cache {cache.folder}: {_words(error)}")
        return True

    @contextlib.contextmanager
    def _noted(self, cache: EngineCache) -> Iterator[None]:
        """Makes notes of what the cache says, and of why it cannot be used."""
        try:
            yield
        except OSError as error:
            self._note(f"nothing can be written to the engine cache {cache.folder}: {_words(error)}")
        finally:
            for note in cache.notes:
                self._note(note)
            cache.notes.clear()

    def _note(self, note: str) -> None:
        if note not in self.result.notes:
            self.result.notes.append(note)

    def timing_file(self) -> Path | None:
        """Where the builder keeps what it has measured of kernels; None where it measures none, or without a cache."""
        return timing_file(self.cache, self.settings.target)


def timing_file(cache: EngineCache | None, target: Target) -> Path | None:
    """Where a target's builder keeps what it has measured of kernels on this GPU; None where it measures none."""
    if cache is None or not target.keeps_timings:
        return None
    return cache.timing_file(f"{target.flavour}-{target.version_text}-{gpu_here()}")


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
