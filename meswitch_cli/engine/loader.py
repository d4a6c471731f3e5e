"""The thread that copies experts into slots, while others generate."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.manifest import Manifest
from meswitch_cli.engine.bank_layout import device_layout
from meswitch_cli.engine.banks import Banks, Stored
from meswitch_cli.engine.contract import EngineError
from meswitch_cli.engine.expert import ServedModel
from meswitch_cli.engine.host_copies import HostCopies
from meswitch_cli.engine.residency import Load
from meswitch_cli.engine.staging import StagedCopy
from meswitch_cli.errors import MeswitchError

logger = logging.getLogger(__name__)

#: Called when a load has ended: with what went wrong, or None.
OnLoaded = Callable[[Load, str | None], None]


class SlotLoader:
    """Loads one expert at a time, from host memory or from disk.

    Attributes:
        banks: where to; replaced, under `lock`, when a new expert needs more room.
        seconds, nbytes: of all copies into slots, reading from disk included where that was needed.
    """

    def __init__(self, banks: Banks, copies: HostCopies, on_loaded: OnLoaded) -> None:
        self.banks, self.copies = banks, copies
        self.lock = threading.Lock()
        self.seconds, self.nbytes = 0.0, 0
        self._on_loaded = on_loaded
        self._jobs: queue.SimpleQueue[tuple[Load | None, ServedModel] | None] = queue.SimpleQueue()
        self._queued_prefetches: set[str] = set()
        self._stream: Any = None
        if banks.base.device.type == "cuda":
            self._stream = torch.cuda.Stream(banks.base.device)  # type: ignore[no-untyped-call]
        self._thread = threading.Thread(target=self._run, name="meswitch-loader", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()

    def load(self, load: Load, model: ServedModel) -> None:
        self._jobs.put((load, model))

    def prefetch(self, model: ServedModel) -> None:
        """Have a copy in host memory, if copies are kept at all."""
        if self.copies.limit and model.digest not in self.copies and model.name not in self._queued_prefetches:
            self._queued_prefetches.add(model.name)
            self._jobs.put((None, model))

    def copy(self, model: ServedModel, slot: int) -> None:
        """Copy an expert into a slot, in the caller's thread. The caller holds `lock`."""
        started = time.perf_counter()
        with self._beside_the_loop():
            stored = self._stored(model)
            if self._stream is not None:
                stored = StagedCopy(stored, self._stream.device)
            moved = self.banks.load(slot, _artifact(model).manifest, stored)
        self.seconds += time.perf_counter() - started
        self.nbytes += moved

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        with self.lock, torch.no_grad(), self._beside_the_loop():
            self.banks.clear(slot)

    def has_room(self, manifests: Sequence[Manifest]) -> bool:
        """Whether the slots hold any of these experts.

        Raises:
            EngineError: one changes a parameter that no layer serves.
        """
        return self.banks.layout.holds(device_layout(self.banks.base, manifests))

    def make_room(self, manifests: Sequence[Manifest], resident: Mapping[int, ServedModel]) -> None:
        """Make banks that hold any of these experts too, and put those in slots into the same slots there.

        Nobody may generate meanwhile.

        Raises:
            EngineError: the device has no room for them beside the old ones; these are kept.
        """
        old = self.banks
        layout = device_layout(old.base, manifests).joined(old.layout)
        # The loop runs in inference mode, whose tensors the loader's thread could not write to.
        with self.lock, torch.inference_mode(False), torch.no_grad():
            try:
                with self._beside_the_loop():
                    self.banks = Banks(old.base, layout, old.slots)
                for slot, model in resident.items():  # one that is being loaded is copied twice, harmlessly
                    self.copy(model, slot)
            except BaseException as error:
                self.banks = old
                if isinstance(error, torch.OutOfMemoryError):
                    raise EngineError(
                        "the device has no room for wider slots while the present ones hold their experts: start the "
                        "engine with all of them, with fewer slots, or with less for the cache (cache_tokens)"
                    ) from error
                raise
            self.banks.install()

    @contextlib.contextmanager
    def _beside_the_loop(self) -> Iterator[None]:
        """Have the device do the work of this block on a stream of its own, and return when it is done.

        On the stream that every thread begins with, whatever the loop copies would wait for a whole expert.
        """
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()

    def _run(self) -> None:
        if self._stream is not None:
            torch.cuda.set_device(self._stream.device)  # a new thread begins on the first
        while (job := self._jobs.get()) is not None:
            load, model = job
            problem = None
            try:
                with torch.no_grad(), self.lock:
                    if load is None:
                        self._stored(model)
                    else:
                        self.copy(model, load.slot)
            except MeswitchError as error:
                problem = str(error)
            except Exception as error:  # whatever it is, it is this expert's and must not stop the others
                logger.exception("loading expert %s", model.name)
                problem = f"{model.path}: cannot be loaded: {error}"
            self._queued_prefetches.discard(model.name)
            if load is not None:
                self._on_loaded(load, problem)

    def _stored(self, model: ServedModel) -> Stored:
        pinned = self.banks.base.device.type == "cuda"
        return self.copies.fetch(model.digest, _artifact(model), pinned=pinned)


def _artifact(model: ServedModel) -> Artifact:
    if model.artifact is None:
        raise EngineError("the base is in no slot")
    return model.artifact
