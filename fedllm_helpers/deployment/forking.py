"""The process of a party that has imported everything, and forks itself for each message. :mod:`warm` starts it.

A child does what Flower's ``flwr-clientapp`` does: it alone sees the message, the cards and the keys. At the server it
does what ``flwr-serverapp`` does, for a run. What it tells at its end is which base model it used; that is loaded here,
too, and children from then on have it by copy-on-write. On a GPU they cannot: CUDA does not survive a fork, so nothing
of it is begun here.
"""

import contextlib
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from fedllm_helpers.deployment import same_code, warm

POLL = "FLWR_SUPEREXEC_TASK_POLL_INTERVAL"  # Flower's own setting, in seconds
ONLY_HERE = {  # while this process imports and loads; children have the environment as it came
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # whether there is a GPU is asked without CUDA
    "TOKENIZERS_PARALLELISM": "false",  # a pool of threads would not come along
}
MOST = 65536  # bytes that a pipe holds, so that no child waits for a reader
PROCESS = "fedllm_helpers.models.process"
CLIENT_APP, SERVER_APP = "flwr-clientapp", "flwr-serverapp"  # Flower's commands
NEEDED = {  # the module that has the command, and the app
    CLIENT_APP: ("flwr.supernode.cli.flwr_clientapp", "fedllm_helpers.federation.client_app"),
    SERVER_APP: ("flwr.superlink.cli.flwr_serverapp", "fedllm_helpers.federation.server_app"),
}
WITH_A_GPU = (  # without PEFT: its bitsandbytes begins CUDA when it is imported
    "datasets",
    "transformers.modeling_utils",
    "transformers.trainer_pt_utils",
)
USED = (PROCESS, "fedllm_helpers.models.editing", "fedllm_helpers.evaluation.scoring", "fedllm_helpers.data.loading")
TRAINING = (  # by a hospital's messages
    "fedllm_helpers.training.fine_tuning",
    "fedllm_helpers.training.guarantees",
    "fedllm_helpers.training.batches",
)


@dataclass
class Ready:
    """What children find: modules, and perhaps a model; and what would tell that one of them is no longer the same."""

    kept: same_code.Kept
    code: same_code.State
    gpu: bool
    fresh: dict = field(default_factory=dict)  # of a new process: threads, torch's dice, environment
    model: str = ""  # the settings of the base model that is loaded here
    files: same_code.State = ()
    told: dict[int, int] = field(default_factory=dict)  # by child, this end of its pipe


def prepared(task: str = CLIENT_APP) -> Ready:
    """Import what messages need, with one thread: of a pool of threads, a child would have none and wait for ever."""
    package = Path(__file__).parents[1]
    known, code = same_code.digest(package), same_code.state(same_code.brought(package))
    before = {name: os.environ.get(name) for name in ONLY_HERE}
    os.environ.update(ONLY_HERE)
    import torch

    fresh = {"threads": torch.get_num_threads(), "dice": torch.get_rng_state(), "environment": before}
    torch.set_num_threads(1)
    gpu = torch.cuda.is_available()
    training = TRAINING if task == CLIENT_APP else ()
    for name in (*NEEDED[task], *(WITH_A_GPU if gpu else (*USED, *training))):
        import_module(name)
    if gpu:
        warm.say("there is a GPU: imports are kept ready, the model is not, for CUDA does not survive a fork")
    if torch.cuda.is_initialized():
        raise RuntimeError("an import has begun CUDA, which does not survive a fork")
    if same_code.state(same_code.brought(package)) != code:
        raise RuntimeError("the package was changed while it was imported")
    kept = same_code.Kept(known)
    return Ready(kept, same_code.state(same_code.imported()), gpu, fresh)


def serve(ready: Ready, task: str, address: str, parent: str, trust: list[str]) -> list[str]:
    """Take messages for ever, and return in each child, with the command that answers its message."""
    from flwr.proto.runtime_pb2 import AcquireTaskRequest
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
    from flwr.supercore.retry import make_simple_http_retry_invoker
    from flwr.supercore.runtime import RuntimeHttpClient
    from flwr.supercore.tls import validate_and_resolve_root_certificates

    insecure, authority = "--insecure" in trust, trust[1] if len(trust) == 2 else None
    client = RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=insecure,
        root_certificates=validate_and_resolve_root_certificates(authority, insecure),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec")],
        retry_invoker=make_simple_http_retry_invoker(),
    )
    wanted, pause = AcquireTaskRequest(supported_task_types=[task]), float(os.environ.get(POLL, 1.0))
    while True:
        reap(ready)
        given = client.AcquireTask(wanted)
        if given.HasField("task") and given.token:
            command = [task, "--runtime-api-address", address, "--token", given.token, *trust, "--parent-pid", parent]
            check(ready, command)
            if begun(ready):
                return command
        time.sleep(pause)


