import json
from dataclasses import replace
from pathlib import Path

import pytest

from luthier.data.library import task_files
from luthier.data.load import load_examples
from luthier.data.shots import choose_shots, similar_shots, with_shots
from luthier.data.source import Source
from luthier.data.task import Example, Task
from luthier.errors import UserError


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "train.jsonl", [{"q": f"q{n}", "a": f"a{n}"} for n in range(40)])
    return tmp_path


TEMPLATE = "Ask {{ q }} ||| {{ a }}"


def test_shares_split_once_by_seed_and_cover_every_row(folder: Path) -> None:
    task = Task(template=TEMPLATE, train=Source("train.jsonl"), validation=0.25, test=6)
    first, again, other = (load_examples(task, folder, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    ids = [example.id for split in (first.train, first.validation, first.test) for example in split]
    assert (len(first.train), len(first.validation), len(first.test)) == (24, 10, 6)
    assert sorted(ids) == sorted({f"train.jsonl:{n}" for n in range(1, 41)})


def test_references_come_from_columns_else_the_completion(folder: Path) -> None:
    write(folder / "test.jsonl", [{"q": "q", "a": "a", "r1": "x", "r2": "y"}])
    plain = Task(template=TEMPLATE, test=Source("test.jsonl"), validation=0)
    several = Task(template=TEMPLATE, test=Source("test.jsonl"), validation=0, references=["r1", "r2"])
    assert load_examples(plain, folder, 0).test[0].references == ("a",)
    assert load_examples(several, folder, 0).test[0].references == ("x", "y")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"template": "{{ q }} ||| {{ nothing }}"}, "no column 'nothing'"),
        ({"template": "{{ q }} ||| "}, "All 36 targets of the train split.*are empty"),
        ({"template": "{{ q }}"}, "no completion"),
        ({"template": "{{ q }} ||| {{ a }} ||| b"}, "3 parts"),
        ({"template": "promptsource:nowhere/x"}, "names no template"),
        ({"template": "promptsource:dialogue/sumarize"}, "Did you mean 'summarize'"),
        ({"template": "none/templates.yaml"}, "does not exist"),
        ({"template": []}, "names no template"),
        ({"validation": 0.001}, "leaves no validation rows"),
        ({"validation": 0.5, "test": 0.5}, "no row is left to train on"),
    ],
)
def test_tasks_that_cannot_work_are_refused(folder: Path, change: dict, message: str) -> None:
    settings = {"template": TEMPLATE, "train": Source("train.jsonl"), "validation": 0, "test": 4, **change}
    with pytest.raises(UserError, match=message):
        load_examples(Task(**settings), folder, 0)


def test_several_templates_are_chosen_by_seed_or_all_taken(folder: Path) -> None:
    texts = ["A {{ q }} ||| {{ a }}", "B {{ q }} ||| {{ a }}", "C {{ q }} ||| {{ a }}"]
    seeded = Task(template=texts, train=Source("train.jsonl"), validation=0, test=10)
    examples = load_examples(seeded, folder, 0)
    assert examples == load_examples(seeded, folder, 0)
    assert examples != load_examples(seeded, folder, 1)
    assert {example.prompt[0] for example in examples.train} == set("ABC")
    assert len(examples.train) == 30
    every = load_examples(
        Task(template=texts, train=Source("train.jsonl"), validation=0, test=10, template_choice="all"), folder, 0
    )
    assert len(every.train) == 90
    assert len(every.test) == 10, "each test row is asked once"


