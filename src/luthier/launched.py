"""The processes that torchrun or `accelerate launch` started for one run: which this one is, and what they tell each other.

Both set the same variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR ...). A few words pass through torch's key-value
store at that address: where the run is, which stages are left, and the first failure, so that no process waits for one
that is gone and one of them says what happened. Numbers pass between the stages' processes (`training/ranks.py`).
"""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

from luthier.errors import Interrupted, UserError

# Seconds between looks at the store.
LOOK = 0.1
# Seconds that a process which lost its peers waits for word of why.
WORD = 10.0


@dataclass(frozen=True)
class Failure:
    """Why the run cannot go on: an exit code (2: a user's mistake, 3: a stop that was asked for, else a bug) and words."""

    code: int
    message: str

    def error(self) -> BaseException:
        """What to raise for it."""
        if self.code == 2:
            return UserError(self.message)
        return Interrupted(self.message) if self.code == 3 else SystemExit(self.code)


class Launched:
    """One of several processes; `hosts`: whether it may be the one that keeps the store, where no launcher does."""

    def __init__(self, variables: Mapping[str, str], hosts: bool = True):
        def number(key: str, default: str | None = None) -> int:
            given = variables.get(key, default)
            if given is None or not given.isdecimal():
                raise UserError(
                    f"WORLD_SIZE is set, so this is one of several processes, but {key} is {given!r}. Start them with "
                    "torchrun or `accelerate launch`, or unset WORLD_SIZE."
                )
            return int(given)

        self.rank, self.size = number("RANK"), number("WORLD_SIZE")
        self.local_rank = number("LOCAL_RANK", str(self.rank))
        self.local_size = number("LOCAL_WORLD_SIZE", str(self.size))
        self._address, self._port = variables.get("MASTER_ADDR", "localhost"), number("MASTER_PORT")
        kept = variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._hosts = hosts and self.rank == 0 and not kept
        self._prefix = f"luthier/{variables.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._store: Any = None

    def store(self, part: str = "words") -> Any:
        """A part of the store to which every process has access."""
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        if self._store is None:
            try:
                self._store = TCPStore(
                    self._address,
                    self._port,
                    is_master=self._hosts,
                    wait_for_workers=False,
                    timeout=timedelta(minutes=5),
                )
            except RuntimeError as error:
                raise UserError(
                    f"Rank {self.rank} found no store at {self._address}:{self._port}: {str(error).splitlines()[0]} "
                    "Rank 0 must run there, and its port be open to the other machines."
                ) from None
        return PrefixStore(f"{self._prefix}/{part}", self._store)

    def tell(self, key: str, value: object) -> None:
        """Leave a word for the others."""
        self.store().set(key, json.dumps(value))

    def ask(self, key: str) -> Any:
        """A word that another process leaves, waited for; raises what made the run fail where it does."""
        while not self.heard(key, within=LOOK):
            if failure := self.failure():
                raise failure.error()
        return json.loads(self.store().get(key))

    def heard(self, key: str, within: float = 0.0) -> bool:
        """Whether a word is there, or comes within so many seconds."""
        until = time.monotonic() + within
        while not self.store().check([key]):
            if time.monotonic() >= until:
                return False
            time.sleep(LOOK)
        return True

    def part(self) -> None:
        """Leave for good; the rank that keeps the store stays until the others have left."""
        self.tell(f"left/{self.rank}", True)
        if self._hosts:
            for rank in range(1, self.size):
                self.heard(f"left/{rank}", within=WORD)

    def fail(self, failure: Failure) -> Failure:
        """Tell all that the run failed; the first failure told is the run's, and returned."""
        told = json.dumps([failure.code, failure.message])
        return Failure(*json.loads(self.store().compare_set("failure", "", told)))

    def failure(self, within: float = 0.0) -> Failure | None:
        """What made the run fail, if anything did within so many seconds."""
        try:
            if not self.heard("failure", within):
                return None
            return Failure(*json.loads(self.store().get("failure")))
        except RuntimeError:
            return Failure(2, "Rank 0, which keeps the store, is gone. What was saved is kept: continue with --resume.")


@cache
def launched(hosts: bool = True) -> Launched | None:
    """This process among those that a launcher started; None where it runs alone."""
    if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        return None
    return Launched(os.environ, hosts)
