"""What a chat template puts around a question, where it provably puts nothing into it and nothing in its place.

A template is a program: it may trim what is said, or look at it. One that only writes it out gives, for every question,
the same text before it and after it; then it need not run for each. That is read off its syntax, not tried.
"""

from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes

_MARK = "\u2402question\u2402"


@lru_cache(maxsize=16)
def writes_out_only(template: str) -> bool:
    """Whether the template uses the messages' content in no way but writing it out as it is."""
    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except jinja2.TemplateSyntaxError:
        return False
    above: dict[int, nodes.Node] = {}
    for node in _every(tree):
        for child in node.iter_child_nodes():
            above[id(child)] = node
    messages = {"messages"}
    messages |= {
        loop.target.name
        for loop in tree.find_all(nodes.For)
        if isinstance(loop.iter, nodes.Name) and loop.iter.name == "messages" and isinstance(loop.target, nodes.Name)
    }
    for name in tree.find_all(nodes.Name):
        if name.name in messages and name.ctx == "load" and not _harmless(name, above):
            return False
    return True


def frame(tokenizer: Any, system: str | None) -> tuple[str, str] | None:
    """The text before and after a question (with a system prompt); None where it depends on the question."""
    if not isinstance(tokenizer.chat_template, str) or not writes_out_only(tokenizer.chat_template):
        return None
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": _MARK})
    before, mark, after = str(
        tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ).partition(_MARK)
    return (before, after) if mark and _MARK not in after else None


def _harmless(name: nodes.Node, above: dict[int, nodes.Node]) -> bool:
    """Whether a use of the messages is a loop over them, a look at something else than content, or content written out."""
    parent = above[id(name)]
    if isinstance(parent, nodes.For):
        return parent.iter is name
    node: nodes.Node = name
    while isinstance(parent, (nodes.Getitem, nodes.Getattr)) and parent.node is node:
        key = parent.attr if isinstance(parent, nodes.Getattr) else getattr(parent.arg, "value", None)
        if isinstance(key, str):
            return key in ("role", "name") or (key == "content" and _written_out(parent, above))
        if not isinstance(key, int):
            return False  # a slice, or what a variable says
        node, parent = parent, above[id(parent)]
    return False


def _written_out(node: nodes.Node, above: dict[int, nodes.Node]) -> bool:
    parent = above[id(node)]
    while isinstance(parent, (nodes.Add, nodes.Concat)):
        parent = above[id(parent)]
    return isinstance(parent, nodes.Output)


def _every(node: nodes.Node) -> list[nodes.Node]:
    found = [node]
    for child in node.iter_child_nodes():
        found += _every(child)
    return found
