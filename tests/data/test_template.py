import pytest

from luthier.data.template import Template
from luthier.errors import UserError


def test_prompt_and_completion_are_stripped_and_fields_never_split() -> None:
    template = Template(" Sum up: {{ text }} \n||| {{ summary }} \n")
    assert template.parts({"text": "a ||| b", "summary": " s "}, "row") == ["Sum up: a ||| b", "s"]


def test_html_is_not_escaped() -> None:
    assert Template("{{ t }} ||| x").parts({"t": "<a> & 'b'"}, "row")[0] == "<a> & 'b'"


def test_no_separator_means_no_completion() -> None:
    assert Template("{{ t }}").parts({"t": "x"}, "row") == ["x"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ dialog }} ||| {{ s }}", r"no column 'dialog'.*Did you mean 'dialogue'"),
        ("{{ dialogue }} ||| {{ zzz }}", r"no column 'zzz'.*dialogue, s"),
        ("{{ dialogue.title.x }} ||| s", "lacks"),
        ("{{ 1 / 0 }} ||| b", "ZeroDivisionError"),
    ],
)
def test_what_a_row_cannot_fill_is_explained(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Template(text).parts({"dialogue": "d", "s": "t"}, "file:3")


def test_broken_jinja_names_the_line() -> None:
    with pytest.raises(UserError, match="not valid Jinja, line 2"):
        Template("ok\n{{ a ||| b")


def test_a_template_that_is_nested_too_deeply_is_refused() -> None:
    with pytest.raises(UserError, match="nested too deeply"):
        Template("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }} ||| x")


@pytest.mark.parametrize(
    "attack",
    ["{{ ''.__class__.__mro__ }}", "{{ x.__init__.__globals__ }}", "{{ self.__dict__ }}"],
)
def test_the_sandbox_holds(attack: str) -> None:
    with pytest.raises(UserError):
        Template(f"{attack} ||| b").parts({"x": [1]}, "row")


def test_choices_are_a_list_or_a_template() -> None:
    assert Template("p ||| a", ["a", "b"]).choices({}, "row") == ("a", "b")
    assert Template("p ||| a", "{{ c | join('|||') }}").choices({"c": ["x y", "z"]}, "row") == ("x y", "z")
    assert Template("p ||| a").choices({}, "row") is None


def test_prompt_variables_are_those_before_the_separator() -> None:
    template = Template("{{ a }} {% if b %}x{% endif %} ||| {{ c }}")
    assert template.prompt_variables() == {"a", "b"}
    assert Template("Say {{ a }} ||| {{ c }}").render_prompt({"a": "hi"}, "text") == "Say hi"


def test_a_block_may_hold_prompt_and_completion() -> None:
    text = "{% if a %}Say {{ a }} ||| {{ answer_choices[label] }}{% endif %}"
    template = Template(text, "no ||| yes", strict=False)
    assert template.prompt_variables() == {"a", "label"}
    assert template.render_prompt({"a": "hi ||| there"}, "text") == "Say hi ||| there"
    asked = Template("{{ a }} {{ answer_choices[1] }}? ||| x", "no ||| yes", strict=False)
    assert asked.prompt_variables() == {"a"}
    assert asked.render_prompt({"a": "hi"}, "text") == "hi yes?"
    own = Template("{% if a %}Say {{ a }} ||| {{ b }}{% endif %}")
    assert own.render_prompt({"a": "hi"}, "text") == "Say hi"
    with pytest.raises(UserError, match="text 1: the template gives no prompt. It uses a, b; the row has: b"):
        own.render_prompt({"b": "hi"}, "text 1")


def test_draws_are_decided_by_the_seed_alone() -> None:
    template = Template("{{ ['a', 'b', 'c', 'd'] | choice }} {{ items | random }} ||| x")
    row = {"items": list(range(50))}
    drawn = [template.parts(row, "row", seed=seed)[0] for seed in range(20)]
    assert drawn == [template.parts(row, "row", seed=seed)[0] for seed in range(20)]
    assert len({text.split()[0] for text in drawn}) == 4
    assert len({text.split()[1] for text in drawn}) > 10
