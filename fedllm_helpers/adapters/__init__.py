"""What travels: an adapter is a ``dict`` of arrays in PEFT's names. Taught in notebook 04.

:mod:`factors` has the algebra of low-rank updates, :mod:`records` takes adapters in and out of Flower's messages,
:mod:`packing` makes one array of many on their way, :mod:`screening` looks at what a stranger sent and :mod:`screened`
does so for any Flower app; :mod:`wrapping` is the strategy around a strategy that all techniques are. No torch here.
"""

from fedllm_helpers.faces import face

NAMES = {
    "Adapter": "records",
    "Expected": "screening",
    "Reply": "screening",
    "Screened": "screened",
    "Wrapper": "wrapping",
    "from_record": "records",
    "message_bytes": "records",
    "screen": "screening",
    "to_record": "records",
}
__getattr__, __dir__, __all__ = face(__name__, NAMES)
