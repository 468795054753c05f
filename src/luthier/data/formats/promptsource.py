"""promptsource's templates.yaml (Bach et al. 2022, https://arxiv.org/abs/2202.01279).

One file holds a dataset's templates by id; each has a name, a Jinja text and, for some, a Jinja text of
answer choices. The YAML carries class tags, which are read as plain mappings: nothing is constructed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from luthier.data.template import Template
from luthier.errors import UserError, nearest


@dataclass(frozen=True)
class Entry:
    """One template of a file: its name, what it renders, and what the file says about it."""

    name: str
    template: Template
    metadata: dict[str, Any]


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads promptsource's two tags as mappings."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    return loader.construct_mapping(node, deep=True)


for _tag in ("!Template", "!TemplateMetadata"):
    _Loader.add_constructor(_tag, _mapping)


def read_templates(path: Path) -> dict[str, Entry]:
    """All templates of a templates.yaml by name; raises UserError for a file that is none.

    Two templates of one name (promptsource allows it) keep their name and ``name [id]``.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
        raw = content["templates"]
        items = [(str(key), dict(one)) for key, one in raw.items()]
    except FileNotFoundError:
        raise UserError(f"The template file {path} does not exist.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is no promptsource file (a mapping with `templates`): {reason}") from None
    entries: dict[str, Entry] = {}
    for key, one in items:
        name = str(one.get("name", key))
        try:
            template = Template(str(one["jinja"]), one.get("answer_choices"), strict=False)
        except KeyError:
            raise UserError(f"{path}: the template {name!r} has no `jinja` text.") from None
        except UserError as error:
            raise UserError(f"{path}: template {name!r}: {error}") from error
        metadata = one.get("metadata") or {}
        entries[name if name not in entries else f"{name} [{key}]"] = Entry(name, template, dict(metadata))
    return entries


def find_template(path: Path, name: str) -> Entry:
    """One template of a file by name; an unknown one is a UserError with the nearest."""
    entries = read_templates(path)
    if name not in entries:
        raise UserError(f"{path} has no template {name!r}. {nearest(name, entries)}")
    return entries[name]
