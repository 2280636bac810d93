"""For which calls a backend's kernels are proved on a device."""

import math
from collections.abc import Iterable
from itertools import product
from typing import Any, NamedTuple

from capsops.backends.backend import NO_OPTIONS

OPS = ("squash", "predictions", "dynamic_routing", "capsule_routing", "couplings")
DTYPES = ("float32", "bfloat16", "float16")
PLAIN = ""  # in the place of an option: a call without any

Call = tuple[str, str, str]  # op, dtype, and an option of routing or PLAIN


class Scope(NamedTuple):
    """Calls whose value and gradients were right, each with one option or PLAIN.

    Calls with several options were among those that tried each of them.
    """

    calls: frozenset[Call] = frozenset()
    longest: tuple[int, int] | None = None  # the largest D and K; None: any
    multiple: int = 1  # D and K have to be multiples of this

    def covers(
        self, op: str, dtype: str, lengths: tuple[int, ...] = (), options: frozenset[str] = NO_OPTIONS
    ) -> bool:
        """Whether an op, or its gradient, is proved for a dtype, for lengths D and K, and with options."""
        if self.longest is not None:
            within = zip(lengths, self.longest, strict=False)
            if not all(length <= most and length % self.multiple == 0 for length, most in within):
                return False
        op = op.removesuffix("_backward")
        return all((op, dtype, option) in self.calls for option in options or (PLAIN,))

    def __and__(self, other: "Scope") -> "Scope":
        """What both cover."""
        longest = [scope.longest for scope in (self, other) if scope.longest is not None]
        return Scope(
            self.calls & other.calls,
            (min(d for d, _ in longest), min(k for _, k in longest)) if longest else None,
            math.lcm(self.multiple, other.multiple),
        )

    def to_json(self) -> dict[str, Any]:
        longest = None if self.longest is None else list(self.longest)
        return {"calls": sorted(map(list, self.calls)), "longest": longest, "multiple": self.multiple}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Scope":
        longest = values["longest"]
        calls = frozenset((op, dtype, option) for op, dtype, option in values["calls"])
        return cls(calls, None if longest is None else (longest[0], longest[1]), int(values["multiple"]))


NOTHING = Scope()


def every_op(options: Iterable[str] = ()) -> frozenset[Call]:
    """All ops in all dtypes, plain and with each of the options."""
    return frozenset(product(OPS, DTYPES, (PLAIN, *options)))
