"""Three machines that become a federation by docs/project.md alone: its commands, as they stand there."""

import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pandas as pd
from machines import NAME, ROOT, SERVER, Lines, Machine

from fedllm_helpers import config
from fedllm_helpers.federation import client_app
from fedllm_helpers.models import embedded

HOSPITALS = 2
SETTINGS = (
    f"federation.num_clients={HOSPITALS} federation.num_rounds=2 federation.threads=1 federation.evaluate_every=0 "
    "federation.training_arguments.max_steps=2 dataset.max_cards_per_specialty=60"
)
RUNS = "/var/lib/fedllm/runs"
TOML = '[superlink.trial]\naddress = "127.0.0.1:8000"\nroot-certificates = "/etc/fedllm/ca.crt"\n'
PREPARED = "cd /opt/clone; export PATH=/opt/fedllm/bin:$PATH FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1\n"


def commands(sign: str) -> list[str]:
    """The commands of that shell block of docs/project.md in which ``sign`` stands, one by one."""
    text = (ROOT / "docs" / "project.md").read_text(encoding="utf-8")
    (block,) = [block for block in re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S) if sign in block]
    found, lines = [], []
    for line in block.splitlines():
        if not lines and line.lstrip().startswith("#") or not line.strip():
            continue
        lines.append(line)
        whole = "\n".join(lines)
        if not whole.endswith("\\") and re.sub(r"\s#.*", "", whole).count("'") % 2 == 0:
            found.append(whole)
            lines = []
    assert not lines, lines
    return found


class Federation:
    """A server and its hospitals, on lines.

    Attributes:
        steps: what was typed: machine, command, seconds.
    """

    def __init__(self, lines: Lines, server: Machine, hospitals: list[Machine]) -> None:
        self.lines, self.server, self.hospitals = lines, server, hospitals
        self.steps: list[tuple[str, str, float]] = []

    def types(self, machine: Machine, command: str) -> str:
        """Run a command as somebody types it there."""
        begin = time.perf_counter()
        said = machine.does(PREPARED + command)
        self.steps.append((machine.name, command, time.perf_counter() - begin))
        return said

    def founds(self) -> None:
        """Everything up to hospitals that are online."""
        self.server.write("/media/safe/.here", "")
        self._brings_model(self.server)
        for command in commands("certificates /etc/fedllm fed.example.org"):
            self.types(self.server, command)
        self.server.does(f"mkdir -p ~/.flwr\ncat > ~/.flwr/config.toml <<'END'\n{TOML}END")
        for place, machine in enumerate(self.hospitals):
            self._joins(machine, place)
        register, wait, *_ = commands("flwr supernode register")
        for place, machine in enumerate(self.hospitals):
            public = machine.path("/etc/fedllm/node.pub").read_text(encoding="utf-8")
            self.server.write(f"/media/hospital-{place}.pub", public)
            named = register.replace("hospital-0.pub", f"/media/hospital-{place}.pub")
            self.types(self.server, named)
        self.online(wait)

    def _brings_model(self, machine: Machine) -> None:
        cache = machine.path("/var/lib/fedllm/cache/smollm2-135m")
        shutil.copytree(embedded.fetch(), cache)
        machine.path("/var/lib/fedllm").chmod(0o755)

    def _joins(self, machine: Machine, place: int) -> None:
        """What a hospital does, after docs/project.md; what it is to change there is changed as it says."""
        cfg = config.load("cpu", *SETTINGS.split())
        for name, cards in zip(("train", "test"), client_app.own_cards(cfg, place), strict=True):
            lines = "".join(json.dumps(card) + "\n" for card in cards)
            machine.write(f"/srv/fedllm/cards/{name}.jsonl", lines)
        self._brings_model(machine)
        for command in commands("ssh-keygen"):
            if command.startswith("systemctl edit"):
                change = f"sed -i -e s/partition-id=0/partition-id={place}/ -e s/192.0.2.10/{SERVER}/"
                command = f"SYSTEMD_EDITOR='{change}' script -qec 'systemctl edit --full fedllm-hospital' /dev/null"
            self.types(machine, command)
            if "install -d /etc/fedllm" in command:
                shutil.copy(self.server.path("/etc/fedllm/ca.crt"), machine.path("/etc/fedllm/ca.crt"))
            if "--new" in command:
                machine.does("sed -i 's|^ledger: .*|ledger: /var/lib/fedllm/ledger|' /etc/fedllm/policy.yaml")

    def online(self, command: str = "flwr supernode list trial", seconds: float = 120) -> None:
        """Wait until the server lists every hospital as online."""
        end, begin = time.monotonic() + seconds, time.perf_counter()
        while (said := self.server.does(PREPARED + f"COLUMNS=200 {command}", check=False)).count("online") < HOSPITALS:
            assert time.monotonic() < end, said + self.journals()
            time.sleep(1)
        self.steps.append((self.server.name, command, time.perf_counter() - begin))

    def journals(self, lines: int = 30) -> str:
        """The last lines of each service."""
        units = {self.server: "fedllm-server"} | dict.fromkeys(self.hospitals, "fedllm-hospital")
        return "\n".join(one.does(f"journalctl -n {lines} -o cat -u {unit}") for one, unit in units.items())

    def begins(self, name: str, *overrides: str) -> subprocess.Popen:
        """Start a run, as the documents say, on the CPU; its log goes to the process."""
        own = " ".join([SETTINGS, *overrides])
        command = f'flwr run . trial --stream -c \'preset="cpu" overrides="{own}" folder="{RUNS}/{name}"\''
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": "/"}
        return subprocess.Popen(self.server.command(PREPARED + f"COLUMNS=200 PYTHONUNBUFFERED=1 {command}"), **pipes)

    def run(self, name: str, *overrides: str) -> str:
        """A run to its end: what it said."""
        return self.begins(name, *overrides).communicate(timeout=1200)[0]

    def adapter(self, name: str) -> str:
        """A digest of the adapter that a run made."""
        return self.server.does(f"sha256sum {RUNS}/{name}/adapter/adapter_model.safetensors").split()[0]

    def status(self) -> list[str]:
        """How each run ended, the latest first."""
        told = self.server.does(PREPARED + "flwr list trial --format json 2>/dev/null")
        return [run["status"] for run in json.loads(told[told.index("{") :])["runs"]]

    def tables(self, name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
        """History and clients of a run."""
        folder = self.server.path(f"{RUNS}/{name}")
        return pd.read_csv(folder / "history.csv"), pd.read_csv(folder / "clients.csv")


@contextmanager
def machines() -> Iterator[Federation]:
    """A server and hospitals as they come: with this environment installed, and nothing else done."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="machines-")))
        lines = stack.enter_context(Lines(folder.name[-6:]))
        made = []
        numbers = {"server": int(SERVER.rpartition(".")[2])} | {f"h{k}": 20 + k for k in range(HOSPITALS)}
        for name, number in numbers.items():
            machine = stack.enter_context(Machine(name, folder, lines.add(name, number)))
            machine.boot()
            assert NAME in machine.does("cat /etc/hosts")
            made.append(machine)
        yield Federation(lines, made[0], made[1:])
