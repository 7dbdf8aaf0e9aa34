"""
Where an interrupted training goes on from.
"""

import hashlib
import json
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

from pho_service.errors import PhoError
from pho_service.models.scratch import Memo, Record
from pho_service.pruning.recovery import Processes, Recovering


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

    @contextmanager
    def nothing_left(self) -> Iterator[None]:
        """Inside, an error leaves no folder, unless a training lies in it."""
        try:
            yield
        except PhoError:
            if not self._memo.path("initial").exists():
                self.remove()
            raise

    def once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """A tensor that is made once, and is the same for all processes."""
        record: Record | None = self.processes.agreed(self._memo.read(name))
        if record is None:
            record = Record(tensors={name: self.processes.agreed(make())})
            self._memo.keep(name, record)
        return record.tensors[name]

    def values(self, name: str) -> dict[str, Any]:
        """Values that were kept; nothing if there are none."""
        record: Record | None = self.processes.agreed(self._memo.read(name))
        return {} if record is None else dict(record.values)

    def keep_values(self, name: str, values: Mapping[str, Any]) -> None:
        """Keep values in the place of those before."""
        self._memo.keep(name, Record(values=values))

    def keep_initial(self, trained: Recovering) -> None:
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
