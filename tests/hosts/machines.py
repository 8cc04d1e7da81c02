"""Machines for tests: this system booted again, several times, each with its own disk, network and systemd.

Each is a container of systemd-nspawn over an overlay of this machine's root, so that what it writes is gone with it. It
has its own ``/etc``, users, services and journal, and one network card, shaped to the rate of a line. Nothing of it
reaches beyond the network that :class:`Lines` makes.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from contextlib import ExitStack
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("systemd-nspawn", "systemctl", "nginx", "sudo", "ip", "tc", "nsenter", "setpriv", "script", "ssh-keygen")
SERVER, NAME, NETWORK = "192.0.2.10", "fed.example.org", "192.0.2.{}/24"  # the addresses of the documents
HIDDEN = ("/tmp", "/root", "/home", str(ROOT))  # of this machine, and none of theirs
CLEAN = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8", "TERM": "dumb"}


def lacking() -> str:
    """Why machines cannot be made here, or nothing."""
    if not sys.platform.startswith("linux") or os.geteuid():
        return "machines are made by root on Linux alone"
    missing = [name for name in PROGRAMS if shutil.which(name, path=CLEAN["PATH"]) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


def ran(*words: object) -> str:
    """The output of a command of this machine."""
    return subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True).stdout


class Lines:
    """A network of its own with a line to each machine; a line has a rate in each direction."""

    def __init__(self, mark: str) -> None:
        self.mark, self.names, self.stack = mark, [], ExitStack()

    def __enter__(self) -> "Lines":
        self._space("middle")
        ran("ip", "-n", f"{self.mark}middle", "link", "add", "middle", "type", "bridge")
        ran("ip", "-n", f"{self.mark}middle", "link", "set", "middle", "up")
        return self

    def __exit__(self, *exception: object) -> None:
        self.stack.close()

    def _space(self, name: str) -> None:
        ran("ip", "netns", "add", f"{self.mark}{name}")
        self.stack.callback(ran, "ip", "netns", "del", f"{self.mark}{name}")

    def add(self, name: str, number: int) -> str:
        """A line to a machine, whose address ends in a number; the path of its network."""
        self._space(name)
        space, middle = f"{self.mark}{name}", f"{self.mark}middle"
        ran("ip", "link", "add", "eth0", "netns", space, "type", "veth", "peer", "name", name, "netns", middle)
        ran("ip", "-n", middle, "link", "set", name, "master", "middle", "up")
        ran("ip", "-n", space, "address", "add", NETWORK.format(number), "dev", "eth0")
        for card in ("lo", "eth0"):
            ran("ip", "-n", space, "link", "set", card, "up")
        self.names.append(name)
        return f"/run/netns/{space}"

    def shape(self, name: str, megabits: float) -> None:
        """Give a line a rate, in 10⁶ bits a second, up and down."""
        burst = max(16_000, int(megabits * 1e6 / 8 / 100))  # bytes: a hundredth of a second
        for space, card in ((name, "eth0"), ("middle", name)):
            shape = ("tbf", "rate", f"{megabits}mbit", "burst", burst, "latency", "200ms")
            ran("tc", "-n", f"{self.mark}{space}", "qdisc", "replace", "dev", card, "root", *shape)

    def pull(self, name: str, *, out: bool) -> None:
        """Pull a machine's cable out, or put it in again."""
        ran("ip", "-n", f"{self.mark}middle", "link", "set", name, "down" if out else "up")

    def bytes(self, name: str) -> tuple[int, int]:
        """What has crossed a line so far: up and down, headers included."""
        found = json.loads(ran("ip", "-n", f"{self.mark}{name}", "-j", "-s", "link", "show", "eth0"))[0]["stats64"]
        return found["tx"]["bytes"], found["rx"]["bytes"]


