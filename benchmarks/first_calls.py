"""How often a process's first cosine differs from its second, as two threads make it together, and after one thread called it once.

`python benchmarks/first_calls.py [SECONDS]`: processes forked one after the other, in turns; each computes cosines and sines of the
same 2048 x 64 numbers twice.
"""

import collections
import os
import sys
import time

import numpy
import torch

from luthier.models.first_calls import call_once


def differs(numbers: torch.Tensor, called: bool) -> bool:
    """Whether the first results of a fresh process differ from its second in a bit; `called`, after `call_once`."""
    child = os.fork()
    if child == 0:
        if called:
            call_once()
        same = all(torch.equal(f(numbers), f(numbers)) for f in (torch.cos, torch.sin))
        os._exit(0 if same else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0


def main() -> None:
    # Made without PyTorch: a forked process hangs in its first operation where its parent had threads.
    numbers = torch.from_numpy(numpy.random.default_rng(1).normal(0, 300, (2048, 64)).astype("float32"))
    until = time.monotonic() + float(sys.argv[1] if len(sys.argv) > 1 else 120)
    count, different = 0, collections.Counter[bool]()
    while time.monotonic() < until:
        count += 1
        for called in (False, True):
            different[called] += differs(numbers, called)
    for called in (False, True):
        print(f"{'after call_once' if called else 'as they come':16s} {different[called]} of {count} processes differ")


if __name__ == "__main__":
    main()
