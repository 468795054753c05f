import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from luthier.errors import UserError
from luthier.recipe_file import load_recipe, make_recipe, recipe_yaml
from luthier.recipe_schema import recipe_schema
from luthier.tuning import METHODS

FIVE_LINES = """\
base: smollm2-135m-instruct
task:
  train: my.jsonl
  template: "Sum up: {{ text }} ||| {{ summary }}"
tunings: [zero_shot, lora]
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text(FIVE_LINES)
    return path


def test_five_lines_are_enough(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert list(recipe.tunings) == ["zero_shot", "lora"]
    assert recipe.tunings["lora"].method.rank == 8
    assert recipe.data == str(recipe_file.parent)
    assert [task.name for task in recipe.retention] == ["topics", "knowledge", "instructions"]


def test_the_resolved_recipe_reads_back_as_itself(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["training.epochs=7", "tunings.lora.training.batch_size=3"])
    assert recipe.tunings["lora"].training.epochs == 7
    assert recipe.tunings["lora"].training.batch_size == 3
    assert make_recipe(yaml.safe_load(recipe_yaml(recipe))) == recipe


@pytest.mark.parametrize(
    ("change", "read"),
    [
        ("training.epochs=2", lambda r: r.tunings["lora"].training.epochs == 2),
        ("tunings.lora.rank=32", lambda r: r.tunings["lora"].method.rank == 32),
        ("tunings.small={method: lora, rank: 1}", lambda r: r.tunings["small"].method.rank == 1),
        ("task.test.limit=5", None),
        ("base=gpt2-dir", lambda r: r.base.model == "gpt2-dir"),
        ("base.dtype=float32", lambda r: r.base.dtype == "float32"),
        ("task.test=t.jsonl", lambda r: r.task.test.path == "t.jsonl"),
        ("task.validation=0.3", lambda r: r.task.validation == 0.3),
        ("task=support-dialogues", lambda r: r.task.name == "support-dialogues"),
        ("seed=4", lambda r: r.seed == 4),
    ],
)
def test_set_changes_one_setting(recipe_file: Path, change: str, read) -> None:
    if read is None:
        with pytest.raises(UserError, match=r"'task\.test\.path' is missing"):
            load_recipe(recipe_file, [change])
    else:
        assert read(load_recipe(recipe_file, [change]))


def test_a_shared_setting_on_the_command_line_reaches_every_tuning(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "task: support-dialogues\ntraining: {epochs: 9}\n"
        "tunings: {lora: {training: {epochs: 1, batch_size: 2}}, full: {}, zero_shot: {}}\n"
    )
    plain = load_recipe(path)
    assert [plain.tunings[name].training.epochs for name in ("lora", "full")] == [1, 9]
    changed = load_recipe(path, ["training.epochs=2"])
    assert [changed.tunings[name].training.epochs for name in ("lora", "full")] == [2, 2]
    assert changed.tunings["lora"].training.batch_size == 2
    last = load_recipe(path, ["training.epochs=2", "tunings.lora.training.epochs=5"])
    assert [last.tunings[name].training.epochs for name in ("lora", "full")] == [5, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("trainning.epochs=2", r"unknown key 'trainning'\. Did you mean 'training'"),
        ("training.epoch=2", r"^\S+: unknown key 'training\.epoch'\. Did you mean 'epochs'\?$"),
        ("tunings.lora.rnak=2", r"unknown key 'tunings\.lora\.rnak'\. Did you mean 'rank'"),
        ("tunings.zero_shot.rank=2", r"unknown key 'tunings\.zero_shot\.rank'"),
        ("tunings.lora.method=lorra", r"unknown method 'lorra'\. Did you mean 'lora'"),
        ("tunings.x={}", r"unknown method 'x'"),
        (
            "training.gradient_checkpointing=maybe",
            r"'training.gradient_checkpointing': input should be a valid boolean, unable to interpret input, or input should "
            r"be a valid number, unable to parse string as a number \(given: 'maybe'\)",
        ),
        ("training.gradient_checkpointing=-0.1", r"gradient_checkpointing is -0.1; it is true, false or a share"),
        ("training.gradient_checkpointing=.nan", r"gradient_checkpointing is nan"),
        ("base.chat=perhaps", r"'base.chat': input should be"),
        ("training.bool=1", r"unknown key 'training.bool'"),
        ("tunings.lora.rank=0", r"'tunings\.lora\.rank'|rank is 0; it must be at least 1"),
        ("tunings.lora.rank=eight", r"'tunings\.lora\.rank': .*valid integer.*'eight'"),
        ("training.learning_rate=-1", r"learning_rate is -1"),
        ("task.train={path: x, colums: {}}", r"unknown key 'task\.train\.colums'\. Did you mean 'columns'"),
        ("task.metrics=[rouge7]", r"Unknown metric 'rouge7'"),
        ("task=suport-dialogues", r"unknown task 'suport-dialogues'\. Did you mean 'support-dialogues'"),
        ("base.dtype=bf16", r"'base\.dtype'.*'bfloat16'"),
        ("base.modle=x", r"unknown key 'base\.modle'\. Did you mean 'model'"),
        ("retention=[topcs]", r"unknown task 'topcs'\. Did you mean 'topics'"),
        ("tunings={}", r"'tunings'"),
        ("justaword", r"not of the form"),
        ("seed.x=3", r"seed"),
        ("tunings.zero_shot.training={epochs: 2}", r"nothing is trained"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_message_with_what_is_allowed(recipe_file: Path, change: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(recipe_file, [change])


@pytest.mark.parametrize("name", ["../../evil", "/evil", "lora.trained", "a b", "", "base"])
@pytest.mark.parametrize("method", ["zero_shot", "lora"])
def test_a_tuning_may_not_be_named_so(recipe_file: Path, name: str, method: str) -> None:
    content = yaml.safe_load(recipe_file.read_text()) | {"tunings": {name: {"method": method}}}
    with pytest.raises(UserError, match="letters, digits|may not be named 'base'"):
        make_recipe(content)


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../b", "..", "", "a\\b", "a\0b"])
def test_a_task_may_not_be_named_so(recipe_file: Path, name: str) -> None:
    content = yaml.safe_load(recipe_file.read_text())
    content["task"]["name"] = name
    with pytest.raises(UserError, match="is no relative path"):
        make_recipe(content)


def test_two_tasks_do_not_share_a_file_of_answers(recipe_file: Path) -> None:
    content = yaml.safe_load(recipe_file.read_text())
    tasks = [{"task": content["task"] | {"name": name, "metrics": ["rougeL"]}} for name in ("a/b", "a-b")]
    with pytest.raises(UserError, match="would be one file"):
        make_recipe(content | {"task": {"tasks": tasks}})
    tasks[1]["task"]["name"] = "a/c"
    assert len(make_recipe(content | {"task": {"tasks": tasks}}).tasks) == 2


def test_every_mistake_is_named_at_once(recipe_file: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(recipe_file, ["sed=1", "tunings.lora.rnk=2", "base.devise=cpu"])
    assert all(word in str(caught.value) for word in ("'sed'", "'tunings.lora.rnk'", "'base.devise'", str(recipe_file)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("a: [", "not valid YAML"),
        ("- a", "named keys"),
        ("tunings: [lora]", "'task' is missing"),
    ],
)
def test_unreadable_recipes(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "r.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_recipe(path)


def test_every_method_is_a_tuning_with_its_defaults(recipe_file: Path) -> None:
    names = ", ".join(METHODS)
    given = {name: {"of": "lora"} if name == "interpolate" else {} for name in METHODS}
    recipe = load_recipe(recipe_file, [f"tunings={json.dumps(given)}"])
    assert list(recipe.tunings) == list(METHODS), names
    assert {type(tuning.method) for tuning in recipe.tunings.values()} == set(METHODS.values())
    assert make_recipe(yaml.safe_load(recipe_yaml(recipe))) == recipe
    for name, kind in METHODS.items():
        definition = next(
            one for one in recipe_schema()["$defs"]["Tuning"]["anyOf"] if one.get("title") == kind.__name__
        )
        assert definition["properties"]["method"] == {"const": name}


def test_lists_of_shots_and_draws_are_tunings(recipe_file: Path) -> None:
    recipe = load_recipe(
        recipe_file, ["tunings={few: {method: few_shot, shots: [1, 4], draw: [0, 2]}, few_shot: {shots: [3]}}"]
    )
    found = {name: (tuning.method.shots, tuning.method.draw) for name, tuning in recipe.tunings.items()}
    assert found == {
        "few_1_draw0": (1, 0), "few_1_draw2": (1, 2), "few_4_draw0": (4, 0), "few_4_draw2": (4, 2), "few_shot_3": (3, 0),
    }  # fmt: skip
    for wrong, message in (
        ("[]", r"tunings.few.shots: a list holds different numbers, at least one; given: \[\]"),
        ("[2, 2]", r"different numbers.*\[2, 2\]"),
        ("[2, 0]", "shots is 0"),
    ):
        with pytest.raises(UserError, match=message):
            load_recipe(recipe_file, [f"tunings={{few: {{method: few_shot, shots: {wrong}}}}}"])


def test_a_prompt_may_start_from_the_tasks_choices(recipe_file: Path) -> None:
    start = "tunings.prompt_tuning={init: class_labels}"
    for choices, labels in (("yes ||| no", ["yes", "no"]), (["red", "blue"], ["red", "blue"]), ("{{ a }}", [])):
        recipe = load_recipe(recipe_file, [start, f"task.choices={json.dumps(choices)}", "task.metrics=[accuracy]"])
        assert recipe.method("prompt_tuning").labels == labels
        assert recipe.tunings["prompt_tuning"].method.labels == []
    given = load_recipe(recipe_file, ["tunings.prompt_tuning={init: class_labels, labels: [a]}"])
    assert given.method("prompt_tuning").labels == ["a"]


def test_the_schema_accepts_the_examples_and_refuses_a_misspelt_key() -> None:
    schema = recipe_schema()
    examples = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"))
    assert examples
    for path in examples:
        jsonschema.validate(yaml.safe_load(path.read_text()), schema)
        load_recipe(path)
    jsonschema.validate(yaml.safe_load(FIVE_LINES), schema)
    wrong = yaml.safe_load(FIVE_LINES) | {"tunings": {"a": {"method": "lora", "rnk": 2}}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)
    json.dumps(schema)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "examples").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_examples_are_recipes(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.tunings and make_recipe(yaml.safe_load(recipe_yaml(recipe))) == recipe, (
        "what a run writes down is the same"
    )