class Machine:
    """One of them, on a line. It starts with :meth:`boot`, and goes with its ``with`` block.

    Args:
        name: of the machine and of its line.
        folder: where its disk lies.
        network: as :meth:`Lines.add` gave it.
    """

    def __init__(self, name: str, folder: Path, network: str) -> None:
        self.name, self.folder, self.network = name, folder / name, network
        self.root, self.process = self.folder / "root", None

    def __enter__(self) -> "Machine":
        for part in ("root", "upper", "work"):
            (self.folder / part).mkdir(parents=True)
        layers = f"lowerdir=/,upperdir={self.folder / 'upper'},workdir={self.folder / 'work'}"
        ran("mount", "-t", "overlay", "overlay", "-o", layers, self.root)
        self.write("/etc/hostname", f"{self.name}\n")
        self.write("/etc/hosts", f"127.0.0.1 localhost {self.name}\n{SERVER} {NAME}\n")
        self._install()
        return self

    def __exit__(self, *exception: object) -> None:
        self.cut_power()
        ran("umount", self.root)
        shutil.rmtree(self.folder)

    def path(self, path: str) -> Path:
        """A path of this machine, as seen from outside."""
        return self.root / path.lstrip("/")

    def write(self, path: str, text: str) -> None:
        """Write a file, as its people do by hand."""
        self.path(path).parent.mkdir(parents=True, exist_ok=True)
        self.path(path).write_text(text, encoding="utf-8")

    def _install(self) -> None:
        """``/opt/fedllm`` as after pip, from this environment's packages and this clone; the Python is in ``/opt``."""
        home = Path("/opt/fedllm")
        packages = home / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages" / "here.pth"
        self.write(str(packages), "/opt/packages\n/opt/clone\n")
        self.write(str(home / "pyvenv.cfg"), "home = /opt/python/bin\ninclude-system-site-packages = false\n")
        self.write("/etc/ld.so.conf.d/python.conf", "/opt/python/lib\n")
        bin_ = self.path(str(home / "bin"))
        bin_.mkdir()
        (bin_ / "python").symlink_to(f"/opt/python/bin/{Path(sys.executable).resolve().name}")
        for script in Path(sys.executable).parent.glob("fl*w*r*"):
            text = script.read_text(encoding="utf-8")
            (bin_ / script.name).write_text(re.sub(r"^#!.*", f"#!{home}/bin/python", text), encoding="utf-8")
            (bin_ / script.name).chmod(0o755)

    def boot(self) -> None:
        """Switch it on, and wait until systemd has started what is enabled."""
        shown = {sys.base_prefix: "/opt/python", sysconfig.get_path("purelib"): "/opt/packages", ROOT: "/opt/clone"}
        command = ["setpriv", "--pdeathsig", "KILL", "systemd-nspawn", "--quiet", "--register=no", "--keep-unit"]
        command += [f"--machine={self.name}", f"--directory={self.root}", f"--network-namespace-path={self.network}"]
        command += [f"--bind-ro={here}:{there}" for here, there in shown.items()]
        command += [f"--tmpfs={path}:mode=0755" for path in HIDDEN] + ["--boot", "systemd.unit=multi-user.target"]
        log = (self.folder / "console").open("ab")
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        end = time.monotonic() + 60
        while "active" not in self.does("systemctl is-active multi-user.target", check=False).split():
            assert self.process.poll() is None and time.monotonic() < end, (self.folder / "console").read_text()[-2000:]
            time.sleep(0.2)
        self.does("ldconfig")

    def cut_power(self) -> None:
        """Off at once: nothing is written, and nobody is told."""
        if self.process is not None:
            for child in psutil.Process(self.process.pid).children():
                child.kill()
            self.process.kill()
            self.process.wait()
            self.process = None

    def command(self, script: str) -> list[str]:
        """What runs a script as root on the machine, from outside."""
        inner = [child.pid for child in psutil.Process(self.process.pid).children()][:1] or [0]
        enter = ["nsenter", f"--target={inner[0]}", "-m", "-u", "-i", "-n", "-p", "--root"]
        return [*enter, "env", "-i", "-C", "/", *(f"{k}={v}" for k, v in CLEAN.items()), "bash", "-ec", script]

    def does(self, script: str, *, check: bool = True, seconds: float = 600) -> str:
        """What a script that root runs on the machine says, errors included."""
        done = subprocess.run(self.command(script), capture_output=True, text=True, timeout=seconds, cwd="/")
        assert not check or done.returncode == 0, f"{self.name}: {script}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr


def main() -> None:
    """Run Python with these arguments where mounts and networks end with it; or say in one line why not."""
    if why := lacking():
        print(why)
        return
    os.execvp("unshare", ["unshare", "--mount", "--propagation", "private", sys.executable, *sys.argv[1:]])


if __name__ == "__main__":
    main()
