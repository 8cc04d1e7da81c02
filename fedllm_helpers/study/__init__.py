"""The grids behind ``notebooks/results``: what takes too long for a notebook. Read in notebooks 04 to 07.

:mod:`experiments` is their command, :mod:`arms`, :mod:`control`, :mod:`lab`, :mod:`frontier`, :mod:`audits` and
:mod:`views` do them, and :mod:`results` keeps them with their provenance; :mod:`exercises` and
:mod:`privacy_exercises` check what a reader writes.
"""

__all__: list[str] = []  # a study is read from its tables
