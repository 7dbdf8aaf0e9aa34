"""
`pho.bench`: how fast models are on the machine at hand.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from pho_service.errors import InvalidInput
from pho_service.pipeline import bench as pipeline
from pho_service.progress import bars
from pho_service.shown.parts import Shown, Table

_DEFAULT = pipeline.BenchSettings()


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Bench(Shown, pipeline.Bench):
    """
    A measurement: ``sides`` has the seconds of each load and round, ``conditions`` the machine.
    """

    def _shown(self) -> Table:
        return Table(
            pipeline.COLUMNS,
            [pipeline.row(self, side) for side in self.sides],
            title=pipeline.title(self.settings),
            notes=(*self.conditions, pipeline.NOTE),
        )


def bench(
    models: str | Path | Sequence[str | Path],
    *,
    batch: int = _DEFAULT.batch,
    prompt: int = _DEFAULT.prompt,
    new_tokens: int = _DEFAULT.new_tokens,
    rounds: int = _DEFAULT.rounds,
    seed: int = _DEFAULT.seed,
    device: str = "auto",
    dtype: str = "auto",
    progress: bool = False,
) -> Bench:
    """
    Measure how fast models load, read a prompt and write, beside each other, as `pho bench`.

    Args:
        models: Folders, packed or not, hub ids or .gguf files; all are in memory at once, and the
            others are compared with the first.
        batch: Prompts at once.
        prompt: Tokens of each, drawn at random.
        new_tokens: Tokens to write after it, one by one.
        rounds: How often all is measured.
        seed: Seed of the prompts' tokens.
        device: ``auto`` takes a GPU if torch sees one.
        dtype: ``auto`` is the stored one on a GPU and float32 on the CPU.
        progress: Show bars on stderr.

    Raises:
        InvalidInput: A number is below 1, a model is given twice, or reads fewer tokens.
        ModelError: A model cannot be loaded.
    """
    given = [models] if isinstance(models, (str, Path)) else models
    if not given:
        raise InvalidInput("no model is given. Name at least one.")
    settings = pipeline.BenchSettings(
        batch=batch, prompt=prompt, new_tokens=new_tokens, rounds=rounds, seed=seed
    )
    for name, value in asdict(settings).items():
        if name != "seed" and value < 1:
            raise InvalidInput(f"{name}={value} is not at least 1.")
    found = pipeline.bench(
        [str(each) for each in given], settings, device=device, dtype=dtype,
        progress=bars(progress),
    )  # fmt: skip
    return Bench(**{part.name: getattr(found, part.name) for part in fields(found)})
