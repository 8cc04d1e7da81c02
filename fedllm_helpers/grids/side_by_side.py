"""A Flower grid whose clients run in worker processes, several at a time: any app that stands in a module."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flwr.app import Context, Error, Message

from fedllm_helpers.grids import in_process
from fedllm_helpers.grids.in_process import CLIENT_RAISED, InProcessGrid
from fedllm_helpers.grids.serving import Answer, Task, named
from fedllm_helpers.grids.workers import Team


class SideBySideGrid(InProcessGrid):
    """An :class:`InProcessGrid` whose clients run in worker processes: as many at a time as there are workers.

    A message goes to the next worker that is free, with what its client remembers, so that any worker serves any
    client. Replies come in the order of the messages. A worker that dies is the failure of the client that it was at,
    and another is started in its place.

    Args:
        app: the ClientApp, or anything called like one, that stands under a name in a module.
        num_clients: nodes; node k has ``partition-id`` k.
        run_config: what the clients find in ``context.run_config``.
        workers: processes, which import the app. Where ``begin`` is set in the ``with`` block, a function of a module,
            each calls that before its first message; and they delete the folder ``scratch`` if this process is killed.

    Raises:
        ValueError: workers could not import the app.
    """

    begin: Callable[[], None] | None = None
    scratch = ""

    def __init__(
        self,
        app: Callable[[Message, Context], Message],
        num_clients: int,
        run_config: dict[str, Any],
        workers: int,
    ) -> None:
        super().__init__(app, num_clients, run_config)
        self.team = Team(named(app), workers)

    def __enter__(self) -> "SideBySideGrid":
        super().__enter__()
        try:
            self.team.__enter__()
        except BaseException:
            super().__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.team.__exit__(*exception)
        super().__exit__(*exception)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies, in the order of their messages."""
        return self._answered(self.pending.pop(number) for number in message_ids if number in self.pending)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """The replies in the order of the messages, which are taken as workers get free; none can be timed out.

        Raises:
            RuntimeError: no worker could be started.
        """
        return self._answered(map(self.numbered, messages))

    def _answered(self, messages: Iterable[Message]) -> Iterator[Message]:
        sent: dict[int, Message] = {}

        def tasks() -> Iterator[Task]:
            """The messages for workers."""
            for place, message in enumerate(messages):
                sent[place] = message
                node, state = message.metadata.dst_node_id, self.states.get(message.metadata.dst_node_id)
                facts = (self._run.run_id, node, self.names(node), self.run_config, self.begin, self.scratch)
                yield Task(in_process.message_bytes(message), in_process.state_bytes(state), *facts)

        come, number = {}, 0
        for place, answer in self.team.work(tasks()):
            come[place] = self._reply(sent.pop(place), answer)
            while number in come:
                yield come.pop(number)
                number += 1

    def _reply(self, message: Message, answer: Answer) -> Message:
        if answer.reply is None:
            return Message(Error(CLIENT_RAISED, answer.ended), reply_to=message)
        node = message.metadata.dst_node_id
        if answer.state is not None and (node in self.states or not answer.raised):
            self.states[node] = in_process.state_from(answer.state)
        return in_process.message_from(answer.reply)
