"""The settings: every key of a configuration with its default, its meaning and its limits."""

from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any

PARTITIONS = ("iid", "specialty", "dirichlet", "quantity")
NUMBER_FORMATS = ("fp32", "fp16", "int8", "int4")
# Strategies of flwr.serverapp.strategy that combine adapters. Those that average need the mean of the replies alone: it
# is summed up while they come, one in memory. The others compare them all.
AVERAGING = ("FedAvg", "FedAvgM", "FedProx", "FedAdagrad", "FedAdam", "FedYogi")
STRATEGIES = (*AVERAGING, "FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum", "Bulyan", "QFedAvg")
HIGHEST_RATE = 10  # Adam moves each weight by about the rate in a step: above it nothing is learned
# of combining LoRA factors, and of r × r cores between frozen ones
RULES = ("FedIT", "FFA-LoRA", "RoLoRA", "FLoRA", "FedEx-LoRA", "FlexLoRA", "FedSA-LoRA", "LoRA-XS")
EDITING, MIXED = ("FLoRA", "FedEx-LoRA"), ("FLoRA", "FlexLoRA")  # rules that edit the base; rules for mixed ranks
BY_PRODUCT = ("FLoRA", "FedEx-LoRA", "FlexLoRA")


def _setting(
    default: Any, meaning: str, low: float | None = None, high: float | None = None, choices: tuple = ()
) -> Any:
    limits = {"meaning": meaning, "low": low, "high": high, "choices": choices}
    return (
        field(default_factory=default, metadata=limits)
        if callable(default)
        else field(default=default, metadata=limits)
    )


@dataclass
class Dataset:
    """Where the flashcards come from and how a card becomes a prompt."""

    name: str = _setting("hpo", "'hpo', a hub id, a folder, or a .json, .jsonl, .csv, .tsv or .parquet file")
    test: str | None = _setting(None, "a second one, to be held out; null: the dataset's own test part, or a split")
    columns: dict[str, str] | None = _setting(None, "names of columns by role, such as question, answer, context")
    prompt: str = _setting("short", "'short', 'course', 'chat', or a template with {question} in it")
    specialties: list[str] | None = _setting(None, "keep these specialties only; null keeps all")
    max_cards_per_specialty: int | None = _setting(None, "seeded subset of each specialty; null keeps all", low=2)


@dataclass
class Lora:
    """The adapter: which layers get a low-rank update, and how large (Hu et al. 2021, arXiv:2106.09685)."""

    peft_lora_r: int = _setting(16, "rank r of the update B·A", low=1, high=8192)
    peft_lora_alpha: int = _setting(64, "α: the update is scaled by α / r", low=1, high=65536)
    use_rslora: bool = _setting(False, "scale by α / √r instead (Kalajdzievski 2023, arXiv:2312.03732)")
    lora_dropout: float = _setting(0.0, "share of the adapter's inputs dropped while training", low=0, high=0.99)
    target_modules: list[str] | None = _setting(
        None, "layers with an adapter; null: the family's attention projections"
    )
    core: bool = _setting(
        False, "train an r × r core between the weights' own singular vectors; set by federation.aggregation=LoRA-XS"
    )


@dataclass
class Model:
    """The frozen base model and how it is held in memory."""

    name: str = _setting("smollm2-135m", "'smollm2-135m', a hub id, or a folder")
    quantization: int | None = _setting(None, "bits per frozen weight; null keeps them whole", choices=(None, 4, 8))
    gradient_checkpointing: bool = _setting(False, "recompute activations: less memory, more time")
    use_fast_tokenizer: bool = _setting(True, "the compiled tokenizer; false refuses where no other exists")
    device: str = _setting("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = _setting(
        "auto", "number format of the frozen weights", choices=("auto", "float32", "bfloat16", "float16")
    )
    lora: Lora = field(default_factory=Lora)


@dataclass
class Train:
    """Training of one adapter, and its schedule over the rounds of a federation."""

    save_every_round: int = _setting(5, "keep the adapter of every n-th round", low=1)
    seq_length: int = _setting(128, "tokens per card at most", low=1)
    padding_side: str = _setting("left", "where short cards are filled up", choices=("left", "right"))
    evaluate_split: bool | int | float = _setting(
        0.1, "share of cards held out; true is 0.1, false none", low=0, high=0.9
    )
    learning_rate_max: float = _setting(8e-3, "rate of the first round", low=1e-12, high=HIGHEST_RATE)
    learning_rate_min: float = _setting(
        8e-4, "rate towards which the rounds fall along a cosine", low=0, high=HIGHEST_RATE
    )
    training_arguments: dict[str, Any] = _setting(dict, "passed to transformers.TrainingArguments as it is")


@dataclass
class Compression:
    """How adapters are made smaller for the way; see :mod:`fedllm_helpers.communication.compression`."""

    up: str = _setting("fp32", "number format of the updates that hospitals send", choices=NUMBER_FORMATS)
    down: str = _setting("fp32", "number format of the adapter that the server sends", choices=NUMBER_FORMATS)
    keep: float = _setting(1.0, "share of an update that is sent, its largest values", low=1e-6, high=1)
    error_feedback: bool = _setting(True, "what an update lost is added to the hospital's next one")


