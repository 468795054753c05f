"""A chat template that only writes out what was said need not run for each question; any other runs."""

import random
from copy import deepcopy

import pytest
from tests import tiny
from tests.encoding.test_exact_targets import text

from luthier.data.task import Example
from luthier.encoding.chat import frame, writes_out_only
from luthier.encoding.encoder import Encoder

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = ["{% for m in messages %}{{ m.role ~ ': ' ~ m.content }}\n{% endfor %}", tiny.CHAT, SMOLLM2]
LOOKING = [
    "{% for m in messages %}{{ m['content'] | trim }}{% endfor %}",
    "{% for m in messages %}{{ m['content'].strip() }}{% endfor %}",
    "{% for m in messages %}{% if 'x' in m['content'] %}{{ 'X' }}{% endif %}{{ m['content'] }}{% endfor %}",
    "{% for m in messages %}{% set said = m['content'] %}{{ said[:5] }}{% endfor %}",
    "{% set rest = messages[1:] %}{% for m in rest %}{{ m['content'] }}{% endfor %}",
    "{% for m in messages %}{{ m | tojson }}{% endfor %}",
    "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
    "{% for m in messages %}{% set key = 'content' %}{{ m[key] | upper }}{% endfor %}",
    "{% macro say(m) %}{{ m['content'] | upper }}{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
    "{% for m in messages %}{{ m.get('content') }}{% endfor %}",
    "{% for m in messages %}{{ m['content'] if m['content'] else 'nothing' }}{% endfor %}",
]


@pytest.mark.parametrize("template", PLAIN)
def test_a_frame_gives_what_the_template_gives(template: str) -> None:
    tokenizer = deepcopy(tiny.byte_bpe())
    tokenizer.chat_template = template
    assert writes_out_only(template)
    encoder = Encoder(tokenizer, encoder_decoder=False, chat=True, max_length=400)
    draw = random.Random(0)
    for _ in range(300):
        asked, system = text(draw, 40), draw.choice([None, "Be brief.", text(draw, 10)])
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": asked})
        expected = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert encoder.prompt_text(Example("x", asked, "", system=system)) == expected
    assert encoder._frames, "frames were used"


@pytest.mark.parametrize("template", LOOKING)
def test_a_template_that_looks_at_what_was_said_runs_each_time(template: str) -> None:
    assert not writes_out_only(template)
    tokenizer = deepcopy(tiny.byte_bpe())
    tokenizer.chat_template = template
    assert frame(tokenizer, None) is None
