"""Whether a party's process answers: ``python -P -m fedllm_helpers.deployment.health HOST:PORT``; exit code 0 or 1.

The address is that of ``--health-server-address``; with ``--authority ca.crt`` it is the gateway's, which is asked for
a certificate that holds. A process that answers is alive; whether hospitals are in, ``flwr supernode list`` says.
"""

import argparse
import socket
import ssl
import sys
from collections.abc import Sequence


def alive(address: str, seconds: float = 5.0) -> bool:
    """Whether a SuperLink or SuperNode serves Flower's health check at an address, HOST:PORT."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(address) as channel:
        try:
            said = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=seconds)
        except grpc.RpcError:
            return False
    return said.status == health_pb2.HealthCheckResponse.SERVING


def holds(address: str, authority: str, seconds: float = 5.0) -> bool:
    """Whether a TLS server at an address shows a certificate by an authority for that host."""
    host, _, port = address.rpartition(":")
    try:
        context = ssl.create_default_context(cafile=authority)
        with (
            socket.create_connection((host.strip("[]"), int(port)), timeout=seconds) as reached,
            context.wrap_socket(reached, server_hostname=host.strip("[]")),
        ):
            return True
    except (OSError, ValueError):
        return False


def main(words: Sequence[str] | None = None) -> None:
    """Exits with 0 where the process answers, with 1 and a line where it does not."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("address", metavar="HOST:PORT")
    parser.add_argument("--authority", metavar="FILE", help="ca.crt, for a TLS server such as the gateway")
    given = parser.parse_args(words)
    if not (holds(given.address, given.authority) if given.authority else alive(given.address)):
        sys.exit(f"{given.address}: no answer that holds")


if __name__ == "__main__":
    main()