@dataclass
class RecordPrivacy:
    """DP-SGD at every hospital: hides any one of its cards from whoever sees its adapters."""

    epsilon: float | None = _setting(
        None, "ε of a hospital's cards over all rounds; the noise follows from it", low=1e-6, high=1e4
    )
    noise_multiplier: float | None = _setting(
        None, "or the noise of a step, in units of clipping_norm", low=1e-9, high=1e6
    )
    clipping_norm: float = _setting(1.0, "largest norm of one card's gradient", low=1e-9, high=1e6)
    delta: float = _setting(1e-3, "probability that the promise fails; below 1 / cards", low=1e-30, high=0.1)
    cards_per_patient: int | None = _setting(
        None,
        "protects whole patients (the column patient_id), each with so many cards at most; null protects cards",
        low=1,
    )


@dataclass
class ClientPrivacy:
    """Noise on the average: hides any one hospital from whoever sees the average; with masks, from the server, too."""

    noise_multiplier: float | None = _setting(
        None, "noise of a round, in units of what one hospital can move; null for none", low=1e-9, high=1e6
    )
    clipping_norm: float = _setting(1.0, "largest norm of one hospital's update", low=1e-9, high=1e6)
    delta: float = _setting(1e-2, "probability that the promise fails; below 1 / hospitals", low=1e-30, high=0.5)
    weights: str = _setting("uniform", "of the hospitals in the average", choices=("uniform", "cards"))


@dataclass
class ScorePrivacy:
    """Noise on a hospital's scores: hides any one of its held-out cards from whoever sees them.

    It hides patients where ``record.cards_per_patient`` protects these; one with cards in training, too, is in both ε.
    """

    epsilon: float | None = _setting(
        None, "ε of a hospital's held-out cards over the scores of all rounds; the noise follows", low=1e-6, high=1e4
    )
    largest_nll: float = _setting(8.0, "nats per token that a card counts with at most", low=1e-3, high=1e3)
    delta: float = _setting(1e-3, "probability that the promise fails; below 1 / held-out cards", low=1e-30, high=0.1)


@dataclass
class Privacy:
    """What is done so that less leaks; see :mod:`fedllm_helpers.privacy`."""

    record: RecordPrivacy = field(default_factory=RecordPrivacy)
    client: ClientPrivacy = field(default_factory=ClientPrivacy)
    scores: ScorePrivacy = field(default_factory=ScorePrivacy)
    noise_seed: int | None = _setting(None, "repeats the noise, for study; null draws it from the system", low=0)


@dataclass
class SecureAggregation:
    """The server learns the sum of the updates and no single one; see :mod:`secure_aggregation`."""

    threshold: int | None = _setting(None, "hospitals without which no sum can be opened; null for no masks", low=2)
    value_range: float = _setting(
        1.0, "largest magnitude of an update's value; what is larger is cut", low=1e-9, high=1e6
    )


@dataclass
class Federation:
    """Which hospitals train together, on what, for how long, and how their adapters are combined."""

    num_clients: int = _setting(6, "hospitals", low=1, high=1_000_000)
    num_rounds: int = _setting(4, "rounds of train, send, average", low=1, high=1_000_000)
    fraction_train: float = _setting(1.0, "share of the hospitals asked in a round", low=1e-9, high=1)
    fraction_evaluate: float = _setting(
        0.0, "share of them asked to score the average on their own cards", low=0, high=1
    )
    min_replies: int = _setting(1, "usable replies without which a round leaves the adapter as it was", low=1)
    min_share: float = _setting(
        0.5, "and they must be of more than this share of the hospitals that a round asks", low=0, high=0.99
    )
    max_cards: int = _setting(
        1_000_000, "most cards that a hospital may claim as its weight; a reply with more is left out", low=1
    )
    timeout: float = _setting(3600.0, "seconds to wait for the hospitals of a round", low=1, high=31_536_000)
    partition: str = _setting("specialty", "how cards lie over the hospitals", choices=PARTITIONS)
    dirichlet_alpha: float = _setting(0.5, "α of partition dirichlet: small is uneven", low=1e-3, high=1e6)
    aggregation: str = _setting("FedIT", "what of the LoRA factors is sent and combined", choices=RULES)
    ranks: list[int] | None = _setting(None, "rank of each hospital, with FLoRA or FlexLoRA; null: the same for all")
    strategy: str = _setting("FedAvg", "how the server combines adapters, by Flower's name", choices=STRATEGIES)
    strategy_arguments: dict[str, Any] = _setting(dict, "passed to the strategy as it is, such as server_momentum")
    training_arguments: dict[str, Any] = _setting(dict, "in place of train.training_arguments, within a round")
    evaluate_every: int = _setting(1, "rounds between two evaluations on the server; 0 for none", low=0)
    evaluate_cards: int | None = _setting(48, "held-out cards for them; null for all", low=2)
    report_to: Any = _setting(
        None, "trackers of the rounds, in the run's folder: tensorboard, mlflow, or a list of both"
    )
    threads: int | None = _setting(
        None, "CPU threads of a hospital; null for as many as the process has", low=1, high=4096
    )
    compression: Compression = field(default_factory=Compression)
    privacy: Privacy = field(default_factory=Privacy)
    secure_aggregation: SecureAggregation = field(default_factory=SecureAggregation)


@dataclass
class Config:
    """All settings of a run."""

    seed: int = _setting(
        0, "seeds the split, the subset, the adapter's start and the order of the cards", low=0, high=2**32 - 1
    )
    dataset: Dataset = field(default_factory=Dataset)
    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)
    federation: Federation = field(default_factory=Federation)


def settings_of(schema: type, prefix: str = "") -> list[tuple[str, Field]]:
    """(dotted key, field) of every setting of a schema, those of its parts too."""
    found: list[tuple[str, Field]] = []
    for item in fields(schema):
        if is_dataclass(item.type):
            found += settings_of(item.type, f"{prefix}{item.name}.")
        else:
            found.append((prefix + item.name, item))
    return found
