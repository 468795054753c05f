"""The main job on a tiny base: what it writes, what it refuses, and that nothing is lost."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

import luthier.evaluation.score
import luthier.files
import luthier.snapshots
import luthier.stage
import luthier.training.loop
from luthier import repeated
from luthier.cli import app
from luthier.errors import UserError
from luthier.job import run
from luthier.metrics import METRICS, metric, reading
from luthier.models.decoding import Decoding
from luthier.recipe_file import load_recipe, make_recipe
from luthier.recipe_schema import recipe_schema
from luthier.report.schema import report_schema
from luthier.session import Session
from tests import tiny

NAMES = ["Anna", "Ben", "Chloe", "Dev"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for family in ("llama", "t5"):
        base = tiny.make(family)
        base.model.save_pretrained(folder / family)
        base.tokenizer.save_pretrained(folder / family)
    return folder


@pytest.fixture
def content(bases: Path, tmp_path: Path) -> dict:
    rows = [{"text": f"{NAMES[n % 4]} asks about room {n}", "who": NAMES[n % 4]} for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = {"name": "kept", "template": "Who? {{ text }} ||| {{ who }}", "test": "rows.jsonl", "choices": NAMES}
    return {
        "base": {"model": str(bases / "llama"), "dtype": "float32"},
        "data": str(tmp_path),
        "task": {
            "name": "who",
            "template": "Say who: {{ text }} ||| {{ who }} asks.",
            "train": "rows.jsonl",
            "validation": 4,
            "test": 6,
            "max_new_tokens": 5,
        },
        "retention": [kept],
        "training": {"max_steps": 3, "batch_size": 4},
        "tunings": {
            "zero_shot": {},
            "two_shot": {"method": "few_shot", "shots": 2},
            "prompt_tuning": {"length": 4},
            "lora": {"rank": 2},
            "full": {},
        },
    }


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_run_writes_the_comparison_and_its_tunings_can_be_used(
    content: dict, bases: Path, tmp_path: Path, family: str
) -> None:
    content["base"]["model"] = str(bases / family)
    content["tunings"] |= {
        "selective": {},
        "dora": {"method": "lora", "rank": 2, "dora": True},
        "bottleneck": {"reduction": 8},
        "prefix_tuning": {"length": 4, "reparametrise": True, "hidden": 4},
        "ia3": {},
    }
    out = tmp_path / "out"
    report = run(make_recipe(content), out, isolate=False)
    written = json.loads((out / "report.json").read_text())
    jsonschema.validate(written, report_schema())
    assert written["schema_version"] == 1
    assert list(written["tunings"]) == list(content["tunings"])
    plans = json.loads((out / "plan.json").read_text())
    for name, tuning in written["tunings"].items():
        trained = name not in ("zero_shot", "two_shot")
        assert (tuning["trainable_parameters"] > 0) == trained
        assert tuning["file_bytes"] == sum(len(data) for data in files(out / "tunings" / name).values())
        assert set(tuning["scores"]["who"]) == {"rouge1", "rouge2", "rougeL", "rougeLsum"}
        for score in tuning["scores"]["who"].values():
            assert 0 <= score["low"] <= score["value"] <= score["high"] <= 1
            assert {"signature", "precision", "recall"} <= set(score)
        assert tuning["scores"]["kept"]["accuracy"]["signature"].startswith("metric:accuracy")
        assert tuning["validation_loss"] > 0
        phases = plans[name]["phases"]
        covered = [parts for phase, parts in phases.items() if phase != "answering" or not trained]
        assert tuning["planned"] == max(covered, key=lambda parts: sum(parts.values())) and "answering" in phases
        lines = (out / "predictions" / f"{name}.jsonl").read_text().splitlines()
        assert len(lines) == 6
        if trained:
            steps = [json.loads(line) for line in (out / "logs" / f"{name}.jsonl").read_text().splitlines()]
            assert [event["step"] for event in steps if "loss" in event] == [1, 2, 3]
            assert list((out / "tensorboard" / name).glob("events*"))
    assert "| lora |" in (out / "report.md").read_text()
    assert "\nlora,lora,," in (out / "report.csv").read_text()
    assert written["regressions"] == [] or {one["task"] for one in written["regressions"]} <= {"who", "kept"}
    shown = (out / "report.html").read_text()
    assert all(name in shown for name in content["tunings"])
    assert "http" not in shown.replace("http://www.w3.org", ""), "the page must need nothing from elsewhere"
    assert not (out / "checkpoints").exists()
    assert report.answer in shown.replace("&#39;", "'")

    session = Session(out)
    texts = [json.loads(line)["input"].removeprefix("Say who: ") for line in lines]
    for name in content["tunings"]:
        if name == "two_shot":
            with pytest.raises(UserError, match="saved nothing"):
                session.generate(texts, name)
            continue
        saved = [
            json.loads(line)["prediction"] for line in (out / "predictions" / f"{name}.jsonl").read_text().splitlines()
        ]
        assert session.generate(texts, name) == saved, name
    assert session.generate(texts) == session.generate(texts, "zero_shot")
    assert session.generate([{"text": texts[0], "who": "ignored"}], "lora") == session.generate(texts[:1], "lora")
    assert session.generate([f"Say who: {texts[0]}"], "lora", raw=True) == session.generate(texts[:1], "lora")
    with pytest.raises(UserError, match="no column 'text'"):
        session.generate([{"txt": "x"}], "lora")
    with pytest.raises(UserError, match="Did you mean 'lora'"):
        session.generate(texts, "lara")
    with pytest.raises(UserError, match="makes a prompt of .* tokens"):
        session.generate(["room " * 3000], "lora")


def test_shots_fill_the_context_and_it_is_said_how_many_fitted(content: dict, tmp_path: Path, capsys) -> None:
    """max_length limits training rows; shots may use the model's whole window (512 here), and no more."""
    content["max_length"] = 40
    content["retention"] = []
    content["tunings"] = {"two": {"method": "few_shot", "shots": 2}, "all": {"method": "few_shot", "shots": 14}}
    report = run(make_recipe(content), tmp_path / "out", isolate=False)
    two, many = report.tunings["two"], report.tunings["all"]
    assert (two.shots.asked, two.shots.least, two.shots.mean) == (2, 2, 2.0)
    assert 2 < many.shots.least < 14
    assert 40 < two.prompt_tokens < many.prompt_tokens <= 512 - 5
    assert "6 of 6 prompts hold fewer than 14 shots" in capsys.readouterr().out


