"""The strategies of a run, one around the other, from a configuration: the one place where techniques meet."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy
from omegaconf import DictConfig, OmegaConf

from fedllm_helpers import models
from fedllm_helpers.adapters.records import Adapter
from fedllm_helpers.adapters.screened import Screened
from fedllm_helpers.adapters.screening import LIMITS
from fedllm_helpers.adapters.wrapping import Wrapper
from fedllm_helpers.aggregation.fedex import FedExLoRA
from fedllm_helpers.aggregation.fedit import FedIT
from fedllm_helpers.aggregation.fedsa import FedSALoRA
from fedllm_helpers.aggregation.ffa import FFALoRA
from fedllm_helpers.aggregation.flexlora import FlexLoRA
from fedllm_helpers.aggregation.flora import FLoRA
from fedllm_helpers.aggregation.loraxs import LoRAXS
from fedllm_helpers.aggregation.rolora import RoLoRA
from fedllm_helpers.aggregation.ruled import Rule
from fedllm_helpers.aggregation.strategies import Careful, Enough
from fedllm_helpers.communication.compression import Compressed
from fedllm_helpers.communication.metered import Metered
from fedllm_helpers.config.rounds import needed
from fedllm_helpers.federation.tables import NUMBERS
from fedllm_helpers.privacy.audit_log import Audited
from fedllm_helpers.privacy.masked import Masked
from fedllm_helpers.privacy.noised import Noised

RULES = {rule.name: rule for rule in (FedIT, FFALoRA, RoLoRA, FLoRA, FedExLoRA, FlexLoRA, FedSALoRA, LoRAXS)}


@dataclass
class Chain:
    """The strategies of a run: ``top`` is called, ``rule`` has what was added to the base model.

    ``hospitals`` are the numbers of hospitals by node, kept up to date.
    """

    top: Metered
    screened: Screened
    rule: Rule
    audited: Audited
    masked: Masked | None = None
    hospitals: dict[int, int] = field(default_factory=dict)

    def wrappers(self) -> Iterator[Wrapper]:
        """All of them, from the outermost."""
        yield self.top
        yield from self.top.within()

    def named(self, names: dict[int, int]) -> None:
        """Take the numbers of hospitals, by node, that are connected."""
        self.hospitals.clear()
        self.hospitals.update(names)

    def status(self, node: int) -> str:
        """What became of a node's reply in this round: ``used``, or in one line why not."""
        return next((some.left[node] for some in self.wrappers() if node in some.left), "used")

    def why(self) -> str:
        """Why this round came to nothing; "" where it did not, or where there were too few replies."""
        return next((some.why for some in self.wrappers() if some.why), "")


def rule(cfg: DictConfig, strategy: Strategy, hospitals: dict[int, int] | None = None) -> Rule:
    """The rule named in a configuration, around a strategy."""
    how, names = cfg.federation, hospitals if hospitals is not None else {}
    ranks = (lambda node: how.ranks[names.get(node, node)]) if how.ranks else None
    scale = {"scale": models.editing.scaling(cfg.model.lora)} if RULES[how.aggregation].single else {}
    return RULES[how.aggregation](strategy, seed=cfg.seed, ranks=ranks, **scale)


def values(cfg: DictConfig, adapter: Adapter) -> Callable[[int, int, str], tuple[int, int]]:
    """How many numbers the messages of a configured run hold: :meth:`fedllm_helpers.aggregation.ruled.Rule.values`."""
    return rule(cfg, named_strategy(cfg)).values(adapter, cfg.federation.num_clients)


def named_strategy(cfg: DictConfig) -> Strategy:
    """Flower's strategy named in a configuration, with its arguments. It takes all nodes: sampling is the server's."""
    everyone = {"fraction_train": 1.0, "fraction_evaluate": 1.0}
    fewest = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}
    name, given = cfg.federation.strategy, OmegaConf.to_container(cfg.federation.strategy_arguments)
    if name == "QFedAvg":  # it weights by the loss of the adapter that was sent out
        given = {"train_loss_key": "loss-before", "client_learning_rate": cfg.train.learning_rate_max} | given
    return getattr(flower, name)(**everyone, **fewest, **given)


def compose(cfg: DictConfig) -> Chain:
    """The strategies that a configuration asks for; those that do not go together are refused when it is loaded."""
    how, hospitals = cfg.federation, {}
    private = how.privacy.client
    chosen = strategy = rule(cfg, Careful(named_strategy(cfg)), hospitals)
    masked = None
    if private.noise_multiplier is not None and not how.secure_aggregation.threshold:  # behind masks hospitals add it
        uniform = private.weights == "uniform"
        given = (private.noise_multiplier, private.clipping_norm)
        strategy = Noised(strategy, *given, uniform=uniform, seed=how.privacy.noise_seed)
    if how.secure_aggregation.threshold:
        strategy = masked = Masked(strategy, **masks(cfg))
    least, small = needed(cfg), how.compression
    setting = f"min_replies={least}" if least == how.min_replies else f"min_share={how.min_share}"
    strategy = Enough(strategy, least, bool(masked), f"federation.{setting}")
    if small.up != "fp32" or small.down != "fp32" or small.keep < 1:
        up = None if masked else small.up
        strategy = Compressed(strategy, up=up, down=small.down, keep=small.keep, error_feedback=small.error_feedback)
    screened = Screened(strategy, **limits(cfg))
    audited = Audited(screened)
    chain = Chain(Metered(audited), screened, chosen, audited, masked, hospitals)
    for wrapper in chain.wrappers():
        wrapper.names = hospitals
    return chain


def masks(cfg: DictConfig) -> dict:
    """How updates are masked; where noise is promised, hospitals clip and add their shares of it for themselves."""
    how, private = cfg.federation.secure_aggregation, cfg.federation.privacy.client
    noisy = {"clipping_norm": private.clipping_norm, "uniform": private.weights == "uniform"}
    noisy |= {"noise_multiplier": private.noise_multiplier, "noise_seed": cfg.federation.privacy.noise_seed}
    given = noisy if private.noise_multiplier is not None else {}
    rest = {"max_cards": cfg.federation.max_cards, "timeout": cfg.federation.timeout}
    return {"threshold": how.threshold, "value_range": how.value_range, **rest, **given}


def limits(cfg: DictConfig) -> dict:
    """What a hospital's reply may say of itself: its losses it may keep, unless the strategy weights by them."""
    given = {name: LIMITS[name] for name in NUMBERS if name in LIMITS}
    needed = {"loss-before": LIMITS["loss-before"]} if cfg.federation.strategy == "QFedAvg" else {}
    scores = {"nll": LIMITS["nll"]}
    return {"numbers": needed, "optional": given, "scores": scores, "most_examples": cfg.federation.max_cards}
