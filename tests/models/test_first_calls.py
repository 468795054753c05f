"""Functions whose first call must not be made by two threads at once have been called by one when a model is read."""

import subprocess
import sys

import pytest

from luthier.models.first_calls import FUNCTIONS

# In a process of its own: which function of PyTorch is called first, and on how much.
CALLS = """
import sys
from torch.utils._python_dispatch import TorchDispatchMode

class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__.rstrip("_")
        if args and hasattr(args[0], "numel"):
            key = name, str(args[0].dtype)
            first.setdefault(key, args[0].numel())
        return function(*args, **(kwargs or {}))

first = {}
import torch
from luthier.models.base import BaseModel
from luthier.models.load import BaseSpec
with Seen():
    BaseModel.load(BaseSpec(dtype=sys.argv[1]))
for (name, dtype), count in first.items():
    print(name, dtype, count)
"""
DIVIDED = 2048  # numbers from which PyTorch gives a function of each to several threads


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_reading_a_model_leaves_no_first_call_to_its_first_pass(dtype):
    said = subprocess.run([sys.executable, "-c", CALLS, dtype], capture_output=True, text=True, check=True).stdout
    first = {(name, kind): int(count) for name, kind, count in map(str.split, said.splitlines())}
    for name in FUNCTIONS:
        for kind in ("torch.float32", "torch.float64"):
            assert first[name, kind] < DIVIDED, (name, kind)
