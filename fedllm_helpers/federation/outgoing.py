"""Requests of a round: what the strategy adds, and what the rule sends to each hospital."""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp.strategy import Strategy
from omegaconf import DictConfig

from fedllm_helpers.adapters.records import Adapter, message_bytes, to_record
from fedllm_helpers.aggregation import rules
from fedllm_helpers.aggregation.edits import Base
from fedllm_helpers.communication import compression
from fedllm_helpers.communication.compression import Formats
from fedllm_helpers.privacy.masked_rounds import Masks
from fedllm_helpers.training.fine_tuning import Round


@dataclass
class Outgoing:
    """A round's requests, made one by one: most rules send everyone the same, some each hospital its own.

    ``request`` has what the strategy adds, ``more`` further records; ``sizes`` collects bytes by hospital.
    """

    cfg: DictConfig
    adapter: Adapter
    base: Base
    nodes: dict[int, int]
    request: Message | None = None
    more: dict[str, ConfigRecord] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    made: dict[tuple, dict[str, ArrayRecord | ConfigRecord]] = field(default_factory=dict)  # by rank and kind

    def message(self, hospital: int, kind: str) -> Message:
        """The request for a hospital."""
        size, how = (rules.rank_of(self.cfg, hospital), kind), formats(self.cfg)
        if size not in self.made:
            how = how if kind == "train" else replace(how, up=None)
            self.made[size] = compression.outgoing(how, rules.down(self.cfg, self.adapter, hospital))
        content = RecordDict({**self.request.content, **self.made[size], **self.more})
        self.base.attach(content, self.nodes[hospital])
        message = Message(content, self.nodes[hospital], kind)
        self.sizes[hospital] = message_bytes(message)
        return message


def training_orders(cfg: DictConfig, strategy: Strategy, step: Round, adapter: Adapter, node: int) -> Message:
    """What the strategy would send: the content is the same for all. Strategies sample for themselves: from one."""
    view = SimpleNamespace(get_node_ids=lambda: [node])
    (request,) = strategy.configure_train(
        step.number, to_record(rules.up(cfg, adapter, step.number)), ConfigRecord({"lr": step.learning_rate}), view
    )
    return request


def formats(cfg: DictConfig) -> Formats:
    """How adapters are compressed on their ways; masked updates have a format of their own."""
    how, masked = cfg.federation.compression, cfg.federation.secure_aggregation.threshold
    return Formats(None if masked else how.up, how.down, how.keep, how.error_feedback)


def masks(cfg: DictConfig) -> Masks:
    """How updates are masked; where noise is added, hospitals clip for themselves, as the server cannot see."""
    how, noise = cfg.federation.secure_aggregation, cfg.federation.privacy.client
    noisy = noise.noise_multiplier is not None
    norm, uniform = noise.clipping_norm if noisy else 0.0, noisy and noise.weights == "uniform"
    return Masks(how.threshold, how.value_range, norm, uniform, cfg.federation.max_cards, cfg.federation.timeout)
