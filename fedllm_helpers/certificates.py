"""``python -m fedllm_helpers.certificates``: the command of :mod:`fedllm_helpers.deployment.certificates`.

With a folder alone it says how many days each certificate in it has left, and its exit code is 1 where one ends soon.
"""

import argparse
import sys
from pathlib import Path

from fedllm_helpers.deployment import certificates
from fedllm_helpers.deployment.certificates import (
    AUTHORITY,
    AUTHORITY_KEY,
    FIVE_YEARS,
    LONGEST,
    SERVER,
    SERVER_KEY,
    SOON,
    YEAR,
)

MEDIUM = f"{AUTHORITY_KEY} belongs on a safe medium off the server: whoever has it can pose as the server"


def main() -> None:
    """Make certificates, renew the server's, or say how long they last; what is wrong is one line, and exit code 2."""
    parser = argparse.ArgumentParser(description="An authority and a server's certificate for one federation.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("hosts", nargs="*", help="names or addresses of the server; none: say how many days are left")
    parser.add_argument("--within", type=float, default=SOON, metavar="DAYS", help="exit with 1 where one ends by then")
    parser.add_argument("--days", type=int, default=YEAR, help=f"of the server's certificate, 1 to {LONGEST}")
    parser.add_argument("--authority-days", type=int, default=None, help=f"of the authority; {FIVE_YEARS} or --days")
    parser.add_argument("--throw-away", action="store_true", help=f"keep no {AUTHORITY_KEY}: it can never be renewed")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--renew", action="store_true", help="a new certificate by the same authority: hospitals go on")
    how.add_argument("--replace", action="store_true", help="all anew: hospitals need the new ca.crt")
    parser.add_argument("--authority", type=Path, metavar="FOLDER", help=f"with --renew: where {AUTHORITY_KEY} is")
    given = parser.parse_args()
    for name, days in (("--days", given.days), ("--authority-days", given.authority_days)):
        if days is not None and days < 0:
            parser.error(f"{name} {days}: allowed are 1 to {LONGEST}")
    if given.authority and not given.renew:
        parser.error("--authority names the folder of a key to renew with: it goes with --renew")
    if given.renew and (given.throw_away or given.authority_days is not None):
        parser.error("--renew keeps the authority as it is: it goes without --throw-away and --authority-days")
    try:
        if not (given.hosts or given.renew or given.replace):
            sys.exit(_left(given.folder, given.within))
        print(_renewed(given) if given.renew else _made(given))
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _left(folder: Path, within: float) -> int:
    """Print a line for each certificate of a party's folder; 1 where one ends within so many days, else 0."""
    found = {path: certificates.days_left(path) for name in (AUTHORITY, SERVER) if (path := folder / name).is_file()}
    if not found:
        raise ValueError(
            f"{folder} has no {AUTHORITY} and no {SERVER}: name the folder of a party, or hosts to make them"
        )
    for path, left in found.items():
        how = "to all hospitals, by --replace" if path.name == AUTHORITY else "by --renew"
        said = f"{left:.0f} days left" if left > 0 else f"ended {-left:.0f} days ago"
        print(f"{path}: {said}{f', time for a new one ({how})' if left <= max(within, 0) else ''}", flush=True)
    return int(min(found.values()) <= within)


def _made(given: argparse.Namespace) -> str:
    span = max(FIVE_YEARS, given.days) if given.authority_days is None else given.authority_days
    hosts, keep = tuple(given.hosts), not given.throw_away
    folder = certificates.make_server(given.folder, hosts, given.days, given.replace, span, keep)
    said = f"made in {folder}: {AUTHORITY}, {SERVER}, {SERVER_KEY}"
    return f"{said}, {AUTHORITY_KEY}\n{MEDIUM}" if keep else said


def _renewed(given: argparse.Namespace) -> str:
    folder = certificates.renew(given.folder, tuple(given.hosts), given.days, given.authority)
    left, authority = (certificates.days_left(folder / name) for name in (SERVER, AUTHORITY))
    said = (
        f"renewed in {folder}: {SERVER}, {SERVER_KEY}, for {left:.0f} days; restart the server and reload its gateway"
    )
    if authority - left < 1:
        said += f"\n{AUTHORITY} ends on the same day: before it does, all need a new one (--replace)"
    return said


if __name__ == "__main__":
    main()
