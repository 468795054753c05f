"""The default base through the command line, as a new user drives it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.journey


def luthier(*arguments: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "luthier.cli", *arguments], cwd=cwd, capture_output=True, text=True,
        env=os.environ | {"COLUMNS": "80"},
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run of the shipped task on the real base."""
    folder = tmp_path_factory.mktemp("journey")
    recipe = {
        "task": "support-dialogues",
        "training": {"max_steps": 4},
        "tunings": {"zero_shot": {}, "prompt_tuning": {"length": 8}, "lora": {"training": {"max_steps": 8}}},
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(recipe))
    limits = ["task.train.limit=32", "task.validation.limit=4", "task.test.limit=6", "task.max_new_tokens=32"]
    sets = [part for limit in limits for part in ("--set", limit)]
    done = luthier("run", "small.yaml", *sets, "--set", "retention=[]", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert all(len(line) <= 80 for line in done.stdout.splitlines() if "report" not in line), done.stdout
    return folder / "runs" / "small"


def test_a_small_run_learns_and_says_so(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    lora, zero = report["tunings"]["lora"], report["tunings"]["zero_shot"]
    assert report["base"]["parameters"] == 134_515_008
    assert lora["trainable_parameters"] == 2_442_240
    assert report["tunings"]["prompt_tuning"]["trainable_parameters"] == 8 * 576
    assert lora["validation_loss"] < zero["validation_loss"] - 0.1
    assert lora["peak_memory_bytes"] < 6e9
    assert (finished / "report.html").stat().st_size > 10_000


def test_generate_switches_tunings_and_writes_files(finished: Path, tmp_path: Path) -> None:
    text = "Clerk: Good morning.\nAda: My parcel is wet.\nClerk: I will send a new one today."
    answers = []
    for tuning in ("lora", "prompt_tuning"):
        done = luthier("generate", str(finished), "--tuning", tuning, text)
        assert done.returncode == 0, done.stderr
        answers.append(done.stdout)
    assert answers[0] != answers[1]
    (tmp_path / "in.txt").write_text(json.dumps(text) + "\nBen: Hi.\n")
    out = tmp_path / "out.jsonl"
    done = luthier("generate", str(finished), "--tuning", "lora", "--file", str(tmp_path / "in.txt"), "--out", str(out))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["text"] for line in lines] == [text, "Ben: Hi."]
    assert all(line["answer"] for line in lines)
    refused = luthier("generate", str(finished), "--tuning", "lora", "word " * 3000)
    assert refused.returncode == 2
    assert "tokens" in refused.stderr


def test_preview_marks_exactly_the_trained_tokens() -> None:
    done = luthier("preview", "examples/demo.yaml", "--rows", "2")
    assert done.returncode == 0, done.stderr
    first = json.loads(
        (REPOSITORY / "src/luthier/data/library/support-dialogues/train.jsonl").read_text().splitlines()[0]
    )
    assert f"{first['summary']}<|im_end|>" in done.stdout
    assert done.stdout.count("<|im_start|>assistant\n") == 2


def test_the_gguf_file_itself_is_a_base() -> None:
    """Named by its file, the embedded base has the same weights and tokenizer."""
    from luthier.cached import cache_folder
    from luthier.models.base import BaseModel
    from luthier.models.embedded import EMBEDDED
    from luthier.models.load import BaseSpec

    file = cache_folder() / "downloads" / Path(EMBEDDED["smollm2-135m-instruct"].member).name
    loaded, embedded = BaseModel.load(BaseSpec(model=str(file))), BaseModel.load(BaseSpec())
    assert loaded.fingerprint() == embedded.fingerprint()
    text = "Étude 東京 <|im_start|> a  b"
    assert loaded.tokenizer(text).input_ids == embedded.tokenizer(text).input_ids


def test_the_schemas_are_json() -> None:
    for what in ("recipe", "report"):
        done = luthier("schema", what)
        assert json.loads(done.stdout)["type"] == "object"
    assert luthier("schema", "tuning").returncode == 2


def test_the_quickstart_is_ten_lines_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The script as it stands, on fewer rows."""
    import luthier as package
    from luthier.recipe_file import make_recipe

    script = REPOSITORY / "examples" / "quickstart.py"
    code = [line for line in script.read_text().splitlines() if line.strip() and not line.startswith('"""')]
    assert len(code) <= 10
    limits = ["task.train.limit=8", "task.validation.limit=2", "task.test.limit=2", "training.epochs=1", "retention=[]"]
    monkeypatch.setattr(package, "make_recipe", lambda content: make_recipe(content, limits))
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("quickstart", script)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    said = capsys.readouterr().out
    assert "base:" in said
    assert "lora:" in said
