"""A finished run is merged and inspected through the command line, wrong inputs included."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from luthier.errors import UserError
from luthier.inspect_tuning import inspect
from luthier.job import run
from luthier.merge_tuning import merge
from luthier.recipe_file import make_recipe
from luthier.session import Session
from tests import tiny

NAMES = ["Anna", "Ben", "Chloe", "Dev"]
TEXT = "The guest asks the clerk for a room"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs on tiny bases, by family and storage."""
    folder = tmp_path_factory.mktemp("ship")
    rows = [{"text": f"{NAMES[n % 4]} asks about room {n}", "who": NAMES[n % 4]} for n in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for name, family, quantize in (("llama", "llama", None), ("t5", "t5", None), ("nf4", "llama", "nf4")):
        base = tiny.make(family)
        base.model.save_pretrained(folder / f"base-{name}")
        base.tokenizer.save_pretrained(folder / f"base-{name}")
        content = {
            "base": {"model": str(folder / f"base-{name}"), "dtype": "float32", "device": "cpu", "quantize": quantize},
            "data": str(folder),
            "task": {
                "name": "who",
                "template": "Say who: {{ text }} ||| {{ who }} asks.",
                "train": "rows.jsonl",
                "validation": 4,
                "test": 6,
                "max_new_tokens": 4,
            },
            "retention": [],
            "training": {"max_steps": 4, "batch_size": 4, "learning_rate": 0.02},
            "tunings": {
                "zero_shot": {},
                "two_shot": {"method": "few_shot"},
                "soft": {"method": "prompt_tuning", "init_text": TEXT, "length": 4},
                "lora": {"rank": 2},
                **({} if quantize else {"full": {}}),
                **(
                    {
                        "adapters": {"method": "bottleneck"},
                        "ia3": {},
                        "prefix": {"method": "prefix_tuning", "length": 3},
                    }
                    if name == "llama"
                    else {}
                ),
            },
        }
        found[name] = folder / name
        run(make_recipe(content), folder / name, isolate=False)
    return found


def luthier(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "luthier.cli", *map(str, arguments)], capture_output=True, text=True,
        env=os.environ | {"COLUMNS": "80"},
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done


def answers_without_luthier(folder: Path, prompts: list[str], encoder_decoder: bool) -> list[str]:
    """Greedy answers from transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    kind = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
    model = kind.from_pretrained(folder, attn_implementation="eager")
    found = []
    for prompt in prompts:
        if encoder_decoder:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
        else:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        stop = sorted({tokenizer.eos_token_id})
        out = model.generate(ids, do_sample=False, max_new_tokens=4, eos_token_id=stop, pad_token_id=stop[0])[0]
        new = out[1:] if encoder_decoder else out[ids.shape[1] :]
        found.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    return found


@pytest.mark.parametrize(("family", "tuning"), [("llama", "lora"), ("llama", "full"), ("t5", "lora"), ("t5", "full")])
def test_a_merged_model_answers_as_its_tuning_without_luthier(
    runs: dict[str, Path], tmp_path: Path, family: str, tuning: str
) -> None:
    out = tmp_path / "merged"
    done = luthier("merge", runs[family], "--tuning", tuning, "--out", out)
    assert done.returncode == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if str(out) not in line]
    assert all(len(line) <= 80 for line in table), done.stdout
    assert "Within the limits" in done.stdout and "base *" in done.stdout
    certificate = json.loads((out / "certificate.json").read_text())
    assert certificate["passed"] and certificate["chosen"] == "base" and certificate["method"] == tuning
    assert (certificate["split"], certificate["rows"], certificate["dtype"]) == ("validation", 4, "float32")
    drift = certificate["choices"]["base"]["drift"]
    assert drift["largest_logit_difference"] < 1e-4 and drift["kl"] < 1e-6 and drift["flips"] == 0.0
    assert drift["loss"] == pytest.approx(drift["reference_loss"], abs=1e-4)
    assert not list(tmp_path.glob(".merged*")), "a partial folder was left"
    texts = [f"{name} asks about room 7" for name in NAMES]
    session = Session(runs[family])
    expected = session.generate(texts, tuning)
    assert answers_without_luthier(out, [f"Say who: {text}" for text in texts], family == "t5") == expected


def test_a_merge_on_4_bits_shows_its_choices_and_takes_the_nearest(runs: dict[str, Path], tmp_path: Path) -> None:
    done = luthier("merge", runs["nf4"], "--tuning", "lora", "--out", tmp_path / "best")
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("16-bit", "dequantized *", "requantized"))
    certificate = json.loads((tmp_path / "best" / "certificate.json").read_text())
    kl = {name: one["drift"]["kl"] for name, one in certificate["choices"].items()}
    assert list(kl) == ["16-bit", "dequantized", "requantized"]
    assert certificate["chosen"] == "dequantized" == min(kl, key=kl.get)
    assert kl["dequantized"] < 1e-6 < kl["16-bit"]
    size = {name: one["bytes"] for name, one in certificate["choices"].items()}
    assert size["requantized"] < size["dequantized"]
    assert certificate["base"]["quantized"] is True
    for onto in ("16-bit", "requantized"):
        refused = luthier(
            "merge", runs["nf4"], "--tuning", "lora", "--out", tmp_path / onto, "--onto", onto, "--max-kl", "1e-5"
        )
        assert (
            refused.returncode == 2 and "would answer otherwise" in refused.stderr and "(limit 1e-05)" in refused.stderr
        )
        assert not (tmp_path / onto).exists() and not list(tmp_path.glob(f".{onto}*"))
    taken = merge(runs["nf4"], "lora", tmp_path / "packed", onto="requantized", max_kl=0.0, allow_drift=True)
    assert not taken.passed and taken.chosen == "requantized"
    assert json.loads((tmp_path / "packed" / "certificate.json").read_text())["passed"] is False
    assert "quantization_config" in json.loads((tmp_path / "packed" / "config.json").read_text())
    assert "quantization_config" not in json.loads((tmp_path / "best" / "config.json").read_text())


def test_the_saved_precision_is_the_certified_one(runs: dict[str, Path], tmp_path: Path) -> None:
    exact = merge(runs["llama"], "lora", tmp_path / "a").choices["base"].drift
    rounded = merge(runs["llama"], "lora", tmp_path / "b", dtype="bfloat16").choices["base"].drift
    assert rounded.kl > exact.kl and rounded.largest_logit_difference > 100 * exact.largest_logit_difference
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "b").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tuning", "soft"], "'soft' cannot be merged: prompt_embeddings stand before the rows"),
        (["--tuning", "zero_shot"], "'zero_shot' is the base as it is: nothing was trained. Trained tunings: soft, lora, full"),
        (["--tuning", "two_shot"], "saved nothing"),
        (["--tuning", "lara"], "Did you mean 'lora'"),
        (["--tuning", "lora", "--onto", "dequantized"], "is for a base in 4 bits"),
        (["--tuning", "lora", "--onto", "8-bit"], "Allowed: best, 16-bit, dequantized, requantized"),
        (["--tuning", "lora", "--dtype", "int8"], "Allowed: bfloat16, float32, float16"),
    ],
)  # fmt: skip
def test_wrong_merges_are_one_message_and_leave_nothing(
    runs: dict[str, Path], tmp_path: Path, arguments: list[str], message: str
) -> None:
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    with pytest.raises(UserError) as caught:
        merge(
            runs["llama"],
            options["--tuning"],
            tmp_path / "out",
            onto=options.get("--onto", "best"),
            dtype=options.get("--dtype"),
        )
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_merge_overwrites_nothing(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    for out in (tmp_path, tmp_path / "mine"):
        done = luthier("merge", runs["llama"], "--tuning", "lora", "--out", out)
        assert done.returncode == 2 and "exists already" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    missing = luthier("merge", tmp_path / "no-run", "--tuning", "lora", "--out", tmp_path / "x")
    assert missing.returncode == 2 and "is no run directory" in missing.stderr


def test_a_full_disk_leaves_no_half_merged_model(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("luthier.merge_tuning.write_json", full)
    with pytest.raises(UserError, match="could not be written: No space left"):
        merge(runs["llama"], "lora", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["llama", "t5", "nf4"])
def test_inspecting_a_soft_prompt_through_the_command_line(runs: dict[str, Path], family: str) -> None:
    done = luthier("inspect", runs[family], "--tuning", "soft", "--json", "--neighbours", "3")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == json.loads((runs[family] / "inspect" / "soft.json").read_text())
    assert len(found["prompt"]["tokens"]) == 4 and all(len(one["neighbours"]) == 3 for one in found["prompt"]["tokens"])
    scores = found["faithfulness"]["scores"]
    session = Session(runs[family])
    lora = session.recipe.tunings["soft"].method
    assert lora.virtual_tokens() == 4
    assert scores["prompt"]["loss"] == pytest.approx(
        json.loads((runs[family] / "results" / "soft.json").read_text())["validation_loss"], abs=1e-5
    )
    assert scores["without"]["loss"] == pytest.approx(
        json.loads((runs[family] / "results" / "zero_shot.json").read_text())["validation_loss"], abs=1e-5
    )
    gain = scores["without"]["loss"] - scores["prompt"]["loss"]
    expected = (scores["without"]["loss"] - scores["tokens"]["loss"]) / gain if gain > 0 else None
    assert found["faithfulness"]["kept"] == expected
    assert all(set(one) == {"loss", "rougeLsum"} for one in scores.values())
    ElementTree.parse(runs[family] / "inspect" / "soft.svg")


@pytest.mark.parametrize(("family", "tuning"), [
    ("llama", "lora"), ("t5", "lora"), ("nf4", "lora"), ("llama", "full"), ("llama", "adapters"), ("llama", "ia3"),
    ("llama", "prefix"),
])  # fmt: skip
def test_inspecting_weights_through_the_command_line(runs: dict[str, Path], family: str, tuning: str) -> None:
    done = luthier("inspect", runs[family], "--tuning", tuning)
    assert done.returncode == 0, done.stderr
    assert all(len(line) <= 80 for line in done.stdout.splitlines() if "picture" not in line), done.stdout
    found = json.loads((runs[family] / "inspect" / f"{tuning}.json").read_text())
    picture = (runs[family] / "inspect" / f"{tuning}.svg").read_text()
    ElementTree.fromstring(picture)
    if tuning in ("lora", "adapters"):
        assert sum(one["energy"] for one in found["spectra"]) == pytest.approx(1.0)
        assert all(one["path"] in picture for one in found["spectra"])
    elif tuning == "ia3":
        assert all(one["path"] in picture and one["path"] in done.stdout for one in found["scalings"])
    elif tuning == "prefix":
        assert all(f"{kind} {one['layer']}" in picture for one in found["prefix"] for kind in ("key", "value"))
        assert [f"{one['key_norm']:.2f}" in done.stdout for one in found["prefix"]] == [True] * len(found["prefix"])
    else:
        assert all(one["part"] in picture and one["part"] in done.stdout for one in found["changes"])


def test_wrong_inspections_are_one_message(runs: dict[str, Path], tmp_path: Path) -> None:
    for tuning, message in (("zero_shot", "nothing was trained"), ("sot", "Did you mean 'soft'")):
        with pytest.raises(UserError, match=message):
            inspect(runs["llama"], tuning)
    done = luthier("inspect", tmp_path, "--tuning", "soft")
    assert done.returncode == 2 and "is no run directory" in done.stderr


def test_a_run_on_4_bits_refuses_full_fine_tuning_before_any_work(
    runs: dict[str, Path], tmp_path: Path, capsys
) -> None:
    content = Session(runs["nf4"]).recipe.model_dump(mode="json")
    content["tunings"]["full"] = {"method": "full"}
    with pytest.raises(UserError, match="'full' trains .* weights that the base keeps in 4 bits"):
        run(make_recipe(content), tmp_path / "out", isolate=False)
    assert capsys.readouterr().out == "" and not (tmp_path / "out").exists()
    assert json.loads((runs["nf4"] / "results" / "lora.json").read_text())["base"]["quantized"] is True
