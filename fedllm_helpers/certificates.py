"""``python -m fedllm_helpers.certificates``: the command of :mod:`fedllm_helpers.deployment.certificates`."""

from fedllm_helpers.deployment.certificates import main

if __name__ == "__main__":
    main()
