"""Sums that the server can open and single updates that it cannot: pairwise masks that survive drop-outs.

After Bonawitz et al. 2017 (doi:10.1145/3133956.3133982), for a server that is curious and keeps to the protocol. Keys,
ciphers and shares come from ``cryptography`` and ``pycryptodome``; nothing is invented here. (Flower's own SecAgg+ does
not run on its Message API, and its masks have a seed of 32 bits.) Four steps a round:

1. every hospital makes two key pairs and a seed, and publishes the public halves;
2. it splits the secrets that undo its masks into shares, and encrypts one for each hospital;
3. it adds to its update one mask per other hospital, which cancels in the sum, and one of its own seed;
4. for those whose update arrived, the others open the seed; for those who went away, the key of the pairwise masks.

A server that lies about who went away is stopped by signatures and a public-key infrastructure only: not here.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedllm_helpers.adapters.records import Adapter

SHARE = 16  # bytes of a secret and of each of its shares
SEALED = 12 + 2 * SHARE + 16  # of two shares on their way: nonce, shares, tag


@dataclass(frozen=True)
class Secrets:
    """What a hospital keeps for one round: two seeds, from which its mask key and its own mask follow, and a key."""

    mask_seed: bytes
    self_seed: bytes
    cipher_key: bytes


@dataclass(frozen=True)
class Public:
    """What a hospital publishes for one round: the public halves of its keys, and a hash of its seed."""

    mask_key: bytes
    cipher_key: bytes
    commitment: bytes


@dataclass(frozen=True)
class FixedPoint:
    """Numbers cut to ±``value_range``, as whole steps of 2^−``bits``, weighted, so that their sum stays below 2^31."""

    bits: int
    value_range: float

    def error(self, hospitals: int, total_weight: float) -> float:
        """By how much a weighted mean of values within the range can be off: half a step for each hospital."""
        return hospitals * 0.5 * 2.0**-self.bits / total_weight


def fixed_point(weights: Iterable[int], value_range: float, spread: float = 0.0) -> FixedPoint:
    """As many bits as the weights leave: (Σ wₖ R + 10 times the ``spread`` of noise in the sum) 2^bits + K / 2 < 2^31.

    Raises:
        ValueError: weights that are not whole numbers above 0, or so large that nothing is left.
    """
    weights = list(weights)
    if not weights or any(not isinstance(w, int) or w < 1 for w in weights):
        raise ValueError(f"weights {weights}: expected whole numbers from 1")
    bits = int(np.floor(np.log2((2**31 - 1 - len(weights)) / (sum(weights) * value_range + 10 * spread))))
    if bits < 8:
        raise ValueError(f"a sum of {sum(weights)} · {value_range} leaves {bits} bits: take a smaller value_range")
    return FixedPoint(bits, value_range)


def encode(update: Adapter, weight: int, code: FixedPoint) -> np.ndarray:
    """An update times its weight in fixed point. Taught in notebook 05b.

    Returns:
        uint32 of shape (values,), keys in the order of the update; negative numbers count down from 2^32.

    Raises:
        ValueError: a value is not finite.
    """
    flat = np.concatenate([np.zeros(0), *(value.ravel() for value in update.values())])
    if not np.isfinite(flat).all():
        raise ValueError("an update that is not finite cannot be masked")
    cut = np.clip(flat, -code.value_range, code.value_range)
    return np.rint(cut * weight * 2.0**code.bits).astype(np.int64).astype(np.uint32)


def decode(total: np.ndarray, weight: int, code: FixedPoint, like: Adapter) -> Adapter:
    """The weighted mean from a sum of :func:`encode`: float32 arrays with the keys and shapes of ``like``."""
    flat, first, mean = total.astype(np.int32) * 2.0**-code.bits / weight, 0, {}
    for key, value in like.items():
        mean[key] = flat[first : first + value.size].reshape(value.shape).astype(np.float32)
        first += value.size
    return mean


def make_keys() -> tuple[Secrets, Public]:
    """Fresh secrets of a hospital for one round, and what it publishes."""
    own = Secrets(os.urandom(SHARE), os.urandom(SHARE), os.urandom(32))
    return own, public_half(own)


def public_half(own: Secrets) -> Public:
    """What a hospital with these secrets publishes."""
    cipher = X25519PrivateKey.from_private_bytes(own.cipher_key).public_key().public_bytes_raw()
    return Public(_mask_key(own.mask_seed).public_key().public_bytes_raw(), cipher, _hash(own.self_seed))


def make_shares(me: int, own: Secrets, public: Mapping[int, Public], threshold: int, number: int) -> dict[int, bytes]:
    """An encrypted share of both seeds for every hospital, oneself included.

    Args:
        me: the hospital.
        own: its secrets.
        public: of all hospitals of the round.
        threshold: how many shares open a seed; more than half of the hospitals.
        number: of the round: a share of another one is refused.

    Raises:
        ValueError: the threshold is not above half, or above all.
    """
    hospitals, count = sorted(public), len(public)
    if not max(count / 2, 1) < threshold <= count:
        raise ValueError(
            f"a threshold of {threshold} for {count} hospitals: allowed is more than half, from 2 up to all"
        )
    masks, selves = (Shamir.split(threshold, len(hospitals), seed) for seed in (own.mask_seed, own.self_seed))
    shares = {}
    for hospital, (_, mask), (_, self_) in zip(hospitals, masks, selves, strict=True):
        box, nonce = _box(own.cipher_key, public[hospital].cipher_key), os.urandom(12)
        shares[hospital] = nonce + box.encrypt(nonce, mask + self_, _label(number, me, hospital))
    return shares


def mask(values: np.ndarray, me: int, own: Secrets, public: Mapping[int, Public], number: int | str) -> np.ndarray:
    """Values plus one's own mask, plus or minus the masks shared with each other hospital, modulo 2^32.

    Args:
        values: uint32, from :func:`encode`.
        me, own, public: as in :func:`make_shares`.
        number: of the round, or a text that says all that hospitals have agreed on: with others, nothing cancels.
    """
    masked, key = values + _stream(own.self_seed, "self", number, len(values)), _mask_key(own.mask_seed)
    for hospital in sorted(set(public) - {me}):
        shared = _pair_mask(key, public[hospital].mask_key, number, len(values))
        masked = masked + shared if me < hospital else masked - shared
    return masked


def reveal(
    me: int, own: Secrets, public: Mapping[int, Public], shares: Mapping[int, bytes], survivors: set[int],
    number: int, threshold: int,
) -> dict[int, bytes]:  # fmt: skip
    """One's share of each hospital's seed: of its own mask where its update arrived, of its pairwise masks otherwise.

    Never both: whoever has both could take off every mask.

    Args:
        me, own, public, number, threshold: as in :func:`make_shares`.
        shares: encrypted, by the hospital that made them.
        survivors: hospitals whose masked update arrived.

    Raises:
        ValueError: fewer survivors than the threshold, or a share that was changed or is of another round.
    """
    if len(survivors) < threshold or not survivors <= set(public) or me not in survivors:
        raise ValueError(f"{len(survivors)} masked updates arrived, {threshold} are needed: nothing is opened")
    opened = {}
    for hospital in sorted(public):
        box, given = _box(own.cipher_key, public[hospital].cipher_key), shares.get(hospital, b"")
        try:
            both = box.decrypt(given[:12], given[12:], _label(number, hospital, me))
        except (InvalidTag, ValueError):
            raise ValueError(f"the share of hospital {hospital} was changed, or is of another round") from None
        opened[hospital] = both[SHARE:] if hospital in survivors else both[:SHARE]
    return opened


def unmask(
    total: np.ndarray, public: Mapping[int, Public], places: Mapping[int, int], survivors: set[int],
    opened: Mapping[int, Mapping[int, bytes]], number: int | str, threshold: int,
) -> np.ndarray:  # fmt: skip
    """The sum of the survivors' values, from the sum of their masked ones.

    Args:
        total: uint32, Σ over the survivors modulo 2^32.
        public: of all hospitals that made shares.
        places: of each hospital, from 1, among those whose shares were asked for: which share of a seed it holds.
        survivors: whose masked values are in the sum.
        opened: by the hospital that revealed, its share of each hospital's seed.
        number, threshold: as in :func:`mask` and :func:`make_shares`.

    Raises:
        ValueError: fewer hospitals than the threshold revealed, or their shares do not open a seed.
    """
    if len(opened) < threshold:
        raise ValueError(f"{len(opened)} hospitals revealed their shares, {threshold} are needed: nothing is opened")
    used = sorted(opened)[:threshold]
    for hospital in sorted(public):
        seed = Shamir.combine([(places[other], opened[other][hospital]) for other in used])
        right = public[hospital].commitment if hospital in survivors else public[hospital].mask_key
        if right != (_hash(seed) if hospital in survivors else _mask_key(seed).public_key().public_bytes_raw()):
            raise ValueError(f"the shares of hospital {hospital}'s seed do not open it: one of them was changed")
        if hospital in survivors:
            total = total - _stream(seed, "self", number, len(total))
            continue
        for other in sorted(survivors):  # what the others added for the one who went away
            shared = _pair_mask(_mask_key(seed), public[other].mask_key, number, len(total))
            total = total - shared if other < hospital else total + shared
    return total


def _hash(seed: bytes) -> bytes:
    return hashlib.sha256(b"fedllm self " + seed).digest()


def _derive(secret: bytes, purpose: str) -> bytes:
    return HKDF(SHA256(), 32, None, f"fedllm {purpose}".encode()).derive(secret)


def _mask_key(seed: bytes) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(_derive(seed, "mask key"))


def _box(mine: bytes, theirs: bytes) -> ChaCha20Poly1305:
    shared = X25519PrivateKey.from_private_bytes(mine).exchange(X25519PublicKey.from_public_bytes(theirs))
    return ChaCha20Poly1305(_derive(shared, "share"))


def _label(number: int, sender: int, receiver: int) -> bytes:
    return f"round {number} from {sender} to {receiver}".encode()


def _pair_mask(mine: X25519PrivateKey, theirs: bytes, number: int | str, size: int) -> np.ndarray:
    return _stream(mine.exchange(X25519PublicKey.from_public_bytes(theirs)), "pair", number, size)


def _stream(secret: bytes, purpose: str, number: int | str, size: int) -> np.ndarray:
    """``size`` numbers of 32 bits that nobody without the secret can tell from chance: ChaCha20 of zeros."""
    cipher = Cipher(ChaCha20(_derive(secret, f"{purpose} mask {number}"), bytes(16)), mode=None).encryptor()
    return np.frombuffer(cipher.update(bytes(4 * size)), "<u4")
