"""Using a finished run: one base in memory, its tunings by name."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from luthier.data.formats.chat import LOGS, read_conversation
from luthier.data.task import Example, Task
from luthier.data.templates import AnyTemplate, chosen_templates
from luthier.directory import RunDirectory
from luthier.errors import UserError, nearest
from luthier.models.base import BaseModel
from luthier.models.decoding import Decoding
from luthier.models.generate import generate
from luthier.tuning import BestTemplate, FewShot, Interpolation, Method
from luthier.tuning.files import load_tuning


class Session:
    """A run opened for use. Naming another tuning switches the task on the same loaded base."""

    def __init__(self, run: str | Path):
        self.directory = RunDirectory.open(Path(run))
        self.recipe = self.directory.recipe()
        self.base = BaseModel.load(self.recipe.base)
        self.encoder = self.recipe.encoder(self.base.tokenizer, self.base.encoder_decoder, self.base.context)

    def generate(
        self,
        texts: Sequence[str | Mapping[str, Any]],
        tuning: str | None = None,
        *,
        task: str | None = None,
        raw: bool = False,
        max_new_tokens: int | None = None,
        decoding: Decoding | None = None,
    ) -> list[str]:
        """Answer texts with a tuning of the run (None: the bare base), decoded as the recipe says or as given.

        A mapping fills the task's template by name, a text where it has a single variable; with `raw` a
        text is the prompt itself. `task` names one of a mixture, whose template is then used. Raises UserError for an unknown tuning and for a prompt longer than the context.
        """
        reserve = self._use(tuning)
        asked = self._worded(tuning, self._task(task, raw))
        new_tokens = max_new_tokens or asked.max_new_tokens
        prompts = []
        for number, text in enumerate(texts, 1):
            prompt = self.encoder.prompt_ids(self._example(asked, text, raw, number))
            room = self.encoder.max_length - reserve - (0 if self.encoder.encoder_decoder else new_tokens)
            if len(prompt) > room:
                raise UserError(
                    f"Text {number} makes a prompt of {len(prompt)} tokens; {room} fit into {self.encoder.max_length} "
                    f"less {new_tokens} for the answer{f' and {reserve} virtual tokens' if reserve else ''}. Shorten it, "
                    "lower --max-new-tokens or raise max_length in the recipe."
                )
            prompts.append(prompt)
        chosen = decoding or self.recipe.decoding
        written = generate(self.base, prompts, new_tokens, self.encoder.stops, decoding=chosen)
        return [self.encoder.decode(ids) for ids in written]

    def _use(self, tuning: str | None) -> int:
        if tuning is None:
            self.base.use(None)
            return 0
        own = tuning.partition("@")[0]  # NAME@STEP is a snapshot of NAME
        if own not in self.recipe.tunings:
            raise UserError(
                f"The run {self.directory.path} holds no tuning {tuning!r}. {nearest(tuning, self.recipe.tunings)}"
            )
        method = self.recipe.tunings[own].method
        if isinstance(method, FewShot):
            raise UserError(
                f"{tuning!r} shows training examples in its prompt and saved nothing. Use a trained tuning, or put "
                "the examples into the text with --raw."
            )
        if not isinstance(method, (Method, Interpolation)):
            self.base.use(None)
            return 0
        if tuning not in self.base.methods:
            load_tuning(self.base, self.directory.tuning(tuning), tuning)
        self.base.use(tuning)
        tokens: int = self.base.methods[tuning].virtual_tokens()
        return tokens

    def trained(self, tuning: str) -> Method:
        """Put a trained tuning of the run in use and return its method; raises UserError for one that trains nothing."""
        self._use(tuning)
        if tuning not in self.base.methods:
            kinds = (Method, Interpolation)
            names = [name for name, one in self.recipe.tunings.items() if isinstance(one.method, kinds)]
            raise UserError(
                f"{tuning!r} is the base as it is: nothing was trained. Trained tunings: {', '.join(names) or 'none'}."
            )
        method: Method = self.base.methods[tuning]
        return method

    def _task(self, name: str | None, raw: bool) -> Task:
        tasks = {task.name: task for task in self.recipe.tasks}
        if name is None and (len(tasks) == 1 or raw):
            return self.recipe.tasks[0]
        if name is None:
            raise UserError(f"The run is of several tasks: say which with --task. Allowed: {', '.join(tasks)}.")
        if name not in tasks:
            raise UserError(f"The run {self.directory.path} has no task {name!r}. {nearest(name, tasks)}")
        return tasks[name]

    def _template(self, task: Task) -> AnyTemplate:
        """The task's template, the first where it has several."""
        return chosen_templates(task, Path(self.recipe.data))[0].template

    def _worded(self, tuning: str | None, task: Task) -> Task:
        """The task with the template that a best_template chose for it."""
        method = self.recipe.tunings[tuning].method if tuning in self.recipe.tunings else None
        found = self.directory.result(tuning) if tuning and isinstance(method, BestTemplate) else None
        if found is None or not isinstance(method, BestTemplate):
            return task
        number = next(one["number"] for one in found["templates"][task.name] if one["chosen"])
        return replace(task, template=method.templates or task.template, template_choice=number)

    def _example(self, task: Task, text: str | Mapping[str, Any], raw: bool, number: int) -> Example:
        if task.format:
            return self._chat(task, text, number)
        if isinstance(text, Mapping):
            prompt = self._template(task).render_prompt(text, f"text {number}")
        elif raw:
            prompt = text
        else:
            template = self._template(task)
            variables = template.prompt_variables()
            if len(variables) != 1:
                raise UserError(
                    f"The template of task {task.name!r} uses {len(variables)} variables in its prompt "
                    f"({', '.join(sorted(variables))}), so a single text cannot fill it. Give each by name (a JSON object a line, with --file), or the "
                    "whole prompt with --raw."
                )
            prompt = template.render_prompt({variables.pop(): text}, f"text {number}")
        return Example(f"text {number}", prompt, "", system=task.system)

    def _chat(self, task: Task, text: str | Mapping[str, Any], number: int) -> Example:
        """A question as it is, or a row of the task's format with the turns so far."""
        assert task.format is not None
        if isinstance(text, str):
            return Example(f"text {number}", text, "", system=task.system)
        column, speaker, said = LOGS.get(task.format, ("", "", ""))
        open_ended = {**text, "output": ""} if task.format == "alpaca" else dict(text)
        if column and isinstance(text.get(column), list):
            open_ended[column] = [*text[column], {speaker: "assistant", said: ""}]
        found = read_conversation(open_ended, task.format, f"text {number}")
        *earlier, (prompt, _) = found.exchanges
        return Example(f"text {number}", prompt, "", system=found.system or task.system, shots=tuple(earlier))
