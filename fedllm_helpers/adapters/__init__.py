"""What travels: an adapter is a ``dict`` of arrays in PEFT's names. Taught in notebook 04.

:mod:`factors` has the algebra of low-rank updates, :mod:`records` takes adapters in and out of Flower's messages,
:mod:`packing` makes one array of many on their way, and :mod:`screening` looks at what a stranger sent. No torch here.
"""

from fedllm_helpers.adapters.records import Adapter, from_record, message_bytes, to_record
from fedllm_helpers.adapters.screening import Expected, Reply, screen

__all__ = ["Adapter", "Expected", "Reply", "from_record", "message_bytes", "screen", "to_record"]
