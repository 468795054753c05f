"""What inspecting says, against brute force: torch's own SVD of BA, a plain search of the vocabulary, plain norms."""

import math

import pytest
import torch
from tests import tiny
from tests.laws.test_methods import disturb, make_rows, scores

from luthier.models.dense import dense_weight
from luthier.models.observe import keys_and_values
from luthier.tuning import IA3, Bottleneck, Full, LoRA, PrefixTuning, PromptTuning, attach, parameters
from luthier.tuning.inspect_added import inspect_adapters, inspect_prefix, inspect_scalings
from luthier.tuning.inspect_prompt import inspect_prompt, replaced_by_tokens
from luthier.tuning.inspect_weights import effective_rank, inspect_lora, inspect_substitutes, singular_values

TEXT = "The guest asks the clerk for a quiet room"


@pytest.mark.parametrize("other", [None, LoRA(rank=1, targets="embeddings"), Full()])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_an_untrained_prompt_is_exactly_its_text(family: str, other: LoRA | Full | None) -> None:
    base = tiny.make(family)
    if other:  # whatever else is in use
        attach(base, "other", other)
        disturb(base, "other")
        base.use("other")
    length = len(base.tokenizer(TEXT, add_special_tokens=False).input_ids)
    attach(base, "t", PromptTuning(length=length, init_text=TEXT))
    found = inspect_prompt(base, "t")
    assert found.text == TEXT
    assert found.ids == base.tokenizer(TEXT, add_special_tokens=False).input_ids
    assert found.mean_cosine == pytest.approx(1.0)
    assert found.chance_cosine < 0.9
    assert all(one.neighbours[0].distance == 0.0 for one in found.tokens)
    before = base.grafts.prompts["t"].detach().clone()
    with replaced_by_tokens(base, "t", found.ids):
        assert torch.equal(base.grafts.prompts["t"], before), "the tokens are what the prompt started from"


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("chunk", [7, 100_000])
def test_neighbours_are_those_of_a_plain_search(family: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.tuning.inspect_prompt._ROWS", chunk)
    base = tiny.make(family)
    attach(base, "t", PromptTuning(length=4, init="vocabulary"))
    disturb(base, "t")
    found = inspect_prompt(base, "t", neighbours=6)
    table = base.embedding.weight.detach()
    kept = [token for token, row in enumerate(table) if row.norm()]  # padding is all zeros and has no direction
    for place, vector in enumerate(base.grafts.prompts["t"].detach()):
        cosines = {
            token: float(torch.dot(vector, table[token]) / (vector.norm() * table[token].norm())) for token in kept
        }
        order = sorted(kept, key=lambda token: -cosines[token])[:6]
        near = found.tokens[place].neighbours
        assert [one.id for one in near] == order
        assert [one.cosine for one in near] == pytest.approx([cosines[token] for token in order], abs=1e-5)
        assert near[0].distance == pytest.approx(float((vector - table[order[0]]).norm()), rel=1e-4)
        assert near[0].text == base.tokenizer.decode([order[0]])
    distinct = sorted(set(found.ids))
    pairs = [float(torch.cosine_similarity(table[a], table[b], dim=0)) for a in distinct for b in distinct if a != b]
    assert found.group == pytest.approx(sum(pairs) / len(pairs), abs=1e-5)
    assert inspect_prompt(base, "t", neighbours=6) == found, "the baselines are drawn from the seed"


def test_a_group_of_like_tokens_is_told_from_chance() -> None:
    base = tiny.make("llama")
    with torch.no_grad():  # five tokens that share a direction
        base.embedding.weight[50:55] = base.embedding.weight[50] + 0.1 * base.embedding.weight[60:65]
    attach(base, "t", PromptTuning(length=5))
    with torch.no_grad():
        base.grafts.prompts["t"].copy_(base.embedding.weight[50:55])
    found = inspect_prompt(base, "t")
    assert found.group is not None and found.chance_group is not None
    assert found.group > 0.9 > 0.3 > found.chance_group
    assert found.chance_of_group == 0.0
    with torch.no_grad():
        base.grafts.prompts["t"].copy_(base.embedding.weight[50].expand(5, -1))
    alone = inspect_prompt(base, "t")
    assert (alone.group, alone.chance_group, alone.chance_of_group) == (None, None, None)


def test_tokens_stand_in_for_the_prompt_and_it_comes_back() -> None:
    base = tiny.make("llama")
    attach(base, "t", PromptTuning(length=3, init="vocabulary"))
    disturb(base, "t")
    attach(base, "tokens", PromptTuning(length=3))
    with torch.no_grad():
        base.grafts.prompts["tokens"].copy_(base.embedding.weight[torch.tensor([7, 8, 9])])
    rows, before = make_rows(base), base.grafts.prompts["t"].detach().clone()
    base.use("tokens")
    expected = scores(base, rows)
    base.use("t")
    own = scores(base, rows)
    with replaced_by_tokens(base, "t", [7, 8, 9]):
        assert torch.equal(scores(base, rows), expected)
    assert torch.equal(scores(base, rows), own)
    with pytest.raises(RuntimeError), replaced_by_tokens(base, "t", [7, 8, 9]):
        raise RuntimeError
    assert torch.equal(base.grafts.prompts["t"], before)


@pytest.mark.parametrize("shape", [(5, 7, 3), (3, 40, 8), (64, 6, 6), (9, 9, 1)])
def test_singular_values_are_those_of_the_whole_product(shape: tuple[int, int, int]) -> None:
    out, inputs, rank = shape
    a, b = torch.randn(rank, inputs, dtype=torch.float64), torch.randn(out, rank, dtype=torch.float64)
    for scale in (2.0, -0.5):
        expected = torch.linalg.svd(scale * b @ a).S
        found = singular_values(a, b, scale)
        count = min(len(found), len(expected))
        torch.testing.assert_close(found[:count], expected[:count])
        assert float(expected[count:].sum() if len(expected) > count else found[count:].sum()) < 1e-10


def test_effective_rank_counts_equal_directions() -> None:
    assert effective_rank(torch.tensor([3.0, 3.0, 3.0, 0.0])) == pytest.approx(3.0)
    assert effective_rank(torch.tensor([5.0, 0.0])) == pytest.approx(1.0)
    assert effective_rank(torch.zeros(4)) == 0.0
    assert 1.0 < effective_rank(torch.tensor([1.0, 0.1])) < 2.0


@pytest.mark.parametrize(("family", "quantize"), [("llama", None), ("llama", "nf4"), ("gpt2", None), ("t5", None)])
def test_spectra_are_those_of_the_formed_products(family: str, quantize) -> None:
    base = tiny.make(family, quantize=quantize)
    attach(base, "t", LoRA(rank=3, alpha=6))
    assert all(one.norm == one.effective_rank == one.energy == 0.0 for one in inspect_lora(base, "t"))
    disturb(base, "t")
    owned = parameters(base, "t")
    products = {
        path: 2.0 * owned[f"{path}.lora_B.weight"] @ owned[f"{path}.lora_A.weight"]
        for path in dict.fromkeys(key.rpartition(".lora_")[0] for key in owned)
    }
    whole = sum(float(product.detach().square().sum()) for product in products.values())
    found = inspect_lora(base, "t")
    assert [one.path for one in found] == list(products)
    for one in found:
        product = products[one.path].detach()
        torch.testing.assert_close(
            torch.tensor(one.singular_values), torch.linalg.svdvals(product)[:3], atol=1e-5, rtol=1e-4
        )
        assert one.norm == pytest.approx(float(product.norm()), rel=1e-4)
        assert one.relative == pytest.approx(
            float(product.norm() / dense_weight(base.grafts.modules[one.path]).norm()), rel=1e-4
        )
        assert one.energy == pytest.approx(float(product.square().sum()) / whole, rel=1e-4)
        assert one.rank == 3 and f".{one.block}." in one.path


@pytest.mark.parametrize("dora", [False, True])
def test_embeddings_and_magnitudes_are_counted(dora: bool) -> None:
    base = tiny.make("gemma2")
    attach(base, "t", LoRA(rank=2, alpha=4, targets=["embeddings", "q_proj"], dora=dora))
    disturb(base, "t")
    base.use("t", merged=True)
    after = {path: dense_weight(base.grafts.modules[path]).clone() for path in base.grafts.deltas("t")}
    base.use(None)
    found = {one.path: one for one in inspect_lora(base, "t")}
    assert found.keys() == after.keys() and "model.embed_tokens" in found
    for path, one in found.items():
        before = dense_weight(base.grafts.modules[path])
        assert one.relative == pytest.approx(float((after[path] - before).norm() / before.norm()), rel=1e-3)
        assert one.norm > 0 and (one.rank, len(one.singular_values)) == (2, 2)
        assert dora or one.relative == pytest.approx(one.norm / float(before.norm()), rel=1e-3)


def test_changes_are_relative_to_the_base_block_by_block() -> None:
    base = tiny.make("llama")
    attach(base, "t", Full())
    assert all(one.relative == 0.0 for one in inspect_substitutes(base, "t"))
    key = "model.layers.1.mlp.up_proj.weight"
    original = base.grafts.originals[key]
    with torch.no_grad():
        parameters(base, "t")[key].mul_(1.5)
    found = {one.part: one for one in inspect_substitutes(base, "t")}
    assert sum(one.parameters for one in found.values()) == base.parameter_count
    block = [one for name, one in base.grafts.originals.items() if name.startswith("model.layers.1.")]
    size = math.sqrt(sum(float(one.square().sum()) for one in block))
    changed = found.pop("model.layers.1")
    assert changed.relative == pytest.approx(0.5 * float(original.norm()) / size, rel=1e-4)
    assert (changed.most_moved, changed.most_relative) == (key, pytest.approx(0.5, rel=1e-4))
    assert found.keys() == {"model.embed_tokens", "model.layers.0", "model.norm"}
    assert all(one.relative == 0.0 for one in found.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_adapters_show_the_spectrum_of_their_linear_part(family: str) -> None:
    base = tiny.make(family)
    attach(base, "t", Bottleneck(reduction=8))
    assert all(one.norm == 0.0 for one in inspect_adapters(base, "t"))
    disturb(base, "t")
    owned, found = parameters(base, "t"), inspect_adapters(base, "t")
    assert len(found) == len(owned) // 4 and sum(one.energy for one in found) == pytest.approx(1.0)
    for one in found:
        product = owned[f"{one.path}.adapter_up.weight"] @ owned[f"{one.path}.adapter_down.weight"]
        expected = torch.linalg.svdvals(product.detach())[: one.rank]
        torch.testing.assert_close(torch.tensor(one.singular_values), expected, atol=1e-5, rtol=1e-4)
        assert one.relative is None


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_factors_are_counted_from_one(family: str) -> None:
    base = tiny.make(family)
    attach(base, "t", IA3())
    assert all((one.change, one.smallest, one.largest) == (0.0, 1.0, 1.0) for one in inspect_scalings(base, "t"))
    owned = parameters(base, "t")
    first = next(iter(owned))
    with torch.no_grad():
        owned[first][0], owned[first][1] = 3.0, 0.5
    found = inspect_scalings(base, "t")
    assert [f"{one.path}.ia3_l" for one in found] == list(owned)
    one = found[0]
    assert (one.smallest, one.largest, one.channels) == (0.5, 3.0, len(owned[first]))
    assert one.change == pytest.approx(math.sqrt((4.0 + 0.25) / one.channels))
    assert one.amplified == pytest.approx(1 / one.channels)
    assert all(other.change == 0.0 for other in found[1:])


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "t5"])
def test_a_fresh_prefix_has_the_norms_of_its_text(family: str) -> None:
    base = tiny.make(family)
    length = len(base.tokenizer(TEXT, add_special_tokens=False).input_ids)
    attach(base, "t", PrefixTuning(length=length, init_text=TEXT))
    layers = inspect_prefix(base, "t")
    text = keys_and_values(base, base.tokenizer(TEXT, add_special_tokens=False).input_ids)
    readers = base.grafts.prefixes["t"].readers
    for one in layers:
        pair = text[readers.index(readers[one.layer])]
        assert one.key_norm == pytest.approx(float(pair[0].norm(dim=-1).mean()), rel=1e-4)
        assert one.value_norm == pytest.approx(float(pair[1].norm(dim=-1).mean()), rel=1e-4)
        assert one.usual_key_norm > 0 and one.usual_value_norm > 0
        assert one.alike is not None and one.alike < 0.99
    with torch.no_grad():
        base.grafts.prefixes["t"].prompt_embeddings.copy_(base.grafts.prefixes["t"].prompt_embeddings[:1].clone())
    assert all(one.alike == pytest.approx(1.0) for one in inspect_prefix(base, "t"))
