"""The subcommands of ``python -m forkshm``; the table of them is in `forkshm.__main__`."""
