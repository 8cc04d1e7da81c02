"""What a hospital and the server see to before the first day of a pilot: ``python -m fedllm_helpers.site``.

:mod:`commands` is the command, :mod:`findings` one line of it, :mod:`reading` takes the settings from the units,
:mod:`hospital`, :mod:`server` and :mod:`machine` look. After it: :mod:`report` and :mod:`card` show a run (:mod:`kept`
reads its folder), and :mod:`standing` what a hospital's policy has left.
"""

from fedllm_helpers.faces import face

NAMES = {"Finding": "findings", "look": "findings", "of_hospital": "hospital", "of_server": "server"}
__getattr__, __dir__, __all__ = face(__name__, NAMES)
