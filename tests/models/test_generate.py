"""Decoding writes the tokens transformers' own generate writes, row by row; draws are those of the written-out rule."""

import random
from dataclasses import replace

import pytest
import torch
from tests import tiny

from luthier.encoding.batches import collate
from luthier.encoding.encoder import Encoded
from luthier.models import attention
from luthier.models import generate as generating
from luthier.models.decoding import Decoding, narrowed
from luthier.models.generate import batches_by_length, generate
from luthier.models.grafted import _derived
from luthier.models.packing import SEEN
from luthier.models.run import target_states
from luthier.tuning import IA3, Bottleneck, LoRA, PrefixTuning, PromptTuning, Selective, attach, parameters
from luthier.tuning.dora import DoRA

FAMILIES = tiny.DECODERS + tiny.UNPACKED + tiny.ENCODER_DECODERS + tiny.ABSOLUTE


def test_an_accelerator_decodes_more_short_prompts_together() -> None:
    prompts = [[0] * length for length in (*range(100, 400), 2000, 3000)]
    for device, sizes in {"cpu": [32] * 9 + [14], "cuda": [32, 88, 116, 66]}.items():
        batches = batches_by_length(prompts, device=device)
        assert [len(batch) for batch in batches] == sizes
        assert {len(batch) for batch in batches_by_length(prompts, 7, device)} == {7, len(prompts) % 7}
        order = [place for batch in batches for place in batch]
        assert [len(prompts[place]) for place in order] == sorted(map(len, prompts), reverse=True)


def prompts_for(top: int, count: int = 7) -> list[list[int]]:
    draw = random.Random(3)
    return [[draw.randint(3, top - 1) for _ in range(draw.randint(2, 25))] for _ in range(count)]


