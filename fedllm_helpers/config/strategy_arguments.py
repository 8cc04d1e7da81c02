"""Arguments of Flower's strategies: which there are, within which limits, and for how many hospitals."""

from omegaconf import DictConfig, OmegaConf

from fedllm_helpers.config.schema import HIGHEST_RATE

BELOW_1 = 1 - 1e-9
# arguments of each strategy: from, to, and whether they are whole; all others are the server app's, or unknown
_ADAPTIVE = {"eta": (1e-12, HIGHEST_RATE, False), "tau": (1e-30, 1, False)}
_MOMENTS = _ADAPTIVE | {"beta_1": (0, BELOW_1, False), "beta_2": (0, BELOW_1, False)}
_MALICIOUS = {"num_malicious_nodes": (0, 1_000_000, True)}
TAKEN: dict[str, dict[str, tuple[float, float, bool]]] = {
    "FedAvg": {},
    "FedAvgM": {"server_momentum": (0, BELOW_1, False), "server_learning_rate": (1e-12, HIGHEST_RATE, False)},
    "FedProx": {"proximal_mu": (0, 1e6, False)},
    "FedAdagrad": _ADAPTIVE,
    "FedAdam": _MOMENTS,
    "FedYogi": _MOMENTS,
    "FedMedian": {},
    "FedTrimmedAvg": {"beta": (0, 0.5 - 1e-9, False)},
    "Krum": _MALICIOUS,
    "MultiKrum": _MALICIOUS | {"num_nodes_to_select": (1, 1_000_000, True)},
    "Bulyan": _MALICIOUS,
    "QFedAvg": {"q": (0, 100, False), "client_learning_rate": (1e-12, HIGHEST_RATE, False)},
}
# Without one of these the strategy is FedAvg under another name.
NEEDED = {"FedAvgM": ("server_momentum", "server_learning_rate"), "FedProx": ("proximal_mu",)}
# Hospitals of a round for f malicious ones: Blanchard et al. 2017, arXiv:1703.02757; El Mhamdi et al. 2018,
# arXiv:1802.07927.
HONEST = {"Krum": (2, 3), "MultiKrum": (2, 3), "Bulyan": (4, 3)}


def check(how: DictConfig, asked: int) -> None:
    """Raise ValueError, in one line, for an argument that the strategy has not, or that is out of its limits.

    Args:
        how: the section ``federation``.
        asked: hospitals of a round.
    """
    name, given = how.strategy, OmegaConf.to_container(how.strategy_arguments)
    where = "federation.strategy_arguments"
    for key, value in given.items():
        if key not in TAKEN[name]:
            takes = f"{name} takes {', '.join(TAKEN[name]) or 'none'}"
            raise ValueError(f"{where}.{key}={value}: it is unknown, or the server app's; {takes}")
        low, high, whole = TAKEN[name][key]
        number = isinstance(value, int) or (isinstance(value, float) and not whole)
        if isinstance(value, bool) or not number or not low <= value <= high:
            kind = "whole numbers" if whole else "numbers"
            raise ValueError(f"{where}.{key}={value}: allowed are {kind} from {low:g} to {high:.10g}")
    if name in NEEDED and not given.keys() & NEEDED[name]:
        needed = " or ".join(NEEDED[name])
        raise ValueError(f"federation.strategy={name}: without {needed} it is FedAvg; set it in {where}")
    each, more = HONEST.get(name, (0, 0))
    malicious, chosen = given.get("num_malicious_nodes", 0), given.get("num_nodes_to_select", 1)
    if asked < each * malicious + more:
        raise ValueError(
            f"{where}.num_malicious_nodes={malicious}: {name} needs {each * malicious + more} hospitals in a round "
            f"({each} f + {more}), and {asked} are asked"
        )
    if chosen > asked:
        raise ValueError(f"{where}.num_nodes_to_select={chosen}: a round asks {asked} hospitals")
