"""
Where an interrupted training goes on from.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

from pho_service.errors import ChangedInput, OutputError, PhoError
from pho_service.host.machine import first_words
from pho_service.models.bundle_file import os_errors
from pho_service.models.scratch import Memo, Record, Rows
from pho_service.pruning.recovery import Processes, Recovering

ANSWERS = "answers"


class Workplace:
    """A folder with all that an interrupted training goes on from; of several, one a process."""

    def __init__(
        self, folder: Path, identity: Sequence[Any] = (), processes: Processes | None = None
    ) -> None:
        self.processes = processes or Processes()
        several = self.processes.count > 1
        self.folder = folder / f"{self.processes.number}" if several else folder
        self._identity = [*identity, self.processes.count]
        self._memo = Memo(folder=self.folder, key="")  # that of no training, until one begins

    def begin(self, teacher: Mapping[str, Any]) -> None:
        """Go on with what is there if it is of the same training."""
        identity = json.dumps([*self._identity, teacher], default=str)
        self._memo = replace(self._memo, key=hashlib.sha256(identity.encode()).hexdigest())
        if not all(self.processes.every(self._memo.read("steps") is not None)):  # the first of all
            self._memo.remove()
        self.folder.parent.mkdir(parents=True, exist_ok=True)

    def check_text(self, name: str, sha256: str) -> None:
        """Raise ChangedInput if what lies there was trained on another text of this name."""
        before = self.values("text").get("sha256", sha256)
        if before != sha256:
            raise ChangedInput(
                f"the text {name} has changed since this recovery began (hash {before[:12]} then, "
                f"{sha256[:12]} now), and one that goes on would be of both. Put the text from "
                f"before back, or delete {self.folder} to start again."
            )
        self.keep_values("text", {"sha256": sha256})

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Inside, a disk that is full, or away, raises OutputError, whichever library says it."""
        try:
            with os_errors():
                yield
        except OSError as error:
            raise self._not_written(os.strerror(error.errno or errno.EIO)) from error
        except RuntimeError as error:  # torch's, of the state of Adam
            if not any(words in str(error) for words in ("PytorchStreamWriter", "iostream error")):
                raise
            raise self._not_written(first_words(error).removeprefix(": ")) from error

    def _not_written(self, why: str) -> OutputError:
        return OutputError(
            f"{self.folder}, which the recovery goes on from, cannot be written: {why}. See that "
            "there is room, then run the same again, or resume the job: it goes on from what is "
            "kept."
        )

    @contextmanager
    def nothing_left(self) -> Iterator[None]:
        """Inside, an error leaves no folder, unless a training lies in it."""
        try:
            yield
        except PhoError:
            if not any(self._memo.path(name).exists() for name in ("initial", ANSWERS)):
                self.remove()
            raise

    def once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """A tensor that is made once, and is the same for all processes."""
        record: Record | None = self.processes.agreed(self._memo.read(name))
        if record is None:
            record = Record(tensors={name: self.processes.agreed(make())})
            self._memo.keep(name, record)
        return record.tensors[name]

    @property
    def room(self) -> int:
        """Bytes that its disk has for it, what lies there of an earlier attempt included."""
        there = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
        folder = next(folder for folder in self.folder.absolute().parents if folder.is_dir())
        return there + shutil.disk_usage(folder).free

    def part(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """A tensor that each process makes for itself, once."""
        record = self._memo.read(name)
        if record is None:
            record = Record(tensors={name: make()})
            self._memo.keep(name, record)
        return record.tensors[name]

    def answers(self) -> Rows:
        """What the dense model has predicted so far for this process."""
        return Rows.kept(self._memo, ANSWERS)

    def values(self, name: str) -> dict[str, Any]:
        """Values that were kept; nothing if there are none."""
        record: Record | None = self.processes.agreed(self._memo.read(name))
        return {} if record is None else dict(record.values)

    def keep_values(self, name: str, values: Mapping[str, Any]) -> None:
        """Keep values in the place of those before."""
        self._memo.keep(name, Record(values=values))

    def keep_initial(self, trained: Recovering) -> None:
        if self._memo.read("initial") is None:
            self._memo.keep("initial", Record(tensors=trained.state_dict()))

    def restore(self, trained: Recovering, step: int | None) -> None:
        """Take the weights of the check after a step, or those from before if there is none."""
        file = self._checks()[step] / SAFE_WEIGHTS_NAME if step else self._memo.path("initial")
        trained.load_state_dict(load_file(file))

    def _checks(self) -> dict[int, Path]:
        """What was kept at checks, by their steps."""
        whole = self.folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")  # the last file
        return {int(file.parent.name.rpartition("-")[2]): file.parent for file in whole}

    def last_check(self) -> str | None:
        """The last one that all processes have kept whole; what is newer goes."""
        kept = self._checks()
        last = min(self.processes.every(max(kept, default=0)))
        older = {folder for step, folder in kept.items() if step <= last}  # the best is among them
        for folder in self.folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            if folder not in older:
                shutil.rmtree(folder)
        return str(kept[last]) if last else None

    def remove(self) -> None:
        self._memo.remove()
        if self.processes.count > 1:
            with suppress(OSError):  # the others are still there
                self.folder.parent.rmdir()
