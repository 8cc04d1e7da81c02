"""What folders hold before processes start: a hospital's its own cards and key, the server's its certificate."""

import json
from pathlib import Path

from omegaconf import DictConfig

from fedllm_helpers import data, folders
from fedllm_helpers.deployment import certificates
from fedllm_helpers.federation import client_app


def cards(cfg: DictConfig, home: Path, hospital: int, keep: bool) -> dict[Path, str]:
    """The files of cards that a hospital lacks, with what goes into them; those that are there are checked.

    Args:
        cfg: who holds which cards.
        home: the hospital's folder.
        hospital: from 0.
        keep: use what is there, whatever ``cfg`` would give.

    Raises:
        ValueError: there are others, or damaged ones.
    """
    missing = {}
    for name, own in zip(("train", "test"), client_app.own_cards(cfg, hospital), strict=True):
        text = "".join(json.dumps(card, ensure_ascii=False) + "\n" for card in own)
        file = home / "data" / f"{name}.jsonl"
        held = file.read_bytes() if file.exists() else None
        if held is None and text:
            missing[file] = text
        elif held is not None and keep:
            data.load_flashcards(str(file))
        elif (held or b"") != text.encode():
            what = "cut or damaged cards" if held and text.encode().startswith(held) else "other cards"
            said = f"{file} holds {what}, not those that these settings give"
            raise ValueError(f"{said}: name another folder, or start with keep_cards=True to use them as they are")
    return missing


def prepare(missing: dict[Path, dict[Path, str]]) -> None:
    """Make hospitals' folders, a key for those that have none, and the files of :func:`cards`."""
    for home, files in missing.items():
        (home / "data").mkdir(parents=True, exist_ok=True)
        if not (home / "key").exists():
            certificates.make_node_key(home / "key")
            home.chmod(0o700)
        for file, text in files.items():
            folders.write(file, text)


def prepare_server(home: Path, hosts: tuple[str, ...]) -> None:
    """Make the server's folder and its certificate for names of this machine, if there is none; see that it is valid.

    Raises:
        ValueError: it has expired.
    """
    if not (home / certificates.SERVER).exists():
        certificates.make_server(home, hosts)
        home.chmod(0o700)
    certificates.check(home)
