from pathlib import Path

import pytest

from luthier.data.formats.promptsource import find_template, read_templates
from luthier.errors import UserError

FILE = """\
dataset: x
templates:
  id-1: !Template
    answer_choices: No ||| Yes
    id: id-1
    jinja: "{{text}}? ||| {{answer_choices[label]}}"
    metadata: &m !TemplateMetadata {original_task: true, metrics: [Accuracy]}
    name: ask
  id-2: !Template {answer_choices: null, id: id-2, jinja: "{{text}} ||| {{label}}", metadata: *m, name: ask}
"""


def test_a_file_is_read_with_tags_aliases_and_doubled_names(tmp_path: Path) -> None:
    path = tmp_path / "templates.yaml"
    path.write_text(FILE)
    entries = read_templates(path)
    assert list(entries) == ["ask", "ask [id-2]"]
    assert entries["ask"].template.parts({"text": "ok", "label": 1}, "row") == ["ok?", "Yes"]
    assert entries["ask [id-2]"].metadata == {"original_task": True, "metrics": ["Accuracy"]}
    with pytest.raises(UserError, match="no template 'aks'.*Did you mean 'ask'"):
        find_template(path, "aks")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("a: 1", "no promptsource file"),
        ("templates: [1]", "no promptsource file"),
        ("templates: {a: !Template {name: b}}", "'b' has no `jinja` text"),
        ("templates: {a: !Template {name: b, jinja: '{% if'}}", "template 'b': The template is not valid Jinja"),
        ("templates: !!python/object/apply:os.system ['echo']", "no promptsource file"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "templates.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_templates(path)


def test_all_public_files_load(shared: Path) -> None:
    files = sorted((shared / "data" / "promptsource").rglob("templates.yaml"))
    assert len(files) == 39
    count = sum(len(read_templates(path)) for path in files)
    assert count > 250
