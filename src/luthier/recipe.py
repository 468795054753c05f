"""Recipe: the one declaration of a run. Each part is declared beside what it builds; this composes them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    TypeAdapter,
    model_serializer,
    model_validator,
)

from luthier.data.load import load_examples
from luthier.data.mixture import Mixture, TaskOrMixture
from luthier.data.replay import Replay
from luthier.data.task import Examples, Task
from luthier.encoding.encoder import Encoder, PromptTokens
from luthier.files import plain_name
from luthier.metrics import metric, reading
from luthier.models.decoding import Decoding
from luthier.models.load import DEFAULT_CONTEXT, BaseSpec, context_length, read_tokenizer
from luthier.training.settings import TrainingSettings
from luthier.tuning import METHODS, Interpolation, Method, Prompting, PromptTuning

BASELINE = "base"  # the stage that scores the untouched base on the retention tasks

if TYPE_CHECKING:
    AnyMethod = Method | Prompting | Interpolation
else:  # every method is declared once, in METHODS
    AnyMethod = Annotated[Union[tuple(METHODS.values())], Field(discriminator="method")]  # noqa: UP007


class Tuning(BaseModel):
    """One named adaptation: a method with its settings, and how it is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: AnyMethod
    training: TrainingSettings = TrainingSettings()
    tasks: list[str] | None = None  # of a mixture, those to train on; None: all
    replay: Replay | None = None  # general examples to train on beside them

    @model_serializer
    def _flat(self) -> dict[str, Any]:
        flat: dict[str, Any] = TypeAdapter(AnyMethod).dump_python(self.method)
        if hasattr(self.method, "defaults"):
            flat["training"] = TypeAdapter(TrainingSettings).dump_python(self.training)
        if self.tasks is not None:
            flat["tasks"] = self.tasks
        if self.replay is not None:
            flat["replay"] = TypeAdapter(Replay).dump_python(self.replay)
        return flat