def test_shots_may_be_chosen_by_similarity(content: dict, tmp_path: Path) -> None:
    content["retention"] = []
    content["tunings"] = {"random": {"method": "few_shot"}, "similar": {"method": "few_shot", "selection": "similar"}}
    report = run(make_recipe(content), tmp_path / "out", isolate=False)
    assert report.tunings["similar"].settings["selection"] == "similar"
    assert report.tunings["similar"].shots.mean == 2.0
    lines = (tmp_path / "out" / "predictions" / "similar.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        name = line["input"].split()[2]
        assert line["prompt"].count(f"{name} asks about room") == 3, "both shots are about the person of the question"


def test_a_task_with_choices_is_validated_by_its_answers(content: dict, tmp_path: Path) -> None:
    """The share of right answers has the validation split's denominator, not its tokens'."""
    content["task"] = {**content["retention"][0], "train": "rows.jsonl", "validation": 7, "test": 5, "name": "who"}
    content["tunings"] = {"zero_shot": {}, "lora": {"rank": 2, "training": {"max_steps": 40, "learning_rate": 0.02}}}
    content["retention"] = []
    report = run(make_recipe(content), tmp_path / "out", isolate=False)
    for tuning in report.tunings.values():
        assert tuning.validation_accuracy * 7 == pytest.approx(round(tuning.validation_accuracy * 7))
        assert list(tuning.scores["who"]) == ["accuracy"]
    assert report.tunings["lora"].validation_accuracy > report.tunings["zero_shot"].validation_accuracy


def test_a_task_may_be_judged_by_any_metric(content: dict, tmp_path: Path) -> None:
    """Every metric, one run: scores, intervals, pairs of the last metric; more people's answers give a human baseline."""
    names = [name for name in METRICS if name != "meteor"]  # of the caption metrics the slow one is left out
    try:
        metric("cider").needs()
    except UserError:
        names = [name for name in names if name not in ("cider", "rougeL_caption")]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    more = [row | {"other": f"It is {row['who']} who asks about it."} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more))
    content["task"] |= {"metrics": ["loss", "perplexity", *names], "references": ["who", "other"]}
    content["retention"] = [{**content["retention"][0], "metrics": ["accuracy", "macro_f1"]}]
    content["tunings"] = {"zero_shot": {}, "lora": {"rank": 2}, "full": {}}
    report = run(make_recipe(content), tmp_path / "out", isolate=False)
    jsonschema.validate(json.loads((tmp_path / "out" / "report.json").read_text()), report_schema())
    assert report.metric == names[-1]
    for tuning in report.tunings.values():
        scores = tuning.scores["who"]
        assert list(scores) == ["loss", "perplexity", *names]
        assert all(f"metric:{name}|" in score.signature for name, score in scores.items())
        assert all("|n:6|interval:bootstrap95|" in score.signature for score in scores.values())
        assert "brevity_penalty" in scores["bleu"].parts
        assert scores["perplexity"].low <= scores["perplexity"].value <= scores["perplexity"].high
    assert list(report.human["who"]) == names
    assert "human:leave-one-out|others:best" in report.human["who"]["rouge1"].signature
    assert 0 < report.human["who"]["rouge1"].value < 1
    assert {one.metric for one in report.retention} == {"macro_f1"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "each reference against the others" in page
    assert "loss, perplexity, nist" in page
    kept = json.loads((tmp_path / "out" / "results" / "lora.json").read_text())["scores"]["who"]
    for name in ("bleu", "nist", "perplexity", "macro_f1"):
        value = report.tunings["lora"].scores["who"][name].value
        rows = np.array(kept["statistics"][name], dtype=float)
        assert float(reading(name).formula(rows.sum(axis=0), 6)) == pytest.approx(value)
    assert "rouge1" not in kept["statistics"], "a mean needs no more than its values"


def test_where_less_is_better_the_lowest_wins(content: dict, tmp_path: Path) -> None:
    content["task"]["metrics"] = ["rouge1", "perplexity"]
    content["retention"] = []
    content["tunings"] = {"zero_shot": {}, "lora": {"rank": 4, "training": {"max_steps": 60, "learning_rate": 0.02}}}
    report = run(make_recipe(content), tmp_path / "out", isolate=False)
    (pair,) = report.comparisons
    assert (pair.ours, pair.theirs, pair.metric) == ("lora", "zero_shot", "perplexity")
    assert pair.value == pytest.approx(
        report.tunings["lora"].scores["who"]["perplexity"].value
        - report.tunings["zero_shot"].scores["who"]["perplexity"].value
    )
    assert pair.value < 0 and pair.high < 0 and pair.p == pair.p_corrected < 0.05
    assert report.answer.startswith("lora is the smallest tuning within noise of the best, at perplexity ")
    assert "it beats zero_shot with 95 % confidence" in report.answer
    assert "lora is better" in (tmp_path / "out" / "report.html").read_text()
    assert report.human == {}


def test_what_a_metric_needs_is_asked_for_before_anything_runs(
    content: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luthier.metrics.captions.shutil.which", lambda name: None)
    monkeypatch.setattr("luthier.metrics.captions.find_spec", lambda name: object())
    content["task"]["metrics"] = ["meteor"]
    with pytest.raises(UserError, match="need Java"):
        run(make_recipe(content), tmp_path / "out", isolate=False)
    assert not (tmp_path / "out").exists()


def test_perplexity_is_watched_as_the_loss(content: dict) -> None:
    content["training"]["watch"] = "perplexity"
    with pytest.raises(UserError, match="perplexity is least where the loss is, so watch `loss`"):
        make_recipe(content)


def test_a_mixtures_mean_is_of_shares(content: dict) -> None:
    content["task"] = {"tasks": [content["task"] | {"metrics": ["rouge1", "nist"]}]}
    with pytest.raises(UserError, match="that of 'who' is nist, which is no share from 0 to 1"):
        make_recipe(content)


def test_the_t5_examples_run_on_a_tiny_t5(bases: Path, tmp_path: Path) -> None:
    for name in ("train", "validation", "test", "dialogsum.train", "dialogsum.dev", "dialogsum.test"):
        lines = []
        for n in range(8):
            row = {"dialogue": f"#Person1#: hello {name} {n}", "summary": f"s {n}"}
            lines.append(json.dumps(row | {"summary1": f"a {n}", "summary2": "b", "summary3": "c"}) + "\n")
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    for name in ("dialogsum", "samsum"):
        changes = [f"base.model={bases / 't5'}", f"data={tmp_path}", "retention=[]", "task.max_new_tokens=4"]
        example = Path(__file__).parents[1] / "examples" / f"flan-t5-{name}.yaml"
        report = run(load_recipe(example, changes), tmp_path / name, isolate=False)
        assert report.tunings["lora"].steps == 1, "one epoch of eight rows"
        assert (
            "refs:" + ("3" if name == "dialogsum" else "1") in report.tunings["lora"].scores[name]["rouge1"].signature
        )


def test_a_zero_initialised_tuning_forgets_exactly_nothing(content: dict, tmp_path: Path) -> None:
    content["tunings"] = {"lora": {"rank": 2, "training": {"max_steps": 1, "learning_rate": 1e-30}}}
    report = run(make_recipe(content), tmp_path / "out", isolate=False)
    assert [(one.difference, one.low, one.high) for one in report.retention] == [(0.0, 0.0, 0.0)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task.train": "missing.jsonl"}, "missing.jsonl does not exist"),
        ({"task.template": "{{ txt }} ||| {{ who }}"}, "no column 'txt'.*Did you mean 'text'"),
        ({"task.test": 0}, "test split of task 'who' has no rows"),
        ({"task.template": "{{ text }} |||"}, "targets of the train split .* are empty"),
        ({"tunings.lora.targets": "q_porj"}, "matches no module.*Did you mean 'q_proj'"),
        ({"base.model": "no-such-model"}, "Unknown base model 'no-such-model'"),
        ({"base.model": "owner/no-such-model"}, "could not be read from the hub id 'owner/no-such-model'"),
        ({"max_length": 16, "task.template": "{{ text }} ||| {{ text }} {{ text }} {{ text }}"}, "train: no room for the prompt: 14 rows"),
        ({"base.device": "cuda:7"}, "device 'cuda:7' cannot be used"),
        ({"tunings.two_shot.shots": 500}, "500 asked for, but the training split has 14"),
    ],
)  # fmt: skip
def test_bad_input_is_one_message_and_leaves_nothing(content: dict, tmp_path: Path, change: dict, message: str) -> None:
    content["retention"] = []
    content["tunings"] = {"lora": {"rank": 2}, "two_shot": {"method": "few_shot"}}
    if "tunings.two_shot.shots" in change:
        del content["tunings"]["lora"]
    for key, value in change.items():
        *path, last = key.split(".")
        place = content
        for step in path:
            place = place[step]
        place[last] = value
    with pytest.raises(UserError, match=message) as caught:
        run(make_recipe(content), tmp_path / "out", isolate=False)
    assert "\n" not in str(caught.value).strip() or "audit" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_wrong_pattern_is_found_before_anything_is_scored(content: dict, tmp_path: Path, capsys) -> None:
    content["tunings"]["wrong"] = {"method": "lora", "targets": "q_porj"}
    with pytest.raises(UserError, match="matches no module"):
        run(make_recipe(content), tmp_path / "out", isolate=False)
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("selection", ["random", "similar"])
def test_more_shots_than_rows_are_found_before_anything_is_scored(
    selection: str, content: dict, tmp_path: Path, capsys
) -> None:
    content["tunings"]["many"] = {"method": "few_shot", "shots": 5000, "selection": selection}
    with pytest.raises(UserError, match=r"shots: 5000 asked for, but the training split has \d+ rows with a target"):
        run(make_recipe(content), tmp_path / "out", isolate=False)
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "out").exists()


