"""Memory for a moment: one place a name, let go before a longer pass."""

import torch

from luthier.models.scratch import Scratch

HERE = torch.empty(0)


def test_a_name_keeps_its_place_and_others_have_theirs() -> None:
    scratch = Scratch()
    one = scratch.take("one", (4, 3), HERE).fill_(1)
    other = scratch.take("other", (4, 3), HERE).fill_(2)
    narrow = scratch.take("one", (4, 3), HERE, torch.bfloat16).fill_(3)
    assert (one == 1).all() and (other == 2).all() and (narrow == 3).all()
    again = scratch.take("one", (2, 3), HERE)
    assert again.data_ptr() == one.data_ptr() and again.shape == (2, 3)
    assert scratch.take("one", (5, 3), HERE).shape == (5, 3)


def test_a_longer_pass_finds_nothing_of_the_shorter_one_which_keeps_what_it_has() -> None:
    scratch = Scratch()
    scratch.make_room(4)
    one = scratch.take("one", (4, 3), HERE).fill_(1)
    for tokens, same in ((3, True), (4, True), (5, False)):
        scratch.make_room(tokens)
        assert (scratch.take("one", (4, 3), HERE).data_ptr() == one.data_ptr()) is same
    assert (one == 1).all()
