"""``python -m fedllm_helpers.site``: is this machine ready, what did a run do, and what stands in the audit log?

At a hospital ``check --unit /etc/systemd/system/fedllm-hospital.service``, or with the flags of ``flower-supernode`` as
they stand in it; at the server ``check --server --unit …``: a line for each thing, and exit code 1 where one says
FAULT. Run it as the user of the service. Nothing is sent, and nothing is fetched. ``report FOLDER`` writes a run, or
what a hospital's node wrote at home, into one HTML file; ``card FOLDER`` a model card beside the adapter; ``log FILE``
shows an audit log and whether it is whole.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedllm_helpers import config
from fedllm_helpers.privacy import audit_log
from fedllm_helpers.site import hospital, reading, server
from fedllm_helpers.site.findings import FAULT, look


def main(words: Sequence[str] | None = None) -> None:
    """Do what the words say; exits with 1 where something stands in the way, and with 2 for wrong words or files."""
    parser = argparse.ArgumentParser(prog="python -m fedllm_helpers.site", description=__doc__.split("\n", 1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="is this machine ready?")
    _add_flags(check)
    report = commands.add_parser("report", help="a run in one HTML file")
    report.add_argument("folder", type=Path, help="of a run, or what a node has as report=FOLDER")
    report.add_argument("--to", type=Path, help="the file; report.html in the folder, if not given")
    commands.add_parser("card", help="a model card beside the adapter").add_argument("folder", type=Path)
    commands.add_parser("log", help="an audit log, and whether it is whole").add_argument("file", type=Path)
    given = parser.parse_args(words)
    try:
        {"check": _check, "report": _report, "card": _card, "log": _log}[given.command](given)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _add_flags(check: argparse.ArgumentParser) -> None:
    check.add_argument("--server", action="store_true", help="this is the server, not a hospital")
    check.add_argument("--unit", type=Path, help="systemd unit that has the flags")
    check.add_argument("--gateway", default="", metavar="HOST:PORT", help="at the server: where hospitals come in")
    check.add_argument("--preset", default="gpu", help="of the run that is planned")
    check.add_argument("--overrides", default="", help="of its settings, apart by spaces, as for flwr run")
    check.add_argument("--no-step", action="store_true", help="train no step: faster, and the model is not loaded")
    for flag in (*hospital.FLAGS, *server.FLAGS, "--host", "--port"):
        check.add_argument(flag, help=argparse.SUPPRESS)
    for flag in ("--enable-supernode-auth", "--insecure"):
        check.add_argument(flag, action="store_true", help=argparse.SUPPRESS)


def _check(given: argparse.Namespace) -> None:
    cfg, flags = config.load(given.preset, *given.overrides.split()), _flags(given)
    if given.server:
        parts = server.of_server(flags, cfg, given.gateway)
    else:
        parts = hospital.of_hospital(flags, cfg, not given.no_step)
    faults = 0
    for finding in look(parts):
        print(finding, flush=True)
        faults += finding.state == FAULT
    said = "ready" if not faults else f"{faults} {'thing stands' if faults == 1 else 'things stand'} in the way"
    print(f"{'server' if given.server else 'hospital'}: {said}")
    sys.exit(1 if faults else 0)


def _report(given: argparse.Namespace) -> None:
    from fedllm_helpers.site import report  # imports matplotlib

    print(report.write(given.folder, given.to))


def _card(given: argparse.Namespace) -> None:
    from fedllm_helpers.site import card

    print(card.write(given.folder))


def _log(given: argparse.Namespace) -> None:
    for entry in audit_log.check(given.file):
        shown = {name: value[:12] if len(str(value)) == 64 else value for name, value in entry.items()}
        print("  ".join(f"{name}={value}" for name, value in shown.items() if name != "before"))
    print("whole: no line was changed, and none is missing before the last")


def _flags(given: argparse.Namespace) -> dict[str, str]:
    """The flags of the party's Flower command: of the unit, and those given here in place of them."""
    found: dict[str, str] = {}
    if given.unit:
        words, around = reading.unit(given.unit)
        reading.surroundings(around)
        found = reading.flags(words)
    names = (*hospital.FLAGS, *server.FLAGS, "--host", "--port", "--enable-supernode-auth", "--insecure")
    values = {name: getattr(given, name.strip("-").replace("-", "_")) for name in names}
    return found | {
        name: "" if value is True else value for name, value in values.items() if value not in (None, False)
    }
