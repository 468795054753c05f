"""The heap's model against what glibc does, and against sets of pages."""

import random

from luthier.models.heap import PAGE, Heap


def test_a_freed_block_no_longer_fits_its_size_where_small_objects_settle_beside_it() -> None:
    heap = Heap()
    places = [heap.take(1_000_000) for _ in range(8)]
    first = heap.most
    for place in places[::2]:
        heap.free(place, 1_000_000)
    small = [heap.take(64) for _ in range(200)]
    again = [heap.take(1_000_000) for _ in range(4)]
    assert first < 8_100_000 and heap.most > 9_000_000
    for size, those in ((64, small), (1_000_000, [*again, *places[1::2]])):
        for place in those:
            heap.free(place, size)
    before = heap.most
    mapped = heap.take(64 << 20)  # by itself, and given back at once
    assert heap.most == before + (64 << 20)
    heap.free(mapped, 64 << 20)
    heap.restart()
    assert heap.most == before


def test_pages_given_back_count_again_once_they_are_used() -> None:
    draw, heap = random.Random(0), Heap()
    live: list[tuple[tuple[tuple[int, int], ...], int]] = []
    present: set[int] = set()  # pages, by brute force

    def use(start: int, size: int) -> None:
        present.update(range(start // PAGE, -(-(start + size) // PAGE)))

    for turn in range(1200):
        if turn in (400, 800):
            heap.give_back()
            present.clear()
            for place, _ in live:
                for start, size in place:
                    use(start, size)
        # Small chunks that are kept apart hold pages; what is cut off for alignment may lie on one more.
        assert 0 <= -(-heap.resident // PAGE) - len(present) <= 40, (turn, -(-heap.resident // PAGE) - len(present))
        if live and draw.random() < (0.7 if 300 < turn < 400 or 700 < turn < 800 else 0.4):
            heap.free(*live.pop(draw.randrange(len(live))))
        else:
            size = draw.choice((64, 5_000, 200_000, 1_000_000))
            live.append((heap.take(size), size))
            for start, held in live[-1][0]:
                use(start, held)
    grown = heap.resident
    heap.give_back()
    assert heap.resident < grown
    for place, size in live:
        heap.free(place, size)
    heap.give_back()
    assert heap.resident < 100 * PAGE
