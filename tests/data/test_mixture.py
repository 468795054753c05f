"""Mixtures: rates as their formulas have them, and an order that is a function of (seed, k)."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from luthier.data.forms import in_form
from luthier.data.mixture import (
    FLAN2022,
    INVERTED_WEIGHT,
    Draws,
    Entry,
    Member,
    Mixture,
    entries,
    epoch_size,
    flan2022,
    scattered,
)
from luthier.data.stored import ExampleFile, StoredExamples, packed
from luthier.data.task import Example, Examples, Task
from luthier.errors import UserError
from luthier.recipe_file import make_recipe


def task(name: str) -> Task:
    return Task(template="{{ a }} ||| {{ b }}", name=name, train=None)


def rates(mixture: Mixture, sizes: dict[str, int]) -> dict[str, float]:
    found: dict[str, float] = Counter()
    for entry in entries(mixture, lambda one: sizes[one.name]):
        found[entry.task.name] += entry.rate
    return found


SIZES = {"a": 100, "b": 900, "c": 9000}
PLAIN = [Member(task(name)) for name in SIZES]


def test_rates_follow_their_formulas() -> None:
    assert rates(Mixture(PLAIN), SIZES) == pytest.approx({"a": 0.01, "b": 0.09, "c": 0.9})
    assert rates(Mixture(PLAIN, cap=900), SIZES) == pytest.approx({"a": 1 / 19, "b": 9 / 19, "c": 9 / 19})
    roots = {name: size**0.5 for name, size in SIZES.items()}
    expected = {name: root / sum(roots.values()) for name, root in roots.items()}
    assert rates(Mixture(PLAIN, temperature=2), SIZES) == pytest.approx(expected)
    explicit = Mixture([replace(one, rate=rate) for one, rate in zip(PLAIN, (1, 1, 2), strict=True)])
    assert rates(explicit, SIZES) == pytest.approx({"a": 0.25, "b": 0.25, "c": 0.5})
    nested = Mixture([Member(Mixture(PLAIN[:2], name="inner"), rate=3), Member(task("c"), rate=1)])
    assert rates(nested, SIZES) == pytest.approx({"a": 0.075, "b": 0.675, "c": 0.25})
    # Without rates an inner mixture weighs as much as its tasks.
    assert rates(Mixture([Member(Mixture(PLAIN[:2], name="inner")), PLAIN[2]]), SIZES) == pytest.approx(
        rates(Mixture(PLAIN), SIZES)
    )
    assert epoch_size(Mixture(PLAIN, cap=900), lambda one: SIZES[one.name]) == 1900


def test_forms_share_a_tasks_rate() -> None:
    mixture = Mixture([Member(task("a"), forms={"zero_shot": 3, "few_shot": 1}), Member(task("b"))])
    found = entries(mixture, lambda one: 100)
    assert [(one.task.name, one.form, one.rate) for one in found] == [
        ("a", "zero_shot", 0.375), ("a", "few_shot", 0.125), ("b", "zero_shot", 0.5),
    ]  # fmt: skip


def test_one_task_alone_keeps_the_others_out() -> None:
    nested = Mixture([Member(Mixture(PLAIN[:2], name="inner"), rate=3), Member(task("c"), rate=1)])
    assert rates(nested.only(["b"]), SIZES) == {"b": 1.0}
    with pytest.raises(UserError, match="no task 'bb'.*Did you mean 'b'"):
        nested.only(["bb"])


@pytest.mark.parametrize("case", range(4))
def test_flan_2022_by_its_two_levels(shared: Path, case: int) -> None:
    gold = json.loads((shared / "gold" / "mixture_rates.json").read_text())["C_two_level"][case]
    members, sizes = [], {}
    for name, given in gold["categories"].items():
        sizes |= given["tasks"]
        inner = Mixture([Member(task(one)) for one in given["tasks"]], name=name, cap=given["cap"])
        members.append(Member(inner, rate=given["weight"]))
    assert rates(Mixture(members), sizes) == pytest.approx(gold["expected"], abs=6e-9)
    if case == 0:  # its weights and caps are the preset's
        sources = {
            name: [{"name": one, "template": "x ||| y"} for one in given["tasks"]]
            for name, given in gold["categories"].items()
        }
        recipe = make_recipe({"task": {"preset": "flan2022", "sources": sources}, "tunings": ["zero_shot"]})
        assert isinstance(recipe.task, Mixture)
        assert rates(recipe.task, sizes) == pytest.approx(gold["expected"], abs=6e-9)
        shares = Counter()
        for one in entries(recipe.task, lambda one: sizes[one.name]):
            shares[one.form] += one.rate
        assert shares == pytest.approx(
            {"zero_shot": 0.18, "few_shot": 0.18, "zero_shot_options": 0.32, "few_shot_options": 0.32}
        )


def test_nested_rates_equal_seqios(shared: Path) -> None:
    gold = json.loads((shared / "gold" / "mixture_rates.json").read_text())["A_flan2022_small"]

    def tree(name: str, path: str) -> Mixture:
        parts = gold["mixtures"][name]
        return Mixture(
            [
                Member(tree(one, f"{path}/{one}") if one in gold["mixtures"] else task(f"{path}/{one}"), rate=rate)
                for one, rate in parts.items()
            ],
            name=name,
        )

    found = rates(tree("flan2022_submix", "flan2022_submix"), {})
    expected = {"/".join([*one["path"], one["entry"]]): one["p"] for one in gold["expected_entries"]}
    assert found == pytest.approx(expected, abs=6e-9)
    assert len(found) == 68


def test_the_published_counts_give_the_published_rates(shared: Path) -> None:
    """The released 287 tasks, each in FLAN's entries a form: the preset's weights, caps and forms give every rate."""
    gold = json.loads((shared / "gold" / "mixture_rates.json").read_text())["B_flan2022_published"]
    named = {"flan2021_submix": "muffin", "t0_submix": "t0", "niv2_submix": "niv2", "cot_submix": "cot", "dialog_submix": "dialog"}  # fmt: skip
    # A few-shot form with options has two entries, of five shots and of any number, each capped on its own.
    counted = {
        "zero_shot_options": ["zero_shot"],
        "zero_shot": ["zero_shot"],
        "few_shot_options": ["five_shot", "x_shot"],
        "few_shot": ["x_shot"],
    }
    sizes: dict[str, int] = {}

    def form_of(kind: str, names: list[str], cap: int) -> Mixture:
        inner = []
        for name in names:
            for entry in counted[kind]:
                sizes[f"{name}|{kind}|{entry}"] = gold["num_cases"][name.partition(" | ")[2]][entry]
                inner.append(Member(task(f"{name}|{kind}|{entry}")))
        return Mixture(inner, name=f"{names[0]} {kind}", cap=cap)

    members = []
    for submix, source in named.items():
        weight, cap, forms = FLAN2022[source]
        names = [name for name in gold["expected_by_submix_task"] if name.startswith(f"{submix} | ")]
        direct = [name for name in names if "input_inversion" not in name]
        inverted = [name for name in names if name not in direct]
        parts = []
        for kind in forms:
            both = [Member(form_of(kind, direct, cap), rate=1.0)]
            both += [Member(form_of(kind, inverted, cap), rate=INVERTED_WEIGHT)] if inverted else []
            parts.append(Member(Mixture(both, name=f"{source} {kind}"), rate=forms[kind]))
        members.append(Member(Mixture(parts, name=source), rate=weight))
    found: Counter[str] = Counter()
    for name, rate in rates(Mixture(members), sizes).items():
        found[name.partition("|")[0] + "|" + name.partition("|")[2].partition("|")[0]] += rate
    assert len(found) == 287
    assert dict(found) == pytest.approx(gold["expected_by_submix_task"], abs=6e-8)


def test_inverted_sources_stand_inside_theirs() -> None:
    one = lambda name: {"name": name, "template": "x ||| y"}  # noqa: E731
    sources = {"cot": [one("c")], "cot_inverted": [one("ci")], "dialog": [one("d")]}
    recipe = make_recipe({"task": {"preset": "flan2022", "sources": sources}, "tunings": ["zero_shot"]})
    assert isinstance(recipe.task, Mixture)
    found = rates(recipe.task, {"c": 10, "ci": 10, "d": 10})
    assert found == pytest.approx({"c": 0.05 / 1.3 / 0.08, "ci": 0.05 * 0.3 / 1.3 / 0.08, "d": 0.03 / 0.08})
    with pytest.raises(UserError, match="no source 'mufin'.*Did you mean 'muffin'"):
        flan2022({"mufin": []})


def test_the_kth_draw_is_a_function_of_seed_and_k() -> None:
    odds, rows = [0.7, 0.299, 0.001], [50, 7, 3]
    straight = [Draws(odds, rows, 3).at(k) for k in range(5000)]
    for draws, places in ((Draws(odds, rows, 3), range(4999, -1, -1)), (Draws(odds, rows, 3), range(2, 5000, 7))):
        assert [draws.at(k) for k in places] == [straight[k] for k in places]
    assert [Draws(odds, rows, 4).at(k) for k in range(5000)] != straight


def test_draws_keep_to_their_rates_and_go_through_all_rows() -> None:
    odds, rows = np.random.default_rng(0).dirichlet([0.3] * 40), [3 + 2 * n for n in range(40)]
    draws = Draws(odds, rows, 0)
    drawn = [draws.at(k) for k in range(20_000)]
    got = Counter(entry for entry, _ in drawn)
    assert draws.counts(20_000) == [got[n] for n in range(40)]
    # Off by one for where it begins, and by less than its share of one block.
    for n in range(40):
        assert abs(got[n] - 20_000 * odds[n]) <= 2 + odds[n] * Draws.BLOCK
    for n in range(40):
        seen = [row for entry, row in drawn if entry == n]
        for start in range(0, len(seen) - rows[n] + 1, rows[n]):
            assert sorted(seen[start : start + rows[n]]) == list(range(rows[n]))
    first = [row for entry, row in drawn if entry == int(np.argmax(odds))]
    size = rows[int(np.argmax(odds))]
    assert first[:size] != first[size : 2 * size]


def test_a_shuffle_that_is_never_written_out_is_one() -> None:
    for count in (1, 2, 3, 5, 64, 1000):
        orders = {tuple(scattered(place, count, f"key {key}") for place in range(count)) for key in range(20)}
        assert all(sorted(order) == list(range(count)) for order in orders)
        assert len(orders) == 20 or count < 64
    # Each of few orders comes about as often as any other.
    counts = Counter(tuple(scattered(place, 3, f"{key}") for place in range(3)) for key in range(6000))
    assert len(counts) == 6
    assert all(800 < count < 1200 for count in counts.values())


def test_2000_tasks_draw_without_their_rows() -> None:
    sizes = np.random.default_rng(1).integers(100, 1_000_000, 2000)
    draws = Draws(sizes / sizes.sum(), [int(size) for size in sizes], 0)
    far = [draws.at(k) for k in (0, 10**9, 10**12)]
    assert all(0 <= row < sizes[entry] for entry, row in far)


def example(n: int) -> Example:
    return Example(f"r:{n}", f"question {n}", "yes" if n % 2 else "no", ("yes",), choices=("yes", "no"))


def stored(folder: Path, examples: list[Example]) -> StoredExamples:
    file = ExampleFile(folder, "train")
    for one in examples:
        file.add(packed(one))
    file.close()
    return StoredExamples(folder, "train", len(examples))


def load_nothing(task: Task) -> Examples:
    raise AssertionError("this form needs no template of its own")


def test_forms_of_the_prompt(tmp_path: Path) -> None:
    train = stored(tmp_path, [example(n) for n in range(8)])
    shown = lambda form, budget=10**6: in_form(  # noqa: E731
        Entry(task("a"), form, 3, 1.0), train, load_nothing, 0, budget, lambda one: 10 * (1 + len(one.shots))
    )
    assert shown("zero_shot") == train
    assert shown("zero_shot_options")[2].prompt == "question 2\n\nOPTIONS:\n- yes\n- no"
    few = shown("few_shot")
    for one, plain in zip(few, train, strict=True):
        assert replace(one, shots=()) == plain
        assert len(set(one.shots)) == 3
        assert set(one.shots) <= {(other.prompt, other.completion) for other in train if other != plain}
    assert len({one.shots for one in few}) > 1
    assert few[-1] == few[len(few) - 1] and few[2:4] == [few[2], few[3]]
    with pytest.raises(IndexError):
        few[len(few)]
    assert list(few) == list(shown("few_shot"))
    assert all(len(one.shots) == 1 for one in shown("few_shot", budget=20))
    options = shown("few_shot_options")
    assert all("OPTIONS:" in question for one in options for question, _ in (*one.shots, (one.prompt, "")))


def test_a_row_never_stands_among_its_own_shots(tmp_path: Path) -> None:
    """By several templates a row stands in the split more than once, and copies have the same answer."""
    rows = [
        replace(example(n), prompt=f"{how} {n}", completion=f"answer {n}") for n in range(5) for how in ("ask", "say")
    ]
    rows += [
        replace(example(7), prompt="twin", completion="same"),
        replace(example(8), prompt="twin", completion="same"),
    ]
    train = stored(tmp_path, rows)
    few = in_form(Entry(task("a"), "few_shot", 4, 1.0), train, load_nothing, 0, 10**6, lambda one: 1)
    assert len(few) == 12
    for one in few:
        assert len(one.shots) == 4
        assert one.completion not in {answer for _, answer in one.shots}


def test_reasons_before_the_answer(tmp_path: Path) -> None:
    rows = [{"q": f"q{n}", "why": f"since {n}", "a": str(n)} for n in range(10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = make_recipe(
        {
            "data": str(tmp_path),
            "task": {
                "tasks": [
                    {
                        "task": {
                            "template": "{{ q }} ||| {{ a }}",
                            "chain_of_thought": "{{ q }} Step by step. ||| {{ why }}, so {{ a }}",
                            "train": "rows.jsonl",
                        },
                        "forms": {"zero_shot": 1, "chain_of_thought": 1},
                    }
                ]
            },
            "tunings": ["zero_shot"],
        }
    )
    assert isinstance(recipe.task, Mixture)
    entry = entries(recipe.task, lambda one: 10)[1]
    shown = in_form(entry, stored(tmp_path, []), recipe.examples, 0, 100, lambda one: 1)
    assert {(one.prompt, one.completion) for one in shown} < {
        (f"q{n} Step by step.", f"since {n}, so {n}") for n in range(10)
    }
    assert len(shown) == 8


def test_from_the_answer_back_to_the_question(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"q": f"q{n}", "a": str(n)}) + "\n" for n in range(10)))
    given = {"template": "{{ q }} ||| {{ a }}", "inverted": "What gives {{ a }}? ||| {{ q }}", "train": "rows.jsonl"}
    member = {"task": given, "forms": {"zero_shot": 1, "inverted": 0.3}}
    recipe = make_recipe({"data": str(tmp_path), "task": {"tasks": [member]}, "tunings": ["zero_shot"]})
    assert isinstance(recipe.task, Mixture)
    entry = entries(recipe.task, lambda one: 10)[1]
    assert (entry.form, entry.rate) == ("inverted", pytest.approx(0.3 / 1.3))
    shown = in_form(entry, stored(tmp_path, []), recipe.examples, 0, 100, lambda one: 1)
    assert {(one.prompt, one.completion) for one in shown} < {(f"What gives {n}?", f"q{n}") for n in range(10)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tasks": []}, "at least one task"),
        ({"tasks": [{"task": {"template": "x"}, "rate": 1}, {"template": "y", "name": "b"}]}, "all of them one, or none"),
        ({"tasks": [{"template": "x"}, {"template": "y"}]}, "two tasks are named 'task'"),
        ({"tasks": [{"template": "x"}], "temperature": 0}, "temperature is 0"),
        ({"tasks": [{"template": "x"}], "cap": 0}, "cap is 0"),
        ({"tasks": [{"template": "x"}], "caps": 3}, "unknown key 'task.caps'. Did you mean 'cap'"),
        ({"tasks": [{"task": {"template": "x"}, "rates": 1}]}, "unknown key 'task.tasks.0.rates'. Did you mean 'rate'"),
        ({"tasks": [{"tempate": "x"}]}, "Did you mean 'template'"),
        ({"tasks": [{"task": {"template": "x"}, "forms": {"one_shot": 1}}]}, "forms.one_shot"),
        ({"tasks": [{"task": {"template": "x"}, "forms": {"chain_of_thought": 1}}]}, "no `chain_of_thought` template"),
        ({"tasks": [{"task": {"template": "x"}, "forms": {"inverted": 1}}]}, "no `inverted` template"),
        ({"preset": "flan", "sources": {}}, "unknown mixture preset 'flan'"),
        ({"preset": "flan2022"}, "needs `sources`"),
    ],
)  # fmt: skip
def test_mistakes_are_explained(changed: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        make_recipe({"task": changed, "tunings": ["zero_shot"]})
    assert message in str(error.value)
