"""PyTorch's DataLoader with forkshm's contexts."""

from __future__ import annotations

import importlib.util

import pytest

pytestmark = pytest.mark.slow

if importlib.util.find_spec("torch") is None:
    pytest.skip("PyTorch is not installed: pip install 'forkshm[torch]'", allow_module_level=True)

METHODS = ["fork", "spawn", "forkserver"]

PROGRAM = """
import sys
import numpy as np
import torch
import torch.utils.data
import forkshm

class Rows(torch.utils.data.Dataset):
    def __init__(self, table):
        self.table = table

    def __len__(self):
        return len(self.table)

    def __getitem__(self, i):
        if i == 13:
            raise LookupError("unlucky")
        return torch.from_numpy(self.table[i] * 2)

if __name__ == "__main__":
    ctx = forkshm.get_context(sys.argv[1])
    table = forkshm.asarray(np.arange(12 * 2000.0).reshape(12, 2000))
    loader = torch.utils.data.DataLoader(
        Rows(table), batch_size=4, num_workers=2, multiprocessing_context=ctx, persistent_workers=True
    )
    for _ in range(2):
        batches = list(loader)
        assert [tuple(batch.shape) for batch in batches] == [(4, 2000)] * 3
        assert np.array_equal(torch.cat(batches).numpy(), table * 2)
    workers = ctx.active_children()
    assert len(workers) == 2 and {type(worker) for worker in workers} == {ctx.Process}
    del loader, batches
    bad = torch.utils.data.DataLoader(
        Rows(np.ones((14, 3))), num_workers=1, multiprocessing_context=ctx
    )
    try:
        list(bad)
    except LookupError as error:
        assert "unlucky" in str(error)
    else:
        raise SystemExit("no error")
    print("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_data_loader(run_script, method):
    assert run_script(PROGRAM, method) == "done\n"
