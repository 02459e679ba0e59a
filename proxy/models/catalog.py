"""Which models this proxy can serve: the checkpoints that it has folders of, and the names that workers give them.

Workers say the fingerprint of their checkpoint, and perhaps a name. The folder is looked up among those that the
proxy was started with; no path ever comes from the wire. A checkpoint of `--model` is loaded at start, those under
`--models` when the first worker that serves them appears, on another thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from epd.checkpoint import fingerprint, stamp
from epd.errors import ConfigError
from epd.messages import WorkerInfo
from proxy.models.checkpoint import Checkpoint

log = logging.getLogger(__name__)

MAX_NAME_CHARACTERS = 256
SCAN_INTERVAL_S = 1.0
"""Folders under `--models` are looked through so often at most, while a worker serves something unknown."""
MEMORY_S = 600.0
"""A name whose workers have all left is listed as degraded for so long."""
_MOST_NAMES = 1000


class ModelRef(NamedTuple):
    """What a request is for: a checkpoint, under one of its names."""

    fingerprint: str
    name: str


@dataclass(frozen=True)
class _Folder:
    path: Path
    name: str
    """What the checkpoint is called where workers give it no name."""


class _Look(NamedTuple):
    """What a folder under `--models` was when it was read. It may be one that is still being copied."""

    stamp: tuple[tuple[str, int, int], ...]
    fingerprint: str | None
    """None: it is no checkpoint."""


class ModelCatalog:
    """Checkpoints by fingerprint. Used on the event loop only, but for its constructor.

    Args:
        model: folder of the checkpoint that is always served; None: none is.
        name: its name.
        roots: folders of further checkpoints, or folders of such folders.
        threads: where folders are read.
        clock: seconds, monotonic.

    Raises:
        ConfigError: a file of `model` is wrong, or a root is no folder.
    """

    def __init__(
        self,
        model: Path | None,
        name: str,
        roots: Sequence[Path],
        threads: Executor,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._roots = roots
        self._threads = threads
        self._clock = clock
        self._folders: dict[str, _Folder] = {}
        self._looks: dict[Path, _Look] = {}
        self._loaded: dict[str, Checkpoint] = {}
        self._broken: dict[str, str] = {}
        self._busy: set[asyncio.Task[None]] = set()
        self._loading: set[str] = set()
        self._scanned_at = -SCAN_INTERVAL_S
        self._seen: dict[ModelRef, float] = {}
        self.expected: str | None = None
        """Fingerprint of `model`, which is listed whether workers serve it or not."""
        if model is not None:
            checkpoint = Checkpoint(model)
            self.expected = checkpoint.fingerprint
            self._loaded[checkpoint.fingerprint] = checkpoint
            self._folders[checkpoint.fingerprint] = _Folder(model, name)
        for root in roots:
            if not root.is_dir():
                raise ConfigError(f"--models {root}: no such folder")
        self._note_folders(_scan(roots, {}))

    # -- what workers say --------------------------------------------------------------------------------------------

    def reason_to_refuse(self, worker: WorkerInfo) -> str | None:
        """Why this proxy can't use a worker; None: it can, and the checkpoint is loaded or about to be."""
        known = worker.model in self._folders
        if not known:
            self._scan_soon()
            return f"it serves model {worker.model[:32]}, which this proxy has no tokenizer for: " + (
                "add its folder with --models" if self._folders else "give its folder with --model or --models"
            )
        if len(worker.served_model_name) > MAX_NAME_CHARACTERS or not worker.served_model_name.isprintable():
            return f"its --served-model-name has over {MAX_NAME_CHARACTERS} characters, or some that can't be printed"
        if worker.model in self._broken:
            return f"it serves model {worker.model}, whose folder is of no use: {self._broken[worker.model]}"
        self._load_soon(worker.model)
        return None

    def ref(self, worker: WorkerInfo) -> ModelRef:
        """The model that a worker serves, under the name that it has here."""
        return ModelRef(worker.model, worker.served_model_name or self.default_name(worker.model))

    def default_name(self, model: str) -> str:
        """Of a fingerprint, where workers say none."""
        folder = self._folders.get(model)
        return folder.name if folder is not None else model

    # -- what there is -----------------------------------------------------------------------------------------------

    @property
    def version(self) -> tuple[int, int]:
        """Differs when something was found, loaded or dropped."""
        return len(self._folders), len(self._loaded)

    def checkpoint(self, model: str) -> Checkpoint | None:
        """The loaded checkpoint of a fingerprint; None: it is unknown, or being loaded."""
        return self._loaded.get(model)

    def refs(self, decoders: Sequence[WorkerInfo], encoders: Sequence[WorkerInfo]) -> list[ModelRef]:
        """All names to list, of checkpoints loaded or not: expected, served, or served not long ago.

        PDs name a model; what encoders call it counts while no PD has been there.

        Args:
            decoders: what connected PDs say of themselves.
            encoders: the same of encoders.
        """
        for ref in map(self.ref, decoders):
            self._note_seen(ref)
        oldest = self._clock() - MEMORY_S
        self._seen = {ref: at for ref, at in self._seen.items() if at >= oldest}
        found = dict.fromkeys(self._seen)
        named = {ref.fingerprint for ref in found}
        found |= dict.fromkeys(ref for ref in map(self.ref, encoders) if ref.fingerprint not in named)
        named = {ref.fingerprint for ref in found}
        if self.expected is not None and self.expected not in named:
            found[ModelRef(self.expected, self.default_name(self.expected))] = None
        return sorted(found, key=lambda ref: (ref.fingerprint != self.expected, ref.name))

    def _note_seen(self, ref: ModelRef) -> None:
        if ref in self._seen or len(self._seen) < _MOST_NAMES:
            self._seen[ref] = self._clock()

    # -- reading folders ---------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Stop reading."""
        for task in self._busy:
            task.cancel()
        await asyncio.gather(*self._busy, return_exceptions=True)

    def _spawn(self, task: asyncio.Task[None]) -> None:
        self._busy.add(task)
        task.add_done_callback(self._busy.discard)

    def _load_soon(self, model: str) -> None:
        if model not in self._loaded and model not in self._loading:
            self._loading.add(model)
            self._spawn(asyncio.create_task(self._load(model), name=f"load {model}"))

    async def _load(self, model: str) -> None:
        folder = self._folders[model]
        try:
            loop = asyncio.get_running_loop()
            checkpoint = await loop.run_in_executor(self._threads, Checkpoint, folder.path)
            if checkpoint.fingerprint != model:
                del self._folders[model]  # its files have changed; who still serves it may find it elsewhere
                log.warning("%s is no longer model %s, but %s", folder.path, model, checkpoint.fingerprint)
                return
        except (ConfigError, OSError) as error:
            self._broken[model] = str(error)
            log.error("model %s can't be served: %s", folder.name, error)
        except Exception as error:  # the edge of this task: a file of a kind that nobody thought of
            self._broken[model] = f"{type(error).__name__}: {error}"
            log.exception("bug in loading model %s from %s", folder.name, folder.path)
        else:
            self._loaded[model] = checkpoint
            log.info("model %s appeared: %s", folder.name, folder.path)
        finally:
            self._loading.discard(model)

    def _scan_soon(self) -> None:
        now = self._clock()
        if self._roots and now - self._scanned_at >= SCAN_INTERVAL_S:
            self._scanned_at = now
            self._spawn(asyncio.create_task(self._rescan(), name="scan --models"))

    async def _rescan(self) -> None:
        known = dict(self._looks)
        self._note_folders(await asyncio.get_running_loop().run_in_executor(self._threads, _scan, self._roots, known))

    def _note_folders(self, found: dict[Path, _Look]) -> None:
        self._looks |= found
        for path, look in found.items():
            if look.fingerprint is not None:
                self._folders.setdefault(look.fingerprint, _Folder(path, path.name))


def _scan(roots: Sequence[Path], known: dict[Path, _Look]) -> dict[Path, _Look]:
    """Checkpoints under the roots that are new, or have changed since they were looked at."""
    found: dict[Path, _Look] = {}
    for root in roots:
        for folder in (root, *_children(root)):
            try:
                if not (folder / "config.json").is_file():
                    continue
                now = stamp(folder)
                if folder not in known or known[folder].stamp != now:
                    found[folder] = _Look(now, _fingerprint(folder))
            except OSError as error:
                log.warning("%s can't be read: %s", folder, error)
    return found


def _children(root: Path) -> list[Path]:
    try:
        return sorted(root.iterdir())
    except OSError as error:
        log.warning("--models %s can't be read: %s", root, error)
        return []


def _fingerprint(folder: Path) -> str | None:
    try:
        return fingerprint(folder)
    except ConfigError as error:
        log.warning("%s is of no use: %s", folder, error)
        return None
