"""``python -m fedllm_helpers.experiments``: the command of :mod:`fedllm_helpers.study.experiments`."""

from fedllm_helpers.study.experiments import main

if __name__ == "__main__":
    main()
