"""The subcommands of ``python -m forkshm``, each with ``add_arguments(parser)`` and ``run(arguments)``."""