def own(plain, prompt: list[int], new_tokens: int, stop: int, **options) -> list[int]:
    if not plain.encoder_decoder:
        plain.model.set_attn_implementation("eager")
    out = plain.model.generate(
        torch.tensor([prompt], device=plain.device),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=stop,
        **options,
    )[0].tolist()
    out = out[1:] if plain.encoder_decoder else out[len(prompt) :]
    return out[: out.index(stop)] if stop in out else out


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_greedy_equals_transformers_generate(family: str) -> None:
    base, plain = tiny.make(family), tiny.make(family)
    prompts = prompts_for(base.embedding.weight.shape[0])
    free = own(plain, prompts[0], 12, 2)
    stop = free[len(free) // 2] if free else 2  # a token that does occur, so that rows end early
    expected = [own(plain, prompt, 12, stop) for prompt in prompts]
    finished: list[int] = []
    found = generate(base, prompts, 12, [stop], lambda i, _: finished.append(i), Decoding(batch_size=3))
    assert found == expected
    assert sorted(finished) == list(range(len(prompts)))
    assert {len(row) for row in found} != {12}


@pytest.mark.parametrize("family", ["llama", "opt", "t5", "bart"])
def test_what_a_model_asks_for_itself_is_not_obeyed_unseen(family: str) -> None:
    base, wilful = tiny.make(family), tiny.make(family)
    prompts = prompts_for(base.embedding.weight.shape[0], 4)
    asked = wilful.model.generation_config
    asked.min_new_tokens, asked.no_repeat_ngram_size, asked.repetition_penalty, asked.num_beams = 9, 2, 3.0, 3
    assert generate(wilful, prompts, 12, [2]) == generate(base, prompts, 12, [2])


def slow(base, prompt: list[int], new_tokens: int, stop: int) -> list[int]:
    """Greedy decoding that is its meaning: the whole row again for every token."""
    written: list[int] = []
    for _ in range(new_tokens):
        row = Encoded("row", prompt, [*written, 0])  # the label is not used
        with torch.no_grad():
            batch = collate([row], base.decoder_start if base.encoder_decoder else None).to(base.device)
            states = target_states(base, batch)
            token = int(base.logits(states[-1:]).argmax())
        if token == stop:
            break
        written.append(token)
    return written


TUNINGS = {
    "lora": LoRA(rank=2, targets=["all-linear", "embeddings", "lm_head"]),
    "ia3": IA3(),
    "prompt": PromptTuning(length=3, init="random"),
    "prefix": PrefixTuning(length=5, init="random"),
    "bottleneck": Bottleneck(reduction=4),
    "selective": Selective(targets="last-1-block"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_tuned_generation_is_slow_generation_row_by_row(family: str) -> None:
    base = tiny.make(family)
    prompts = prompts_for(base.embedding.weight.shape[0], 4)
    bare = generate(base, prompts, 8, [2])
    for name, method in TUNINGS.items():
        attach(base, name, method, seed=1)
        with torch.no_grad():
            for parameter in parameters(base, name).values():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        base.use(name)
        together = generate(base, prompts, 8, [2], decoding=Decoding(batch_size=3))
        assert together == [slow(base, prompt, 8, 2) for prompt in prompts], name
        assert together != bare or family in tiny.ABSOLUTE, "the tuning has no effect"
    base.use(None)
    assert generate(base, prompts, 8, [2]) == bare


@pytest.mark.parametrize("name", [None, "lora", "prompt", "prefix"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma2"])
def test_what_prompts_share_is_computed_and_kept_once(
    family: str, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.make(family)
    top = base.embedding.weight.shape[0]
    shots = prompts_for(top, 1)[0][:1] * 3 + list(range(5, 45))
    prompts = [shots + prompt for prompt in prompts_for(top, 5)] + [[*shots, 7]]
    if name:
        attach(base, name, TUNINGS[name], seed=1)
        with torch.no_grad():
            for parameter in parameters(base, name).values():
                parameter.add_(torch.randn_like(parameter) * 0.3)
    base.use(name)
    run, passes = generating.run_packed, []
    monkeypatch.setattr(
        generating, "run_packed", lambda *given: passes.append((given[1].shape[1], given[3].cache)) or run(*given)
    )
    found = generate(base, prompts, 8, [2])
    (tokens, cache), own = passes[0], [len(prompt) - len(shots) for prompt in prompts]
    assert tokens == len(shots) + sum(own) + (TUNINGS[name].length if name == "prompt" else 0)
    before = len(shots) + (TUNINGS[name].length if name in ("prompt", "prefix") else 0)
    rooms = {name: {tuple(one.shape)[::2] for one in kept} for name, kept in cache.rooms.items()}
    assert rooms["shared keys"] == rooms["shared values"] == {(1, before)}
    assert rooms["keys"] == rooms["values"] == {(len(prompts), max(own) + 8)}
    places = {name: {one.untyped_storage().data_ptr() for one in kept} for name, kept in cache.rooms.items()}
    assert all(len(each) == 1 for each in places.values()), "all layers' are made at once"
    assert found == [slow(base, prompt, 8, 2) for prompt in prompts]


@pytest.mark.parametrize(("beams", "penalty"), [(2, 1.0), (4, 0.0), (3, 2.0)])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "t5"])
def test_beams_are_those_of_transformers(family: str, beams: int, penalty: float) -> None:
    base, plain = tiny.make(family), tiny.make(family)
    prompts = prompts_for(base.embedding.weight.shape[0], 5)
    free = own(plain, prompts[0], 10, 2)
    stop = free[len(free) // 2] if free else 2
    options = {"num_beams": beams, "length_penalty": penalty}
    expected = [own(plain, prompt, 10, stop, **options) for prompt in prompts]
    assert generate(base, prompts, 10, [stop], decoding=Decoding(beams, penalty, batch_size=3)) == expected
    assert expected != generate(base, prompts, 10, [stop]), "a search that finds what greed finds shows nothing"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"beams": 0}, "at least 1"),
        ({"length_penalty": 0.5}, "set beams above 1"),
        ({"temperature": -1.0}, "not be negative"),
        ({"top_k": 3}, "set temperature above 0"),
        ({"top_p": 0.0}, "above 0 and at most 1"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"beams": 2, "temperature": 1.0}, "exclude each other"),
    ],
)
def test_what_cannot_be_decoded_with_is_said(given: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Decoding(**given)


@pytest.mark.parametrize("family", ["llama", "opt", "t5"])
def test_draws_follow_from_the_seed_and_the_rows_place(family: str) -> None:
    base = tiny.make(family)
    prompts = prompts_for(base.embedding.weight.shape[0], 5)
    warm = Decoding(temperature=1.5, seed=3)
    found = generate(base, prompts, 8, [2], decoding=warm)
    assert generate(base, prompts, 8, [2], decoding=replace(warm, batch_size=2)) == found, "batches change nothing"
    assert generate(base, prompts[3:], 8, [2], decoding=warm, places=[3, 4]) == found[3:]
    assert generate(base, prompts, 8, [2], decoding=Decoding(temperature=1.5, seed=4)) != found
    assert (
        generate(base, [prompts[0]] * 2, 8, [2], decoding=warm)[0]
        != generate(base, [prompts[0]] * 2, 8, [2], decoding=warm)[1]
    )
    greedy = generate(base, prompts, 8, [2])
    assert generate(base, prompts, 8, [2], decoding=Decoding(temperature=1.5, top_k=1)) == greedy
    assert generate(base, prompts, 8, [2], decoding=Decoding(temperature=1e-4)) == greedy


def test_draws_have_the_models_probabilities() -> None:
    base = tiny.make("llama")
    prompt = prompts_for(base.embedding.weight.shape[0], 1)[0]
    with torch.no_grad():
        state = target_states(base, collate([Encoded("row", prompt, [0])], None).to(base.device))
        logits = base.logits(state[-1:])
    expected = narrowed(logits / 2.0, 5, 1.0)[0].cpu()
    drawn = generate(base, [prompt] * 600, 1, [], decoding=Decoding(temperature=2.0, top_k=5, batch_size=300))
    counts = torch.bincount(torch.tensor([one[0] for one in drawn]), minlength=len(expected)) / 600
    assert int((expected > 0).sum()) == 5 and float(counts[expected == 0].sum()) == 0.0
    assert float((counts - expected).abs().max()) < 4 * (0.25 / 600) ** 0.5


def test_what_is_drawn_from_is_narrowed_as_written() -> None:
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.06, 0.04]]).log()
    for top_p, kept in ((0.5, [0]), (0.51, [0, 1]), (0.75, [0, 1, 2]), (0.95, [0, 1, 2, 3]), (1.0, [0, 1, 2, 3, 4])):
        found = narrowed(logits, 0, top_p)[0]
        assert found.nonzero().flatten().tolist() == kept
        assert float(found.sum()) == pytest.approx(1.0)
        torch.testing.assert_close(found[kept], logits.exp()[0, kept] / logits.exp()[0, kept].sum())
    assert narrowed(logits, 4, 0.9)[0].nonzero().flatten().tolist() == [0, 1, 2]  # of the four, these hold 0.9


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_what_follows_from_a_tunings_weights_is_derived_once_an_answer_and_anew_for_the_next(
    dora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.make("llama")
    attach(base, "t", LoRA(rank=2, dora=dora))
    base.use("t")
    counted, norms = [], DoRA._norms_now
    monkeypatch.setattr(DoRA, "_norms_now", lambda self: (counted.append(id(self)), norms(self))[1])
    prompts = [[5, 6, 7, 8], [9, 10, 11]]
    answers = []
    for _ in range(2):
        with torch.no_grad():
            for parameter in parameters(base, "t").values():
                parameter.add_(torch.randn_like(parameter) * 0.5)
        counted.clear()
        found = generate(base, prompts, 8, [])
        assert len(counted) == len(set(counted)) == dora * 14, "derived again within one answer"
        fresh = tiny.make("llama")
        attach(fresh, "t", LoRA(rank=2, dora=dora))
        for key, parameter in parameters(fresh, "t").items():
            parameter.data.copy_(parameters(base, "t")[key])
        fresh.use("t")
        assert found == generate(fresh, prompts, 8, [])
        answers.append(found)
    assert answers[0] != answers[1], "the change of the weights was not seen"


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_what_is_derived_once_is_there_before_the_first_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made between the tensors of a long pass it would tear holes into the heap; for all batches it is one and the same."""
    base = tiny.make("llama")
    attach(base, "t", LoRA(rank=2, dora=name == "dora"))
    base.use("t")
    run, made = generating.run_packed, []
    monkeypatch.setattr(generating, "run_packed", lambda *given: (made.append(dict(_derived.get())), run(*given))[1])
    generate(base, [[5, 6, 7, 8], [9, 10, 11], [3, 4]], 3, [], decoding=Decoding(batch_size=2))
    assert len(made) == 6 and all(each.keys() == made[0].keys() for each in made)
    assert len(made[0]) == 14
    assert all(each[key] is value for each in made for key, value in made[0].items())


def test_rows_that_are_decoded_see_keys_of_few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And none of those that they have not filled: the answers are those of rows by themselves."""
    base = tiny.make("llama")
    prompts = prompts_for(base.embedding.weight.shape[0], 4)
    attended, sizes = attention._attend_cached, []
    monkeypatch.setattr(attention, "_attend_cached", lambda *given: sizes.append(given[2].shape[2]) or attended(*given))
    found = generate(base, prompts, 70, [])
    capacity = max(map(len, prompts)) + 70
    assert len(sizes) == 69 * base.blocks
    assert (
        set(sizes) <= {min(size, capacity) for size in range(SEEN, capacity + SEEN, SEEN)} and 1 < len(set(sizes)) < 10
    )
    assert found == [generate(base, [prompt], 70, [])[0] for prompt in prompts]


def test_rows_that_go_on_mostly_stay_where_they_are() -> None:
    for kept in ([0, 1, 2], [1, 2, 4, 5], [3], [0, 4], [2, 3, 4]):
        order = generating._with_few_moved(kept)
        assert sorted(order) == kept
        assert all(order[place] == place for place in kept if place < len(kept))