def test_promptsource_templates_by_reference_and_file(folder: Path) -> None:
    nested = folder / "glue" / "x"
    nested.mkdir(parents=True)
    (nested / "templates.yaml").write_text(
        "templates:\n  1: !Template {name: a/b, answer_choices: 'no ||| yes', jinja: '{{q}}? ||| {{answer_choices[n % 2]}}'}\n"
        "  2: !Template {name: some, jinja: '{% if n < 3 %}{{q}} ||| {{a}}{% endif %}'}\n"
    )
    write(folder / "train.jsonl", [{"q": f"q{n}", "a": f"a{n}", "n": n} for n in range(10)])
    settings = {"train": Source("train.jsonl"), "validation": 0, "test": 2}
    one = load_examples(Task(template="promptsource:glue/x/a/b", **settings), folder, 0)
    assert {example.completion for example in one.train} == {"no", "yes"}
    assert one.train[0].choices == ("no", "yes")
    part = load_examples(Task(template="promptsource:glue/x/some", **settings, template_choice="all"), folder, 0)
    assert len(part.train) + len(part.test) == 3
    assert len(part.skipped) == 7
    both = load_examples(Task(template="glue/x/templates.yaml", **settings, template_choice="all"), folder, 0)
    assert 16 <= len(both.train) + len(both.skipped) <= 18, (
        "eight training rows by two templates, and what two test rows skip"
    )


def test_a_tasks_choices_serve_a_files_template_that_has_none(folder: Path) -> None:
    (folder / "templates.yaml").write_text(
        "templates:\n  1: !Template {name: own, answer_choices: 'no ||| yes', jinja: '{{q}}? ||| no'}\n"
        "  2: !Template {name: none, answer_choices: null, jinja: '{{q}}, {{answer_choices[0]}}? ||| yes'}\n"
    )
    settings = {"train": Source("train.jsonl"), "validation": 0, "test": 2}
    asked = Task(template="templates.yaml", choices=["no", "yes"], template_choice="all", **settings)
    for example in load_examples(asked, folder, 0).train:
        assert example.choices == ("no", "yes")
        assert example.completion == "no" or example.prompt.endswith(", no?")
    with pytest.raises(UserError, match="'own' brings its own answer choices .'no ... yes'., unlike the task's"):
        load_examples(Task(template="templates.yaml", choices=["yes", "no"], **settings), folder, 0)


def test_each_row_draws_for_itself(folder: Path) -> None:
    text = "{{ [1, 2, 3, 4, 5, 6] | choice }} {{ q }} ||| {{ a }}"
    (folder / "templates.yaml").write_text(f"templates:\n  1: !Template {{name: one, jinja: '{text}'}}\n")
    for template in (text, "templates.yaml"):
        task = Task(template=template, train=Source("train.jsonl"), validation=0, test=0)
        drawn = [[example.prompt[0] for example in load_examples(task, folder, seed).train] for seed in (0, 1)]
        assert set(drawn[0]) == set("123456")
        assert drawn[0] != drawn[1]


def test_shots_are_drawn_by_seed_and_fitted_to_the_budget() -> None:
    train = [Example(str(n), f"q{n}", f"a{n}") for n in range(10)]
    shots = choose_shots(train, 3, seed=4)
    assert shots == choose_shots(train, 3, seed=4)
    assert len(set(shots)) == 3
    assert shots != choose_shots(train, 3, seed=5)
    count = lambda example: 10 + 20 * len(example.shots)  # noqa: E731
    fitted = [len(with_shots(train[0], shots, budget, count).shots) for budget in (10, 49, 50, 70, 700)]
    assert fitted == [0, 1, 2, 3, 3]
    with pytest.raises(UserError, match="11 asked for, but the training split has 10"):
        choose_shots(train, 11, seed=0)


def test_every_task_of_the_library_loads_with_the_promised_rows() -> None:
    from luthier.recipe_file import make_recipe

    sizes = {}
    for name in task_files():
        recipe = make_recipe({"task": name, "tunings": ["zero_shot"], "retention": []})
        examples = load_examples(recipe.task, Path("."), 0)
        sizes[name] = (len(examples.train), len(examples.validation), len(examples.test))
        texts = [example.prompt for split in (examples.train, examples.validation, examples.test) for example in split]
        assert len(set(texts)) == len(texts), f"{name} repeats a row"
    assert sizes["support-dialogues"] == (100, 20, 30)
    reviews = [sizes[f"product-reviews/{task}"] for task in ("rating", "writing", "headline")]
    assert reviews[0] == reviews[1] == reviews[2]
    assert sum(reviews[0]) >= 150
    assert all(sizes[name][2] >= 200 for name in ("topics", "knowledge"))
    assert sizes["instructions"][2] >= 100


