"""What ends a run is a line of Flower's log if this package said it, and a trace if it is a fault of the program."""

import logging

import pytest
from flwr.app import Context, RecordDict
from flwr.supercore.logger import log

from fedllm_helpers.federation import server_app
from fedllm_helpers.grids.in_process import own_errors_in_a_line


def as_flower_logs(error):
    """What Flower's process of a ServerApp writes when that raises (flwr.superlink.runtime.run_serverapp)."""
    handler, said = logging.Handler(), []
    handler.emit = lambda record: said.append(logging.Formatter().format(record))
    logging.getLogger("flwr").addHandler(handler)
    try:
        log(logging.ERROR, "%s raised an exception", "ServerApp", exc_info=error)
    finally:
        logging.getLogger("flwr").removeHandler(handler)
    return said[0]


def test_settings_that_are_refused_end_a_run_in_one_line():
    context = Context(1, 1, {}, RecordDict(), {"config": "nonsense: 1"})
    with pytest.raises(ValueError) as refused:
        server_app.app(None, context)
    assert as_flower_logs(refused.value) == f"The run ends: {refused.value}" and "nonsense" in str(refused.value)


def test_a_fault_of_the_program_or_of_a_library_keeps_its_trace():
    for wrong in (lambda: {}["x"], lambda: int("x")):
        with pytest.raises((KeyError, ValueError)) as fault, own_errors_in_a_line():
            wrong()
        said = as_flower_logs(fault.value)
        assert said.startswith("ServerApp raised an exception\nTraceback") and said.count("\n") > 3
