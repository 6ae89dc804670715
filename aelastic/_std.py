"""Which of the two output streams is meant: `Std`, and `to_map` for settings by rank.

Values only; nothing here opens or reads a stream.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import IntFlag

_ENTRY = re.compile(r"(\d+):(\d+)")


class Std(IntFlag):
    """The standard streams of a worker; members combine with `|`.

    Source: `torch.distributed.elastic.multiprocessing.Std`, same names and values.

    Example:
        >>> Std.OUT | Std.ERR is Std.ALL
        True
        >>> Std.from_str("0:1,12:2") == {0: Std.OUT, 12: Std.ERR}
        True
    """

    NONE = 0
    OUT = 1
    ERR = 2
    ALL = 3

    @classmethod
    def from_str(cls, value: str) -> Std | dict[int, Std]:
        """Read a setting as the command line writes it.

        Args:
            value: `"3"` for every rank, or `"0:1,1:2"` rank by rank.

        Returns:
            1. one `Std` when the value names no rank,
            2. a mapping of rank to `Std` otherwise.

        Raises:
            ValueError: if the text is neither, a value is not 0 to 3, or a rank stands twice.
        """
        text = value.strip()
        if text.isdecimal():
            return cls._of_digits(text, value)
        stds: dict[int, Std] = {}
        for entry in text.split(","):
            match = _ENTRY.fullmatch(entry.strip())
            if match is None:
                raise ValueError(
                    f"{value!r} is no stream setting: write one of 0, 1, 2, 3 for all ranks, or rank:value pairs"
                    " such as 0:1,1:2"
                )
            rank = int(match[1])
            if rank in stds:
                raise ValueError(f"{value!r} names rank {rank} twice: give each rank one value")
            stds[rank] = cls._of_digits(match[2], value)
        return stds

    @classmethod
    def _of_digits(cls, digits: str, whole: str) -> Std:
        number = int(digits)
        if number > cls.ALL:
            raise ValueError(f"{whole!r} holds {number}, which names no stream: use 0 none, 1 stdout, 2 stderr, 3 both")
        return cls(number)

    @property
    def label(self) -> str:
        """`"stdout"` or `"stderr"`, the name a person reads; for one stream only."""
        return {Std.OUT: "stdout", Std.ERR: "stderr"}[self]


STREAMS = (Std.OUT, Std.ERR)
"""Each single stream, in the order of its descriptor."""


def to_map(val_or_map: Std | Mapping[int, Std], local_world_size: int) -> dict[int, Std]:
    """Spell a setting out for every rank.

    Args:
        val_or_map: one value for all ranks, or a mapping by rank; ranks it leaves out get `Std.NONE`.
        local_world_size: number of ranks.

    Returns:
        A new dict with exactly the keys 0..local_world_size-1.

    Source: `torch.distributed.elastic.multiprocessing.to_map`.

    Example:
        >>> to_map({1: Std.OUT}, 2) == {0: Std.NONE, 1: Std.OUT}
        True
    """
    if isinstance(val_or_map, Mapping):
        return {rank: Std(val_or_map.get(rank, Std.NONE)) for rank in range(local_world_size)}
    return dict.fromkeys(range(local_world_size), Std(val_or_map))
