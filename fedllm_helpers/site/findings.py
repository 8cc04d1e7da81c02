"""What a look at one thing found: a line for a person, and whether it stands in the way."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

OK, NOTE, FAULT = "ok", "note", "FAULT"


@dataclass(frozen=True)
class Finding:
    """One line: ``state`` is ``ok``, ``note`` (it works, and should be known) or ``FAULT`` (it will not work)."""

    state: str
    what: str
    said: str

    def __str__(self) -> str:
        return f"{self.state:5}  {self.what:12}  {' '.join(self.said.split())}"


Look = Callable[[], Iterable[Finding]]


def look(parts: dict[str, Look]) -> Iterator[Finding]:
    """Every finding, in order; a look that fails is a fault in one line, and the next one goes on."""
    for what, part in parts.items():
        try:
            yield from part()
        except Exception as error:  # of whatever is looked at: a dozen libraries
            said = next(iter(str(error).splitlines()), "")
            yield Finding(FAULT, what, said or type(error).__name__)


@contextmanager
def overheard(*names: str) -> Iterator[list[str]]:
    """What loggers say meanwhile, warnings and information, in place of their usual way."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in names]
    before = [(one.level, one.propagate) for one in loggers]
    for one in loggers:
        one.addHandler(handler), one.setLevel(logging.INFO)
        one.propagate = False
    try:
        yield said
    finally:
        for one, (level, propagate) in zip(loggers, before, strict=True):
            one.removeHandler(handler), one.setLevel(level)
            one.propagate = propagate
