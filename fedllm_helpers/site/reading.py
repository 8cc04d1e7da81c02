"""The settings of a party, from the flags of its Flower command or from the systemd unit that has them."""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.common.config import parse_config_args

CONTINUED = re.compile(r"\\\n\s*")


def unit(path: str | Path) -> tuple[list[str], dict[str, str]]:
    """The words of a unit's ``ExecStart``, and its ``Environment``.

    Raises:
        OSError: it cannot be read.
        ValueError: it starts nothing.
    """
    words: list[str] = []
    given: dict[str, str] = {}
    for line in CONTINUED.sub("", Path(path).expanduser().read_text(encoding="utf-8")).splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "ExecStart" and value.strip():
            words = shlex.split(value)
        elif key.strip() == "Environment":
            given |= dict(word.split("=", 1) for word in shlex.split(value) if "=" in word)
        elif key.strip() == "User":
            given["USER"] = value.strip()
    if not words:
        raise ValueError(f"{path}: no ExecStart in it, so that it starts nothing")
    return words, given


def flags(words: Sequence[str]) -> dict[str, str]:
    """``--name value`` and ``--name=value`` among words; "" for one without a value."""
    found: dict[str, str] = {}
    for place, word in enumerate(words):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            following = words[place + 1] if place + 1 < len(words) else "--"
            found[name] = value if equals else "" if following.startswith("--") else following
    return found


def surroundings(given: Mapping[str, str]) -> None:
    """Look where the unit's process will look: its folders for Flower and for the model, unless set here."""
    for name, value in given.items():
        if name in ("FLWR_HOME", "FEDLLM_CACHE", "HF_HOME"):
            os.environ.setdefault(name, value)


def node_config(text: str) -> dict[str, Any]:
    """A ``--node-config`` as Flower reads it.

    Raises:
        ValueError: it is none.
    """
    if bare := [word for word in shlex.split(text) if "=" not in word]:
        raise ValueError(f"--node-config: {bare[0]!r} is no key=value, and Flower passes over it")
    try:
        return parse_config_args([text]) if text.strip() else {}
    except SystemExit:  # it takes bad words for a command line's
        raise ValueError(f"--node-config {text!r} is not read by Flower: key=value, texts in quotes") from None


def address(text: str) -> tuple[str, int]:
    """Host and port.

    Raises:
        ValueError: one is missing.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r}: give HOST:PORT, such as fed.example.org:9093")
    return host.strip("[]"), int(port)
