"""Subcommands of ``python -m forkshm``; `forkshm.__main__` lists them."""
