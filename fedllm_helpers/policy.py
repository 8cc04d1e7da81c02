"""``python -m fedllm_helpers.policy``: the command of :mod:`fedllm_helpers.site.standing`."""

from fedllm_helpers.site.standing import main

if __name__ == "__main__":
    main()