class Recipe(BaseModel):
    """Everything one run needs. Five lines are enough: base, task (train, template), tunings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: BaseSpec = Field(BaseSpec(), description="The base model: a name, directory, .gguf file or hub id.")
    task: TaskOrMixture = Field(
        description="What to learn: a task that ships with Luthier by name, its definition, or a mixture of tasks."
    )
    tunings: dict[str, Tuning] = Field(
        description="What to compare, by name: a method with its settings.", min_length=1
    )
    training: TrainingSettings = Field(TrainingSettings(), description="Training settings of every tuning.")
    retention: list[Task] = Field([], description="Tasks scored before and after, to see what a tuning forgets.")
    decoding: Decoding = Field(
        Decoding(), description="How answers are written: greedy, drawn or searched with beams; how many together."
    )
    max_length: int = Field(1024, ge=16, description="Longest row in tokens; longer prompts lose their middle.")
    allow: list[str] = Field([], description="Kinds of audit errors to go on with, as warnings.")
    seed: int = Field(0, ge=0, description="Seed of splits, shots, order and new weights.")
    seeds: list[int] = Field([], description="Training seeds: a run for each, put together in one report.")
    training_seed: int | None = Field(None, ge=0, description="Seed of order and new weights alone; default: `seed`.")
    _encoder: Encoder | None = PrivateAttr(None)
    data: str = Field(".", description="Folder in which relative data files resolve; default: the recipe's own.")

    @property
    def tasks(self) -> list[Task]:
        """The task, or the tasks of the mixture."""
        return self.task.all_tasks() if isinstance(self.task, Mixture) else [self.task]

    @property
    def replayed(self) -> list[Task]:
        """The tasks that tunings replay, each once."""
        found = {one.replay.task.name: one.replay.task for one in self.tunings.values() if one.replay}
        return list(found.values())

    def method(self, name: str) -> AnyMethod:
        """The method of a tuning, with what it takes from its tasks: the answer choices to start a prompt from."""
        tuning = self.tunings[name]
        if not isinstance(tuning.method, PromptTuning):
            return tuning.method
        chosen = [task for task in self.tasks if not tuning.tasks or task.name in tuning.tasks]
        fixed = [choice for task in chosen for choice in task.fixed_choices]
        return tuning.method.with_labels(list(dict.fromkeys(fixed)))

    @property
    def trained_with(self) -> int:
        """The seed of the order of rows, of new weights and of what training draws."""
        return self.seed if self.training_seed is None else self.training_seed

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        self._check_names()
        for name, tuning in self.tunings.items():
            if tuning.tasks is not None:
                if not isinstance(self.task, Mixture):
                    raise ValueError(f"tunings.{name}.tasks chooses from a mixture, but the recipe has one task")
                self.task.only(tuning.tasks)
            if tuning.replay is not None:
                self._check_replay(name, tuning.replay)
        self._check_interpolations()
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds, default=0) < 0 or len(self.seeds) == 1:
            raise ValueError(f"seeds holds different numbers of at least 0, two or more of them; given: {self.seeds}")
        if self.seeds and self.training_seed is not None:
            raise ValueError("seeds are training seeds: leave training_seed out")
        streamed = [task.name for task in self.tasks if task.train and task.train.stream]
        for name, tuning in self.tunings.items():
            trains = hasattr(tuning.method, "defaults") and set(tuning.tasks or streamed) & set(streamed)
            if trains and tuning.training.max_steps is None:
                raise ValueError(
                    f"the training rows of {streamed[0]!r} are streamed and not counted: say how long {name!r} is trained "
                    "with training.max_steps"
                )
            if trains and tuning.training.frozen_cache:
                raise ValueError(
                    f"the training rows of {streamed[0]!r} are streamed and seen once, so {name!r} has nothing to keep: set "
                    "training.frozen_cache to false"
                )
        for tuning in self.tunings.values():
            if tuning.training.watch == "perplexity":
                raise ValueError("training.watch: perplexity is least where the loss is, so watch `loss`")
            if tuning.training.watch not in ("loss", "accuracy"):
                metric(tuning.training.watch)
        for task in (*self.tasks, *self.retention):
            for name in task.judged_by:
                metric(name)
        if isinstance(self.task, Mixture):
            for task in self.tasks:
                if reading(task.judged_by[-1]).scale != 100:
                    raise ValueError(
                        f"the mixture's score is the mean of its tasks' main (last) metrics, but that of {task.name!r} is "
                        f"{task.judged_by[-1]}, which is no share from 0 to 1; put one that is last in its metrics"
                    )
        return self

    def _check_replay(self, name: str, replay: Replay) -> None:
        """A replayed task is told apart from all others by its name."""
        replay.beside(self.task)
        others = [*self.retention, *(one.replay.task for one in self.tunings.values() if one.replay)]
        for other in others:
            if other.name == replay.task.name and other != replay.task:
                raise ValueError(
                    f"tunings.{name}.replay: another task is named {other.name!r} too; give this one another `name`"
                )

    def _check_interpolations(self) -> None:
        """An interpolation reads the weights of a tuning that was trained before it."""
        trained: list[str] = []
        for name, tuning in self.tunings.items():
            if isinstance(tuning.method, Interpolation) and tuning.method.of not in trained:
                raise ValueError(
                    f"tunings.{name}.of names {tuning.method.of!r}, which is no trained tuning that stands before it. "
                    f"Those are: {', '.join(trained) or 'none'}"
                )
            if isinstance(tuning.method, Method):
                trained.append(name)

    def _check_names(self) -> None:
        """Tunings and tasks name files of the run directory."""
        for name in self.tunings:
            if not plain_name(name):
                raise ValueError(f"the tuning name {name!r} may hold letters, digits, '-' and '_' only")
            if name == BASELINE:
                raise ValueError(f"a tuning may not be named {name!r}: so the run names the scores of the bare base")
        parts: dict[str, str] = {}
        for task in self.tasks:
            if not task.name.isprintable() or "\\" in task.name or {"", ".", ".."} & set(task.name.split("/")):
                raise ValueError(f"the task name {task.name!r} is no relative path, which names its file of answers")
            if (other := parts.setdefault(file_part(task.name), task.name)) != task.name:
                raise ValueError(f"the answers of the tasks {other!r} and {task.name!r} would be one file; rename one")

    def encoder(self, tokenizer: Any, encoder_decoder: bool, context: int) -> Encoder:
        """The encoder this recipe means for a base."""
        chat = bool(tokenizer.chat_template) if self.base.chat == "auto" else self.base.chat
        limit = min(self.max_length, context)
        return Encoder(tokenizer, encoder_decoder=encoder_decoder, chat=chat, max_length=limit)

    def read_encoder(self) -> Encoder:
        """The encoder of the recipe's base; reads the tokenizer, not the weights, and that once."""
        if self._encoder is None:
            tokenizer, config = read_tokenizer(self.base)
            self._encoder = self.encoder(tokenizer, config.is_encoder_decoder, context_length(config, DEFAULT_CONTEXT))
        return self._encoder

    @property
    def data_folder(self) -> Path:
        """Where relative data files lie."""
        return Path(self.data)

    def examples(self, task: Task, train_only: bool = False) -> Examples:
        """A task's rows, split and rendered. Raises UserError as `load_examples` does."""
        counter = lambda: PromptTokens(self.read_encoder())  # noqa: E731
        return load_examples(task, self.data_folder, self.seed, counter=counter, train_only=train_only)


def file_part(task: str) -> str:
    """A task's name as part of a file name."""
    return task.replace("/", "-")
