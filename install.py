"""Install what the project needs into this Python's environment, as the Makefile does.

``python install.py WHAT … -- OPTIONS``, such as ``install.py -e '.[lab]' --``; the options are pip's. uv, which Flower
brings along, takes less than a third of pip's time. It reads none of pip's settings, so they are handed on, with the
options. Where there is one that uv does not know, or where it fails, pip installs.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

UV = "uv>=0.13.5,<0.14"  # as Flower 1.42 asks: another one would replace itself
PIP = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile"]
EFFECTIVE = """
import json, sys
from pip._internal.commands import create_command
command = create_command("install")
options = vars(command.parser.parse_args(sys.argv[1:])[0])
kinds = options.pop("format_control")
options |= {"no_binary": sorted(kinds.no_binary), "only_binary": sorted(kinds.only_binary)}
options |= {"no_cache": options["cache_dir"] is False, "timeout": round(options["timeout"])}
changed = {name: value for name, value in options.items() if value and value != command.parser.defaults.get(name)}
print(json.dumps(changed, default=str))
"""  # pip's own reading of its files, variables and options; nothing public tells which of them counts
VARIABLES = {  # of uv, and what stands between values; words of a command would be seen by every user of the machine
    "index_url": ("UV_DEFAULT_INDEX", ""),
    "extra_index_urls": ("UV_INDEX", " "),
    "find_links": ("UV_FIND_LINKS", ","),
    "constraints": ("UV_CONSTRAINT", " "),
    "trusted_hosts": ("UV_INSECURE_HOST", " "),
    "timeout": ("UV_HTTP_TIMEOUT", ""),
    "cache_dir": ("UV_CACHE_DIR", ""),
    "cert": ("SSL_CERT_FILE", ""),
    "client_cert": ("SSL_CLIENT_CERT", ""),
}
SWITCHES = {"no_index": "--no-index", "pre": "--pre", "require_hashes": "--require-hashes", "no_cache": "--no-cache"}
VALUES = {"no_binary": "--no-binary", "only_binary": "--only-binary", "target_dir": "--target"}
ELSEWHERE = {"editables", "proxy"}  # they stand among the words, and are handed on below
NO_MATTER = {"verbose", "quiet", "disable_pip_version_check", "no_input", "no_color", "progress_bar", "log", "retries"}
NO_MATTER |= {"require_venv", "root_user_action", "compile", "warn_script_location"}
KNOWN = {*VARIABLES, *SWITCHES, *VALUES, *ELSEWHERE, *NO_MATTER}


def main(words: list[str]) -> int:
    """Install the words before ``--`` with the options after it; returns 0, or the exit status of pip."""
    end = words.index("--") if "--" in words else len(words)
    wanted, options = words[:end], words[end + 1 :]
    read = subprocess.run([sys.executable, "-c", EFFECTIVE, *options, *wanted], capture_output=True, text=True)
    settings = json.loads(read.stdout) if read.returncode == 0 else {"pip": "reads them in another way"}
    if settings.keys() <= KNOWN:
        there = find_spec("uv") or subprocess.run([*PIP, *options, UV]).returncode == 0
        command, environment = with_uv(settings)
        if there and subprocess.run([*command, *wanted], env=environment).returncode == 0:
            return 0
        print("uv cannot install this: pip tries, and takes some minutes", file=sys.stderr)
    return subprocess.run([*PIP, *options, *wanted]).returncode


def with_uv(settings: dict) -> tuple[list[str], dict[str, str]]:
    """uv's command and environment for settings of pip. What uv is told by variables of its own stays as it is."""
    many = {name: value if isinstance(value, list) else [str(value)] for name, value in settings.items()}
    told = {"UV_INDEX_STRATEGY": "unsafe-best-match"}  # pip's: the best of all indexes, not of the first that has any
    told |= {variable: between.join(many[name]) for name, (variable, between) in VARIABLES.items() if name in many}
    command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", sys.executable]
    command += [switch for name, switch in SWITCHES.items() if name in settings]
    command += [f"{option}={value}" for name, option in VALUES.items() for value in many.get(name, [])]
    proxy = {name: settings["proxy"] for name in ("HTTP_PROXY", "HTTPS_PROXY") if "proxy" in settings}
    return command, told | os.environ | proxy


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
