"""Replay: some of what was known before, trained on beside what is new."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from luthier.data.mixture import Member, Mixture
from luthier.data.task import Task


@dataclass(frozen=True)
class Replay:
    """General examples beside what is to be learnt, against forgetting (Robins 1995, Connection Science 7(2)).

    `share` of all draws are training rows of `task`; its held-out rows are not used, so all of its rows are trained on.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    task: Task
    share: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share is {self.share}; it must be above 0 and below 1")
        if self.task.train is None or self.task.train.stream:
            raise ValueError(f"the task {self.task.name!r} needs training rows in a file (`train`, not streamed)")
        object.__setattr__(self, "task", replace(self.task, validation=0.0, test=0.0, stratify=None))

    def beside(self, own: "Task | Mixture") -> Mixture:
        """The mixture of what is to be learnt and what is replayed."""
        return Mixture([Member(own, 1 - self.share), Member(self.task, self.share)], name=f"{own.name} with replay")