def check(ready: Ready, command: list[str]) -> None:
    """Let go of a model whose files changed; where code did, begin anew, and leave this one message to a cold start."""
    if same_code.state([Path(name) for name, *_ in ready.code]) != ready.code:
        warm.say("code on this machine has changed since it was imported: it is imported anew")
        _environment_as_it_came(ready)
        subprocess.Popen(command)
        os.execv(sys.executable, sys.orig_argv)
    if ready.model and _files(ready.model) != ready.files:
        warm.say("the base model's files have changed since they were loaded: they are loaded anew")
        _let_go(ready)


def begun(ready: Ready) -> bool:
    """Fork; True in the child, which is as a new process would be, but for what is imported and loaded."""
    here, there = os.pipe()
    gc.freeze()  # a child's collector would write on, and so copy, every page
    child = os.fork()
    if child:
        os.close(there)
        os.set_blocking(here, False)  # what a child has started may hold its end of the pipe
        ready.told[child] = here
        return False
    os.close(here)
    ready.fresh["pipe"] = there
    _environment_as_it_came(ready)
    import random

    import numpy as np
    import torch

    random.seed(), np.random.seed()  # of the system: no two children throw the same dice
    torch.set_rng_state(ready.fresh["dice"])
    torch.set_num_threads(ready.fresh["threads"])
    return True


def _environment_as_it_came(ready: Ready) -> None:
    for name, value in ready.fresh["environment"].items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def answer(ready: Ready, command: list[str]) -> int:
    """Flower's own command, in this process; then tell which model it used. Returns the exit status."""
    sys.argv, code = command, 1
    run = getattr(import_module(NEEDED[command[0]][0]), command[0].replace("-", "_"))
    ready.kept.put_aside()
    try:
        with _unheard() if command[0] == SERVER_APP else contextlib.nullcontext():
            run()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    if not ready.kept.used:
        warm.say("the run brought other code than what is installed here: it was imported anew")
    process = sys.modules.get(PROCESS)
    if ready.kept.used and process is not None:
        with contextlib.suppress(OSError):
            os.write(ready.fresh["pipe"], json.dumps(process.held()).encode())
    return code


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Write nothing to the log of the SuperLink, as where Flower starts a run: it has a log of its own."""
    with contextlib.ExitStack() as after:
        for stream in (1, 2):
            after.callback(os.dup2, os.dup(stream), stream)
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        yield


def reap(ready: Ready) -> None:
    """Take note of children that have ended, and load the model that the last of them used, if it is not here."""
    with contextlib.suppress(ChildProcessError):  # there is none
        while (child := os.waitpid(-1, os.WNOHANG)[0]) > 0:
            text, device = _said(ready.told.pop(child, None))
            if device == "cpu" and text != ready.model and not ready.gpu:
                _load(ready, text)


def _said(pipe: int | None) -> tuple[str, str]:
    """What a child has said at its end; nothing where it was killed, or is none of those that tell."""
    if pipe is None:
        return "", ""
    try:
        text, device = json.loads(os.read(pipe, MOST))
    except (OSError, ValueError):
        return "", ""
    finally:
        os.close(pipe)
    return text, device


def _load(ready: Ready, text: str) -> None:
    process, files = sys.modules[PROCESS], _files(text)
    _let_go(ready)
    try:
        process.hold(text)
    except Exception as error:  # of whatever kind: the messages' own processes load it and say what is wrong
        warm.say(f"the base model is not kept ready: {error}")
        return
    if _files(text) == files:
        ready.model, ready.files = text, files
    else:  # it is just being written
        _let_go(ready)


def _let_go(ready: Ready) -> None:
    ready.model, ready.files = "", ()
    sys.modules[PROCESS].let_go()
    gc.unfreeze()
    gc.collect()


def _files(text: str) -> same_code.State:
    return same_code.state(sys.modules[PROCESS].files(text))


def main() -> None:
    """``python -P -m … TASK ADDRESS PARENT STARTER TRUST``: whose process PARENT is, and whose this is."""
    task, address, parent, starter, *trust = sys.argv[1:]
    warm.end_with(int(starter))
    try:
        ready = prepared(task)
    except Exception as error:  # of whatever kind: whoever started this goes on without it
        warm.say(f"nothing can be kept ready: {error}")
        sys.exit(1)
    command = serve(ready, task, address, parent, trust)
    code = answer(ready, command)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)  # nothing here is worth taking apart piece by piece


if __name__ == "__main__":
    main()