def test_an_existing_run_is_never_overwritten(content: dict, tmp_path: Path) -> None:
    content["tunings"] = {"zero_shot": {}}
    recipe, out = make_recipe(content), tmp_path / "out"
    run(recipe, out, isolate=False)
    before = files(out)
    with pytest.raises(UserError, match="already exists.*--resume"):
        run(recipe, out, isolate=False)
    content["seed"] = 9
    with pytest.raises(UserError, match="another recipe: 'seed' differs"):
        run(make_recipe(content), out, resume=True, isolate=False)
    assert files(out) == before
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("do not touch")
    with pytest.raises(UserError, match="is no run"):
        run(recipe, other, resume=True, isolate=False)
    assert (other / "thesis.txt").read_text() == "do not touch"


def test_a_full_disk_leaves_the_last_whole_state(
    content: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content["tunings"] = {"zero_shot": {}, "lora": {"rank": 2}}
    recipe, out = make_recipe(content), tmp_path / "out"
    write, full = os.fsync, [False]

    def fsync(handle: int) -> None:
        if full[0]:
            raise OSError(28, "No space left on device")
        write(handle)

    monkeypatch.setattr(luthier.files.os, "fsync", fsync)
    save = luthier.snapshots.save_tuning

    def fill_then_save(*arguments):
        full[0] = True
        return save(*arguments)

    monkeypatch.setattr(luthier.snapshots, "save_tuning", fill_then_save)
    with pytest.raises(UserError, match=r"could not be written: No space left on device.*--resume"):
        run(recipe, out, isolate=False)
    assert not list(out.rglob("*.safetensors-*")), "a partial file was left"
    assert not (out / "tunings" / "lora").exists() and not list((out / "tunings").glob(".*")), "nor a part of a tuning"
    kept = (out / "results" / "zero_shot.json").read_bytes()
    monkeypatch.undo()
    report = run(recipe, out, resume=True, isolate=False)
    assert (out / "results" / "zero_shot.json").read_bytes() == kept
    assert report.tunings["lora"].file_bytes > 0


def test_out_of_memory_is_told_with_the_plans_advice(
    content: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(luthier.training.loop, "loss_sum", full)
    monkeypatch.setattr("luthier.plan.WORTH", 1.0)  # beside what libraries hold, all of a tiny model is little
    content["tunings"] = {"full": {}}
    with pytest.raises(UserError, match="ran out of memory") as caught:
        run(make_recipe(content), tmp_path / "out", isolate=False)
    said = str(caught.value)
    assert re.search(r"The plan of 'full' is [\d.]+ GB in training", said)
    assert "--set training.gradient_checkpointing=true" in said and "--set tunings.full.method=lora" in said


@pytest.mark.parametrize("how", ["raise torch.OutOfMemoryError('no memory')", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_a_tuning_whose_own_process_ran_out_of_memory_is_told_with_advice_and_goes_on(
    content: dict, tmp_path: Path, how: str
) -> None:
    """Outside a training step, or ended by the system."""
    hook = f"import os, signal, torch\nfrom pathlib import Path\ndef full(event):\n    if not Path({str(tmp_path / 'room')!r}).exists():\n        {how}\n"
    (tmp_path / "own.py").write_text(hook)
    content["training"]["hooks"] = ["own.py:full"]
    content["tunings"] = {"zero_shot": {}, "lora": {"rank": 2}}
    recipe, out = make_recipe(content), tmp_path / "out"
    with pytest.raises(
        UserError, match=r"(?s)(Memory ran out in 'lora'|'lora' was killed).*The plan of 'lora' is [\d.]+ GB"
    ):
        run(recipe, out)
    (tmp_path / "room").write_text("")
    assert run(recipe, out, resume=True).tunings["lora"].steps == 3


def test_an_unwritable_place_is_refused(content: dict, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written|is a file"):
        run(make_recipe(content), tmp_path / "file" / "out", isolate=False)


def command(*arguments: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "luthier.cli", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("number", "rows"),
    [(signal.SIGINT, "file"), (signal.SIGTERM, "file"), (signal.SIGKILL, "file"), (signal.SIGKILL, "mixture"), (signal.SIGKILL, "stream")],
)  # fmt: skip
def test_a_stopped_command_resumes_to_the_same_weights(
    content: dict, tmp_path: Path, number: signal.Signals, rows: str
) -> None:
    if rows != "file":
        content["task"] |= {"test": {"path": "rows.jsonl", "limit": 6}, "validation": 0}
        content["allow"] = ["also in training"]
    if rows == "stream":
        content["task"]["train"] = {"path": "rows.jsonl", "stream": True, "buffer": 5}
    if rows == "mixture":
        other = {**content["task"], "name": "other", "template": "Name: {{ text }} ||| {{ who }}"}
        content["allow"] += ["in another task's training"]
        content["task"] = {
            "name": "who",
            "tasks": [
                {"task": content["task"] | {"name": "say"}, "forms": {"zero_shot": 2, "few_shot": 1}, "shots": 2},
                other,
            ],
        }
    content["tunings"] = {"lora": {"rank": 2, "training": {"max_steps": 60, "checkpoint_every": 5}}}
    content["retention"] = []
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(content))
    whole = run(make_recipe(content), tmp_path / "whole", isolate=False)
    out = tmp_path / "out"
    started = command("run", str(recipe), "--out", str(out), start_new_session=True)
    log = out / "logs" / "lora.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and len(log.read_text().splitlines()) >= 8):
        assert time.monotonic() < deadline and started.poll() is None, started.communicate()
        time.sleep(0.005)
    if number == signal.SIGTERM:
        started.send_signal(number)  # to the command alone: it passes the signal on
    else:
        os.killpg(started.pid, number)
    _, said = started.communicate(timeout=60)
    assert not (out / "results" / "lora.json").exists(), "it was stopped too late to prove anything"
    if number != signal.SIGKILL:
        assert started.returncode == 130, said
        assert "--resume" in said
        assert "Traceback" not in said
    again = command("run", str(recipe), "--out", str(out))
    assert "already exists" in again.communicate()[1]
    assert again.returncode == 2
    resumed = command("run", str(recipe), "--out", str(out), "--resume")
    assert resumed.wait() == 0, resumed.communicate()
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        ours, theirs = (tmp_path / folder / "tunings" / "lora" / file for folder in ("out", "whole"))
        assert ours.read_bytes() == theirs.read_bytes()
    found = json.loads((out / "report.json").read_text())["tunings"]["lora"]
    task, metric = ("say" if rows == "mixture" else "who"), "rouge1"
    assert found["scores"][task][metric]["value"] == whole.tunings["lora"].scores[task][metric].value
    assert found["peak_memory_bytes"] > found["memory_after_import_bytes"] > 0
    assert len(log.read_text().splitlines()) == len(found["history"])


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_interpolating_towards_the_base(content: dict, bases: Path, tmp_path: Path, family: str) -> None:
    content["base"]["model"] = str(bases / family)
    content["training"] |= {"learning_rate": 0.05, "snapshots": 1}
    content["tunings"] = {"zero_shot": {}, "full": {}, "lora": {"rank": 2}}
    for name in ("full", "lora"):
        for share in (0.0, 0.5, 1.0):
            content["tunings"][f"{name}_{share * 100:.0f}"] = {"method": "interpolate", "of": name, "share": share}
    report = run(make_recipe(content), tmp_path / "run", isolate=False)
    loss = {name: tuning.validation_loss for name, tuning in report.tunings.items()}
    for name in ("full", "lora"):
        assert loss[f"{name}_0"] == loss["zero_shot"] != loss[name] == loss[f"{name}_100"]
        assert loss[f"{name}_50"] not in (loss[name], loss["zero_shot"])
        assert report.tunings[f"{name}_50"].trainable_parameters == report.tunings[name].trainable_parameters
        assert len(report.tunings[name].snapshots) == 1 and not report.tunings[f"{name}_50"].snapshots
        own = json.loads((tmp_path / "run" / "plan.json").read_text())[f"{name}_50"]["phases"]
        covered = [parts for phase, parts in own.items() if phase != "answering"]
        assert report.tunings[f"{name}_50"].planned == max(covered, key=lambda parts: sum(parts.values()))
        none = [one for one in report.retention if one.tuning == f"{name}_0"]
        assert none and all(one.difference == one.low == one.high == 0.0 for one in none), (
            "the base forgets exactly nothing"
        )
    session = Session(tmp_path / "run")
    text = "Anna asks about room 3"
    assert session.generate([text], "lora_100") == session.generate([text], "lora")
    assert session.generate([text], "lora_0") == session.generate([text])
    for changes, message in (
        ({"of": "nothing"}, "names 'nothing', which is no trained tuning that stands before it. Those are: full, lora"),
        ({"of": "lora", "share": 1.5}, "share is 1.5; it must be from 0"),
        ({"of": "lora", "training": {"epochs": 2}}, "nothing is trained"),
    ):
        wrong = {**content, "tunings": {**content["tunings"], "wise": {"method": "interpolate", **changes}}}
        with pytest.raises(UserError, match=message):
            make_recipe(wrong)
    content["tunings"] = {
        "soft": {"method": "prompt_tuning", "length": 4},
        "wise": {"method": "interpolate", "of": "soft"},
    }
    with pytest.raises(UserError, match="prompt_tuning changes no weights"):
        run(make_recipe(content), tmp_path / "other", isolate=False)
    assert not (tmp_path / "other").exists(), "found before any work"


@pytest.mark.parametrize("method", [{"method": "lora", "rank": 2}, {"method": "full"}], ids=["lora", "full"])
def test_a_snapshot_is_the_tuning_of_a_shorter_training(content: dict, tmp_path: Path, method: dict) -> None:
    even = {"schedule": "constant", "warmup": 0, "validate_every": 1, "learning_rate": 0.05}
    content["tunings"] = {"it": {**method, "training": {**even, "max_steps": 6, "snapshots": 2}}}
    whole = run(make_recipe(content), tmp_path / "whole", isolate=False).tunings["it"]
    content["tunings"]["it"]["training"] = {**even, "max_steps": 2}
    short = run(make_recipe(content), tmp_path / "short", isolate=False).tunings["it"]
    assert [one.step for one in whole.snapshots] == [2, 4] and not short.snapshots
    assert whole.snapshots[0].scores == short.scores
    files = lambda folder: {file.name: file.read_bytes() for file in (tmp_path / folder).iterdir()}  # noqa: E731
    assert files("whole/tunings/it@2") == files("short/tunings/it") != files("whole/tunings/it@4")
    session = Session(tmp_path / "whole")
    with pytest.raises(UserError, match="holds no tuning 'it@3'"):
        session.generate(["Anna asks"], "it@3")
    assert session.generate(["Anna asks"], "it@2") == Session(tmp_path / "short").generate(["Anna asks"], "it")


def test_replay_trains_on_a_share_of_other_rows(content: dict, tmp_path: Path) -> None:
    other = [{"q": f"Is {n} even?", "a": "yes" if n % 2 == 0 else "no"} for n in range(30)]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    general = {"name": "even", "template": "{{ q }} ||| {{ a }}", "train": "other.jsonl"}
    content["training"] = {"epochs": 2, "batch_size": 4}
    content["tunings"] = {
        "alone": {"method": "lora", "rank": 2},
        "with": {"method": "lora", "rank": 2, "replay": {"task": general, "share": 0.3}},
    }
    found = run(make_recipe(content), tmp_path / "run", isolate=False).tunings
    alone, both = found["alone"], found["with"]
    assert alone.steps == 2 * -(-14 // 4) and both.steps == 2 * -(-20 // 4), "14 rows are 0.7 of an epoch"
    drawn = {row.task: row for row in both.mixture}
    assert drawn["even"].rows == 30, "none is held out"
    assert drawn["even"].asked == pytest.approx(0.3) and drawn["who"].asked == pytest.approx(0.7)
    assert drawn["who"].epochs == pytest.approx(2, abs=0.15) and abs(drawn["even"].got - 0.3) < 0.05
    assert not alone.mixture
    recipe = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert recipe.tunings["with"].replay == make_recipe(content).tunings["with"].replay
    jsonschema.validate(content, recipe_schema())
    for changes, message in (
        ({"share": 1.0}, "share is 1.0; it must be above 0 and below 1"),
        ({"task": {**general, "name": "who"}}, "two tasks are named 'who'"),
        ({"task": {**general, "name": "kept"}}, "another task is named 'kept' too"),
        ({"task": {"template": "{{ q }} ||| {{ a }}", "test": "other.jsonl"}}, "needs training rows"),
        ({"share": 0.1, "much": 1}, "unknown key 'tunings.with.replay.much'. Allowed: share, task"),
    ):
        wrong = {**content["tunings"]["with"], "replay": {**content["tunings"]["with"]["replay"], **changes}}
        with pytest.raises(UserError, match=message):
            make_recipe({**content, "tunings": {"with": wrong}})
    content["tunings"] = {"zero_shot": {"replay": {"task": general}}}
    with pytest.raises(UserError, match=r"unknown key 'tunings.zero_shot.replay'"):
        make_recipe(content)


def test_what_is_replayed_is_audited(content: dict, tmp_path: Path) -> None:
    content["tunings"] = {
        "it": {
            "method": "lora",
            "rank": 2,
            "replay": {"task": {**content["retention"][0], "name": "again", "train": "rows.jsonl"}},
        }
    }
    with pytest.raises(UserError, match="kept test: in another task's training"):
        run(make_recipe(content), tmp_path / "run", isolate=False)


def test_the_best_template_is_the_one_of_the_best_validation_score(content: dict, tmp_path: Path) -> None:
    wordings = [
        "{{ text }} ||| {{ who }}",
        "Say who: {{ text }} ||| {{ who }} asks.",
        "{{ text }}? {{ text }} ||| {{ who }}",
    ]
    content |= {"retention": [], "tunings": {"zero_shot": {}}}
    content["task"]["metrics"] = ["rouge1", "perplexity"]
    alone = []
    for number, wording in enumerate(wordings):
        content["task"]["template"] = wording
        alone.append(run(make_recipe(content), tmp_path / str(number), isolate=False).tunings["zero_shot"])
    best = min(range(3), key=lambda number: alone[number].validation_loss)
    content["tunings"]["best"] = {"method": "best_template", "templates": wordings, "rows": 0}
    found = run(make_recipe(content), tmp_path / "run", isolate=False).tunings["best"]
    assert [one.chosen for one in found.templates["who"]] == [number == best for number in range(3)]
    assert [one.value for one in found.templates["who"]] == pytest.approx(
        [np.exp(one.validation_loss) for one in alone], rel=1e-5
    )
    assert found.scores["who"] == alone[best].scores["who"]
    assert "The prompts tried" in (tmp_path / "run" / "report.html").read_text()
    asked = Session(tmp_path / "run").generate([{"text": "Anna asks", "who": "Anna"}], "best")
    assert asked == Session(tmp_path / str(best)).generate([{"text": "Anna asks", "who": "Anna"}])
    content["tunings"]["best"] = {"method": "best_template"}
    with pytest.raises(UserError, match="the task 'who' has one template. Name several"):
        run(make_recipe(content), tmp_path / "other", isolate=False)
    content["tunings"]["best"] = {"method": "best_template", "templates": [wordings[0], "{{ txt }} ||| {{ who }}"]}
    with pytest.raises(UserError, match="no column 'txt'"):
        run(make_recipe(content), tmp_path / "other", isolate=False)
    assert not (tmp_path / "other").exists(), "found before any work"
    content["tunings"] = {"zero_shot": {}}
    content["task"]["template_choice"] = 4
    with pytest.raises(UserError, match="has 1 template, and template_choice is 4"):
        run(make_recipe(content), tmp_path / "other", isolate=False)


def test_seeds_are_runs_of_their_own_put_together(
    content: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content["training"]["learning_rate"] = 0.05
    content["tunings"] = {"zero_shot": {}, "lora": {"rank": 2}}
    seeds = make_recipe({**content, "seeds": [3, 4]})
    scored: list[str] = []
    own = luthier.stage.run_stage
    monkeypatch.setattr(luthier.stage, "run_stage", lambda directory, name: scored.append(name) or own(directory, name))
    report = repeated.run(seeds, tmp_path / "run", isolate=False)
    assert scored == ["base", "zero_shot", "lora", "lora"], "what trains nothing is scored once"
    lora = report.tunings["lora"]
    assert lora.seeds == [3, 4] and "mean of seeds 3, 4" in (tmp_path / "run" / "report.html").read_text()
    alone = [
        run(make_recipe({**content, "training_seed": seed}), tmp_path / str(seed), isolate=False) for seed in (3, 4)
    ]
    losses = [one.tunings["lora"].validation_loss for one in alone]
    assert losses[0] != losses[1] and lora.validation_loss == pytest.approx(sum(losses) / 2, rel=1e-12)
    one, other = (found.tunings["zero_shot"] for found in (report, alone[0]))
    assert one.validation_loss == other.validation_loss and one.scores["who"]["rouge1"].spread == 0.0
    weights = lambda folder: (tmp_path / folder / "tunings" / "lora" / "adapter_model.safetensors").read_bytes()  # noqa: E731
    assert weights("run/seed-3") == weights("3") != weights("run/seed-4") == weights("4")
    with pytest.raises(UserError, match="already exists. Continue it with --resume"):
        repeated.run(seeds, tmp_path / "run", isolate=False)
    before = list(scored)
    assert (
        repeated.run(seeds, tmp_path / "run", isolate=False, resume=True).answer == report.answer and scored == before
    )
    with pytest.raises(UserError, match="holds something else than runs of these seeds"):
        repeated.run(seeds, tmp_path, isolate=False, resume=True)
    for changes, message in (
        ({"seeds": [1, 1]}, "different numbers"),
        ({"seeds": [1]}, "two or more"),
        ({"seeds": [1, 2], "training_seed": 1}, "leave training_seed out"),
    ):
        with pytest.raises(UserError, match=message):
            make_recipe({**content, **changes})


def test_hooks_of_ones_own_are_told_every_step(content: dict, tmp_path: Path) -> None:
    told = tmp_path / "told.jsonl"
    (tmp_path / "mine.py").write_text(
        f"import json\ndef tell(event):\n    open({str(told)!r}, 'a').write(json.dumps(event) + '\\n')\nvalue = 3\n"
    )
    content |= {"retention": [], "tunings": {"lora": {"rank": 2}}}
    content["training"]["hooks"] = ["mine.py:tell", "math:isfinite"]
    with pytest.raises(TypeError):  # a hook that raises is not hidden
        run(make_recipe(content), tmp_path / "raises", isolate=False)
    told.unlink()
    content["training"]["hooks"] = ["mine.py:tell"]
    report = run(make_recipe(content), tmp_path / "run", isolate=False)
    assert [json.loads(line) for line in told.read_text().splitlines()] == report.tunings["lora"].history
    for hook, message in (
        ("mine.py", "is not of the form"),
        ("none.py:tell", "none.py does not exist"),
        ("mine.py:other", "could not be imported: AttributeError"),
        ("mine.py:value", "is a int, which cannot be called"),
    ):
        content["training"]["hooks"] = [hook]
        with pytest.raises(UserError, match=message):
            run(make_recipe(content), tmp_path / "other", isolate=False)
        assert not (tmp_path / "other").exists()


def test_full_shows_as_many_examples_as_fit(content: dict, tmp_path: Path) -> None:
    content |= {"retention": [], "tunings": {"zero_shot": {}, "few_shot": {"shots": [1, "full"]}}}
    found = run(make_recipe(content), tmp_path / "run", isolate=False).tunings
    assert list(found) == ["zero_shot", "few_shot_1", "few_shot_full"]
    full = found["few_shot_full"]
    one = found["few_shot_1"].prompt_tokens - found["zero_shot"].prompt_tokens
    assert full.shots.asked >= full.shots.mean > 1
    assert 512 - 5 - 1.2 * one < full.prompt_tokens <= 512 - 5, "the context is full, but for the answer"
    with pytest.raises(UserError, match="shots"):
        make_recipe({**content, "tunings": {"few_shot": {"shots": "all"}}})


def test_draws_show_other_examples(content: dict, tmp_path: Path) -> None:
    content["tunings"] = {
        "zero_shot": {},
        "few": {"method": "few_shot", "shots": [1, 2], "draw": [0, 1]},
        "lora": {"rank": 2},
    }
    report = run(make_recipe(content), tmp_path / "run", isolate=False)
    assert list(report.tunings) == ["zero_shot", "few_1_draw0", "few_1_draw1", "few_2_draw0", "few_2_draw1", "lora"]
    prompts = {
        name: json.loads((tmp_path / "run" / "predictions" / f"{name}.jsonl").read_text().splitlines()[0])["prompt"]
        for name in report.tunings
    }
    assert prompts["few_2_draw0"] != prompts["few_2_draw1"]
    assert "Examples in the prompt" in (tmp_path / "run" / "report.html").read_text()


def test_scoring_that_was_killed_goes_on_where_it_stopped(
    content: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content["tunings"] = {"zero_shot": {}, "lora": {"rank": 2}}
    content["task"]["test"] = 12
    content["decoding"] = {"temperature": 1.5, "seed": 7, "batch_size": 4}
    run(make_recipe(content), tmp_path / "whole", isolate=False)
    asked: list[list[int]] = []
    real = luthier.evaluation.score.generate

    def dying(*given, **options):
        asked.append(list(options["places"]))
        if len(asked) == 5:
            raise KeyboardInterrupt
        return real(*given, **options)

    monkeypatch.setattr("luthier.evaluation.score.generate", dying)
    with pytest.raises(KeyboardInterrupt):
        run(make_recipe(content), tmp_path / "killed", isolate=False)
    partial = tmp_path / "killed" / "predictions" / "lora.partial"
    assert len(partial.read_text().splitlines()) == 4 and not partial.with_suffix(".jsonl").exists()
    run(make_recipe(content), tmp_path / "killed", isolate=False, resume=True)
    assert sorted(place for batch in asked[-2:] for place in batch) == sorted(set(range(12)) - set(asked[3])), (
        "the batch that was done is not asked again"
    )
    assert not partial.exists()
    for name in ("zero_shot.jsonl", "lora.jsonl"):
        assert files(tmp_path / "killed")[f"predictions/{name}"] == files(tmp_path / "whole")[f"predictions/{name}"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_while_modules_load_is_no_traceback(content: dict, tmp_path: Path, number: signal.Signals) -> None:
    content["tunings"], content["retention"] = {"lora": {"rank": 2}}, []
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    out = tmp_path / "out"
    started = command("run", str(tmp_path / "r.yaml"), "--out", str(out), start_new_session=True)
    deadline = time.monotonic() + 60
    while not (out / "audit.json").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)
    os.killpg(started.pid, number)
    _, said = started.communicate(timeout=60)
    assert started.returncode == 130
    assert "Traceback" not in said
    assert command("run", str(tmp_path / "r.yaml"), "--out", str(out), "--resume").wait() == 0


def test_a_killed_run_leaves_no_process_training(content: dict, tmp_path: Path) -> None:
    content["tunings"] = {"lora": {"rank": 2, "training": {"max_steps": 100000, "checkpoint_every": 5}}}
    content["retention"] = []
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    started = command("run", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out"))
    log = tmp_path / "out" / "logs" / "lora.jsonl"
    deadline = time.monotonic() + 60
    while not (log.is_file() and len(log.read_text().splitlines()) >= 3):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    started.kill()
    started.communicate()
    time.sleep(3)
    lines = len(log.read_text().splitlines())
    time.sleep(1)
    assert len(log.read_text().splitlines()) == lines
    assert (tmp_path / "out" / "checkpoints" / "lora" / "checkpoint.safetensors").is_file()


def test_the_command_line_ends_user_errors_with_code_2(tmp_path: Path) -> None:
    done = command("run", str(tmp_path / "none.yaml"))
    out, said = done.communicate()
    assert (done.returncode, out) == (2, "")
    assert said == f"error: The recipe {tmp_path / 'none.yaml'} does not exist.\n"


def test_how_answers_are_written_can_be_told_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Asked:
        recipe = SimpleNamespace(decoding=Decoding(beams=4, length_penalty=2.0))

        def __init__(self, run: Path) -> None: ...

        def generate(self, texts: list[str], tuning: str | None, **given: Any) -> list[str]:
            asked.append(given["decoding"])
            return texts

    monkeypatch.setattr("luthier.session.Session", Asked)

    def told(*options: str) -> Decoding:
        done = CliRunner().invoke(app, ["generate", "run", "text", *options], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return asked.pop()

    assert told() == Decoding(beams=4, length_penalty=2.0)
    assert told("--beams", "3", "--length-penalty", "0.5") == Decoding(beams=3, length_penalty=0.5)
    drawn = "--beams 1 --length-penalty 1 --temperature 0.7 --top-k 5 --top-p 0.9 --seed 7 --batch-size 3"
    assert told(*drawn.split()) == Decoding(1, 1.0, 0.7, 5, 0.9, 7, 3)
    with pytest.raises(UserError, match="set beams above 1"):
        told("--beams", "1")


def test_memory_goes_back_once_a_tuning_is_trained_and_before_it_answers(
    content: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content["tunings"] = {"zero_shot": {}, "lora": {"rank": 2}}
    said: list[tuple[str, bool]] = []
    result = tmp_path / "run" / "results" / "lora.trained.json"
    for name in ("give_back_freed_memory", "score_tasks"):
        real = getattr(luthier.stage, name)
        told = lambda *given, name=name, real=real: (said.append((name, result.exists())), real(*given))[1]  # noqa: E731
        monkeypatch.setattr(luthier.stage, name, told)
    run(make_recipe(content), tmp_path / "run", isolate=False)
    assert said == [("give_back_freed_memory", False), ("score_tasks", True)]


def test_the_surface_is_frozen() -> None:
    """Commands and their options are a promise: changing one is a decision, not an accident."""
    import typer

    group = typer.main.get_command(app)
    commands = {**group.commands, **group.commands["templates"].commands}
    surface = {
        name: sorted(one.name for one in found.params) for name, found in commands.items() if name != "templates"
    }
    assert surface == {
        "run": ["out", "recipe", "resume", "set_"],
        "preview": ["recipe", "rows", "set_"],
        "audit": ["as_json", "recipe", "set_"],
        "plan": ["as_json", "memory", "recipe", "set_"],
        "generate": [
            "batch_size",
            "beams",
            "file",
            "length_penalty",
            "max_new_tokens",
            "out",
            "raw",
            "run",
            "seed",
            "task",
            "temperature",
            "text",
            "top_k",
            "top_p",
            "tuning",
        ],
        "merge": ["allow_drift", "dtype", "max_flips", "max_kl", "onto", "out", "rows", "run", "tuning"],
        "inspect": ["as_json", "neighbours", "rows", "run", "tuning"],
        "compare": ["out", "runs"],
        "schema": ["what"],
        "list": ["file"],
        "render": ["as_json", "file", "name", "row", "seed", "truncate"],
    }
    import luthier

    assert sorted(luthier.__all__) == [
        "Interrupted", "Recipe", "Report", "Session", "UserError", "audit", "inspect", "load_recipe", "make_recipe", "merge",
        "preview", "run",
    ]  # fmt: skip
    for name in luthier.__all__:
        assert getattr(luthier, name).__doc__, name


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_mixture_is_trained_on_and_scored_task_by_task(
    content: dict, bases: Path, tmp_path: Path, family: str
) -> None:
    content["base"]["model"] = str(bases / family)
    other = {
        "name": "room",
        "template": "Is {{ who }} here? {{ text }} ||| {{ who }}",
        "choices": NAMES,
        "metrics": ["accuracy", "macro_f1"],
        "train": "rows.jsonl",
        "validation": 4,
        "test": 6,
    }
    content["task"] = {
        "name": "both",
        "tasks": [
            {"task": content["task"], "rate": 3},
            {"task": other, "rate": 1, "forms": {"zero_shot": 1, "few_shot_options": 1}, "shots": 2},
        ],
    }
    content["training"] = {"max_steps": 10, "batch_size": 4}
    content["tunings"] = {
        "two_shot": {"method": "few_shot", "shots": 2},
        "one": {"method": "lora", "rank": 2, "tasks": ["room"]},
        "all": {"method": "lora", "rank": 2},
    }
    recipe = make_recipe(content)
    report = run(recipe, tmp_path / "run", isolate=False)
    jsonschema.validate(json.loads((tmp_path / "run" / "report.json").read_text()), report_schema())
    assert (report.task, report.tasks, report.metric) == ("both", ["who", "room"], "mean")
    for tuning in report.tunings.values():
        parts = [list(tuning.scores[task].values())[-1].value for task in report.tasks]
        assert tuning.scores["both"]["mean"].value == pytest.approx(sum(parts) / 2)
    table = report.tunings["all"].mixture
    assert [(row.task, row.form, row.asked) for row in table] == [
        ("who", "zero_shot", 0.75), ("room", "zero_shot", 0.125), ("room", "few_shot_options", 0.125),
    ]  # fmt: skip
    assert sum(row.got for row in table) == pytest.approx(1)
    assert all(abs(row.got - row.asked) <= 1 / 40 + 1e-9 for row in table[1:])
    assert all(row.epochs == pytest.approx(row.got * 40 / row.rows) and row.tokens > 0 for row in table)
    assert {row.task for row in report.tunings["one"].mixture} == {"room"}
    assert report.tunings["two_shot"].mixture == []
    page = (tmp_path / "run" / "report.html").read_text()
    assert "The mixture, asked for and got" in page
    session = Session(tmp_path / "run")
    assert len(session.generate(["Anna asks about room 3"], "all", task="who")) == 1
    with pytest.raises(UserError, match="say which with --task. Allowed: who, room"):
        session.generate(["Anna asks about room 3"], "all")


def test_choosing_tasks_of_no_mixture_is_an_error(content: dict) -> None:
    content["tunings"] = {"one": {"method": "lora", "tasks": ["who"]}}
    with pytest.raises(UserError, match="chooses from a mixture, but the recipe has one task"):
        make_recipe(content)
    content["task"] = {"tasks": [content["task"]]}
    content["tunings"] = {"one": {"method": "lora", "tasks": ["whom"]}}
    with pytest.raises(UserError, match="no task 'whom'"):
        make_recipe(content)
