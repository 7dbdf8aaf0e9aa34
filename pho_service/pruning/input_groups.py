"""
Groups of linears that read the same input.
"""

from torch import Tensor


class InputGroups:
    """
    Which linears are handed the very same tensor, in the order of their first calls.

    Attributes:
        input_of: Index of each linear's input, of the linears called so far.
    """

    def __init__(self) -> None:
        self.input_of: dict[str, int] = {}
        self.readers: list[str] = []  # the first linear that reads each input
        self._recent: list[tuple[Tensor, int]] = []  # inputs of this window, while groups form

    def see(self, name: str, x: Tensor) -> int | None:
        """The index of ``x`` if linear ``name`` is the one that it counts for, otherwise None."""
        if name not in self.input_of:
            self._group(name, x)
        index = self.input_of[name]
        return index if self.readers[index] == name else None

    def _group(self, name: str, x: Tensor) -> None:
        for seen, index in self._recent:
            if seen is x:
                self.input_of[name] = index
                return
        index = self.add(name)
        # Keeping the tensor alive is what makes "the very same" certain; neighbours suffice.
        self._recent = [*self._recent[-3:], (x, index)]

    def add(self, name: str) -> int:
        """Note that linear ``name`` reads an input of its own; its index."""
        self.input_of[name] = len(self.readers)
        self.readers.append(name)
        return self.input_of[name]

    def end_of_window(self) -> None:
        """Let go of the window's tensors."""
        self._recent = []