def test_support_dialogues_keep_their_shape() -> None:
    from luthier.data.library import FOLDER

    count = 0
    for split in ("train", "validation", "test"):
        for line in (FOLDER / "support-dialogues" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            turns = row["dialogue"].split("\n")
            speakers = {turn.split(":")[0] for turn in turns}
            assert 4 <= len(turns) <= 16, row["dialogue"]
            assert 2 <= len(speakers) <= 4, speakers
            assert all(": " in turn for turn in turns)
            if split == "test":
                assert row["summary"] != row["summary2"]
            count += 1
    assert count >= 150


def test_stratified_splits_hold_each_value_in_its_proportion(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "label": "rare" if n % 10 == 0 else "usual"} for n in range(200)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = Task("{{ text }} ||| {{ label }}", Source("rows.jsonl"), 0.1, 0.2, stratify="label")
    for seed in range(5):
        found = load_examples(task, tmp_path, seed)
        for split, size in (("validation", 20), ("test", 40), ("train", 140)):
            labels = [example.completion for example in getattr(found, split)]
            assert len(labels) == size
            assert labels.count("rare") == size // 10
    ids = [[example.id for example in load_examples(task, tmp_path, seed).test] for seed in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2]
    with pytest.raises(UserError, match="no column 'labels' .asked for by `stratify`"):
        load_examples(replace(task, stratify="labels"), tmp_path, 0)


def test_similar_shots_are_those_with_the_questions_rare_words() -> None:
    about = [
        "the blue whale in the sea",
        "the red fox in the wood",
        "the old clock in the hall",
        "the fox and the hall",
    ]
    train = [Example(str(n), text, f"a{n}") for n, text in enumerate(about)] + [
        Example("no", "the fox and the clock", "")
    ]
    questions = [
        Example("q", "where is the fox in the wood?", "x"),
        Example("r", "THE CLOCK!", "x"),
        Example("s", "?", "x"),
    ]
    first, second, none = similar_shots(train, questions, 2, seed=0)
    assert first == [("the red fox in the wood", "a1"), ("the fox and the hall", "a3")]
    assert second[0] == ("the old clock in the hall", "a2")
    assert len(set(none)) == 2, "with no word in common there still are shots"
    assert similar_shots(train, questions, 2, seed=0) == [first, second, none]
    # The likest stands right before the question and is dropped last.
    count = lambda one: 10 * (1 + len(one.shots))  # noqa: E731
    assert with_shots(questions[0], first, 30, count, first_last=True).shots == tuple(first[::-1])
    assert with_shots(questions[0], first, 20, count, first_last=True).shots == (first[0],)
    with pytest.raises(UserError, match="5 asked for, but the training split has 4"):
        similar_shots(train, questions, 5, seed=0)


def test_a_missing_bm25s_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.data.shots.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"selection: similar needs the package bm25s.*luthier\[similar\]"):
        similar_shots([], [], 1, seed=0)


@pytest.mark.parametrize("count", [0, 1, 2, 8, 9, 50])
def test_as_many_shots_as_fit_are_found_without_counting_all(count: int) -> None:
    shots = [("q" * (1 + 7 * place % 11), "a") for place in range(count)]
    question, tokens = Example("q", "what", "that"), lambda one: sum(len(a) + len(b) for a, b in one.shots) + 8
    for budget in range(0, 8 + sum(len(a) + 1 for a, _ in shots) + 3, 3):
        fit = max(
            (
                kept
                for kept in range(count + 1)
                if tokens(Example("q", "what", "that", shots=tuple(shots[:kept]))) <= budget
            ),
            default=0,
        )
        assert with_shots(question, shots, budget, tokens).shots == tuple(shots[:fit])
        assert with_shots(question, shots, budget, tokens, first_last=True).shots == tuple(shots[:fit][::-1])
    counted: list[int] = []
    with_shots(question, [("q", "a")] * 500, 30, lambda one: counted.append(len(one.shots)) or tokens(one))
    assert max(counted) <= 16, "never more than twice as many as fit"
