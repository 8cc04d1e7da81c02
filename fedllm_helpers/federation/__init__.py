"""The two Flower apps, their rounds, and ways to run them here. Taught in notebook 03.

:mod:`simulation` runs a whole federation in this process or on Ray; :mod:`client_app` and :mod:`server_app` are what
``flwr run`` starts, too. :mod:`rounds` is the server's side of one round.
"""
