"""``python -m fedllm_helpers.site``: the command of :mod:`fedllm_helpers.site.commands`."""

from fedllm_helpers.site.commands import main

if __name__ == "__main__":
    main()
