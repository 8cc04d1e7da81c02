"""``python -m fedllm_helpers.policy``: the command of :mod:`fedllm_helpers.privacy.standing`."""

from fedllm_helpers.privacy.standing import main

if __name__ == "__main__":
    main()
