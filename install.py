"""Install what the project needs into this Python's environment: ``python install.py '.[lab]'``, as the Makefile does.

uv, which Flower brings along, takes a fifth of pip's time. It reads none of pip's settings, so they are handed on; and
where it fails, pip has a try.
"""

import ast
import os
import subprocess
import sys
from importlib.util import find_spec

UV = "uv>=0.13.5,<0.14"  # as Flower 1.42 asks: another one would replace itself
SHARED = ("constraint", "no-binary", "no-index", "only-binary", "pre", "require-hashes", "trusted-host")  # by both
VARIABLES = {  # of uv, for what may hold a password: the words of a command are seen by every user of a machine
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "proxy": "ALL_PROXY",
    "cert": "SSL_CERT_FILE",
}
PIP = [sys.executable, "-m", "pip"]


def main(wanted: list[str]) -> int:
    """Install ``wanted``, requirements and options that pip and uv share; returns 0, or the exit status of pip."""
    settings = pip_settings(subprocess.run([*PIP, "config", "list"], capture_output=True, text=True).stdout)
    given = {VARIABLES[name]: value for name, value in settings.items() if name in VARIABLES}
    if "find-links" in settings:
        given["UV_FIND_LINKS"] = ",".join(settings["find-links"].split())
    uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", sys.executable]
    uv += ["--index-strategy", "unsafe-best-match"]  # pip's: the best of all indexes, not of the first that has any
    there = find_spec("uv") or subprocess.run([*PIP, "install", "--quiet", "--no-compile", UV]).returncode == 0
    if there and subprocess.run([*uv, *shared(settings), *wanted], env=given | os.environ).returncode == 0:
        return 0
    print("uv cannot install this: pip tries, and takes some minutes", file=sys.stderr)
    return subprocess.run([*PIP, "install", "--quiet", "--no-compile", *wanted]).returncode


def pip_settings(listed: str) -> dict[str, str]:
    """What holds for ``pip install``, of the lines of ``pip config list``: global, then its own, then the variables."""
    found = {}
    pairs = [line.split("=", 1) for line in listed.splitlines() if "=" in line]
    for part in ("global.", "install.", ":env:."):
        found |= {name.removeprefix(part): ast.literal_eval(value) for name, value in pairs if name.startswith(part)}
    return found


def shared(settings: dict[str, str]) -> list[str]:
    """The settings that uv takes, as options: a switch where one is true, else an option for each of its values."""
    options = []
    for name in SHARED:
        value = settings.get(name, "")
        if value.lower() in ("1", "true", "yes", "on"):
            options.append(f"--{name}")
        elif value.lower() not in ("0", "false", "no", "off"):
            options += [f"--{name}={one}" for one in value.split()]
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
