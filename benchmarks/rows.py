"""The result of one benchmark, and the file with the rows of one run."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from capsops.measuring.timing import Race, spread
from infocapsgan.engine.atomic import atomic_file

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Target:
    """A number to be reached: at least `wanted`, or at most where `most`."""

    what: str  # "ratio", "share", "memory ratio", "memory", "overhead", "seconds"
    wanted: float
    got: float
    most: bool = False

    @property
    def met(self) -> bool:
        return self.got <= self.wanted if self.most else self.got >= self.wanted


@dataclass
class Row:
    """One case: seconds of one call of ours and of each peer, and what else was measured."""

    suite: str
    op: str
    case: str
    passes: str
    dtype: str = "float32"
    impl: str = ""
    seconds: float | None = None
    spread: float | None = None  # half the distance between the quartiles, over the median
    peers: dict[str, float] = field(default_factory=dict)
    details: dict[str, float] = field(default_factory=dict)  # seconds of what else was timed
    error: float | None = None  # the largest relative error against float64
    operations: int | None = None
    share: float | None = None  # of the measured ceiling
    memory: int | None = None  # bytes beyond inputs and gradients
    peers_memory: dict[str, int] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)

    @property
    def peer(self) -> str | None:
        """The fastest."""
        return min(self.peers, key=self.peers.__getitem__) if self.peers else None

    @property
    def ratio(self) -> float | None:
        """How many times as long the fastest peer takes."""
        return self.peers[self.peer] / self.seconds if self.peers and self.seconds else None

    def take_times(self, race: Race) -> None:
        """The times of a race: of "ours", and of the others as peers."""
        self.peers = race.medians()
        self.seconds, self.spread = self.peers.pop("ours"), spread(race.seconds["ours"])

    def as_json(self) -> dict[str, object]:
        """With what follows from the rest, so that a reader of the file need not compute it."""
        targets = [{**asdict(target), "met": target.met} for target in self.targets]
        return {**asdict(self), "peer": self.peer, "ratio": self.ratio, "targets": targets}

    @classmethod
    def from_json(cls, values: dict) -> "Row":
        fields = {k: v for k, v in values.items() if k not in ("peer", "ratio", "targets")}
        targets = [Target(**{k: v for k, v in x.items() if k != "met"}) for x in values["targets"]]
        return cls(**fields, targets=targets)


def save(path: Path, header: dict[str, object], rows: Sequence[Row]) -> None:
    """Writes the file whole or not at all."""
    text = json.dumps({**header, "rows": [row.as_json() for row in rows]}, indent=1, ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def load(path: Path) -> tuple[dict, list[Row]]:
    """Header and rows."""
    header = json.loads(path.read_text(encoding="utf-8"))
    rows = header.pop("rows")
    return header, [Row.from_json(row) for row in rows]
