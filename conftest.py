"""What pytest does not collect: the doctests of integrations with libraries that are not installed."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("torch") else ["forkshm/integrations/torch.py"]
