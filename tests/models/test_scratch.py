"""Memory for a moment: one place a name, let go before a longer pass."""

import torch

from luthier.models.scratch import LINE, Scratch

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


def test_moments_stand_behind_what_is_held_until_it_is_let_go() -> None:
    scratch = Scratch()
    scratch.expect([(70, 300), (10, 100)], HERE)
    first = scratch.hold(70, HERE).fill_(1)
    second = scratch.hold(10, HERE).fill_(2)
    moment = scratch.moment(90, HERE).fill_(3)
    assert (first == 1).all() and (second == 2).all() and (moment == 3).all()
    assert (second.data_ptr() - first.data_ptr()) % (LINE * first.element_size()) == 0
    scratch.let_go(last=True)
    assert scratch.moment(300, HERE).data_ptr() == second.data_ptr(), "its place is free, and what was expected fits"
    other = scratch.moment(5, HERE.to(torch.bfloat16))
    assert other.storage_offset() == 0, "each precision has a room of its own"
    scratch.let_go()
    assert scratch.moment(500, HERE).fill_(4).storage_offset() == 0  # more than there is: another room
    assert (first == 1).all(), "a room that grew leaves alone who still holds the smaller one"


def test_a_room_of_a_longer_pass_is_another() -> None:
    scratch = Scratch()
    scratch.make_room(4)
    held = scratch.hold(12, HERE).fill_(1)
    scratch.let_go()
    scratch.make_room(5)
    scratch.moment(12, HERE).fill_(2)
    assert (held == 1).all()
