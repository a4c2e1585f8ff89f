"""Options and output that the commands about whole models share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from meditron_train.log import printable
from meditron_train.units import parse_num_bytes

if TYPE_CHECKING:
    from meditron_train.checkpoint.convert.engine import Limits
    from meditron_train.checkpoint.convert.workspace import Ranks

Dtype = Annotated[str, typer.Option("--dtype", help="bf16, fp16, fp32, or keep: each tensor's own.")]
MaxRam = Annotated[
    str, typer.Option("--max-ram", help="Memory that may be resident, this program's own included.")
]
MaxShardSize = Annotated[str, typer.Option("--max-shard-size", help="Largest safetensors file.")]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Convert weights that hold NaN or infinity, and say so.")
]


def tell(text: str) -> None:
    print(printable(text))


def say(text: str) -> None:
    print(printable(text), file=sys.stderr)


def read_limits(max_ram: str, allow_nonfinite: bool) -> Limits:
    from meditron_train.checkpoint.convert.engine import Limits

    return Limits(parse_num_bytes(max_ram), allow_nonfinite)


@contextmanager
def meet_ranks() -> Iterator[Ranks | None]:
    """The processes that convert together under torchrun or srun; None for one."""
    from meditron_train.launcher.environment import detect_launcher
    from meditron_train.launcher.rendezvous import meet

    with meet(detect_launcher()) as ranks:
        yield ranks


def is_first(ranks: Ranks | None) -> bool:
    return ranks is None or ranks.rank == 0
