"""What is wrong with data: one line for each kind of fault, with the first place and how many more there are."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, field

RARE = 10_000  # published sets have a few boxes without width or height
SHOWN = 200


@dataclass
class Fault:
    """One kind of fault, as it was first seen."""

    text: str
    advice: str
    warning: bool
    of: int | None
    count: int = 1

    def __str__(self) -> str:
        harmless = self.warning or (self.of is not None and self.count * RARE <= self.of)
        more = f" ({self.count - 1} more like it)" if self.count > 1 else ""
        return printable(f"{'warning' if harmless else 'error'}: {self.text}{more}; try {self.advice}")


@dataclass
class Findings:
    """Faults by kind, of the data and of the file that is their config."""

    config: str
    faults: dict[str, Fault] = field(default_factory=dict)

    def add(
        self, where: object, kind: str, expected: str, got: object, advice: str, *, warning: bool = False, of: int = 0
    ) -> None:
        """Count a fault.

        Args:
            where: A file; if there is none, the config.
            kind: Faults of one kind share a line.
            expected: What should be there.
            got: What is there: a text, or a value that is shortened.
            advice: What may help.
            warning: Whether training may begin all the same.
            of: How many things of its sort there are; a fault that the models' code leaves out by itself and that is
                rare among them is a warning.
        """
        if kind in self.faults:
            self.faults[kind].count += 1
            return
        got = got if isinstance(got, str) else reprlib.repr(got)
        text = f"{where or self.config}: expected {expected}, got {printable(got)[:SHOWN]}"
        self.faults[kind] = Fault(text, advice, warning, of or None)

    def lines(self, level: str) -> list[str]:
        """All lines of a level: error or warning."""
        return [line for line in map(str, self.faults.values()) if line.startswith(f"{level}: ")]


def printable(text: str) -> str:
    """A text without characters that would move a terminal's cursor or cannot be written."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
