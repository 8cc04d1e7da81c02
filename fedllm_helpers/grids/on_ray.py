"""Flower's own simulation of two apps, on Ray: clients in several processes, each with its own of everything."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp


def run_apps(
    server: Callable[[Grid, Context], None],
    client: Callable[[Message, Context], Message],
    num_clients: int,
    run_config: dict[str, Any],
    actors: int = 2,
    gpu: bool = False,
) -> Context:
    """Run two Flower apps on Ray.

    Args:
        server: a ServerApp, or anything called like one.
        client: a ClientApp of a module, or anything called like one.
        num_clients: nodes.
        run_config: what both find in ``context.run_config``.
        actors: processes that answer at the same time.
        gpu: whether they share the GPU.

    Returns:
        The server's context, with whatever it left in ``context.state``.

    Raises:
        ModuleNotFoundError: Ray is not installed.
    """
    if find_spec("ray") is None:
        raise ModuleNotFoundError("backend='ray' needs the extra: pip install 'fedllm-helpers[sim]'")
    from flwr.simulation import run_simulation  # imports much that other grids do not need

    kept: list[Context] = []
    whole = ServerApp()

    @whole.main()
    def main(grid: Grid, context: Context) -> None:
        """The server with these settings; what it leaves in its context is kept."""
        context.run_config = run_config
        server(grid, context)
        kept.append(context)

    share = int(1e4 / actors) / 1e4 if gpu else 0  # Ray rounds to four digits, and a last actor must still fit
    resources = {
        "client_resources": {"num_cpus": 1, "num_gpus": share},
        "init_args": {"num_cpus": actors, "include_dashboard": False, "log_to_driver": False},
    }
    run_simulation(whole, partial(_with_run_config, client, run_config), num_clients, backend_config=resources)
    return kept[0]


def _with_run_config(
    client: Callable[[Message, Context], Message], given: dict[str, Any], message: Message, context: Context
) -> Message:
    """Flower refuses a client's context that comes back with other settings: the client gets one of its own."""
    names = context.node_config | {"simulated": True}
    return client(message, Context(context.run_id, context.node_id, names, context.state, given))
