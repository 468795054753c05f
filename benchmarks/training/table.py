"""Ratios and tables of what was measured: plain numbers, nothing is trained here."""

import statistics
from typing import Any

# Validation losses further apart than this share of the peer's are no equal training.
EQUAL_LOSS = 0.02
Measured = dict[str, float]


def median(runs: list[Measured]) -> Measured:
    """The median of each figure over runs."""
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def entry(
    job: str, peer: str | None, theirs: Measured | None, mine: Measured, preloaded: Measured | None = None
) -> dict[str, Any]:
    """One comparison. Values are useful tokens/s; ratios are Luthier's over the peer's; `preloaded` is Luthier with tcmalloc.

    Without a peer the ratios are None.
    """
    return {
        "job": job, "peer": peer, "peer_value": theirs and theirs["rate"], "ours": mine["rate"],
        "speed_ratio": theirs and mine["rate"] / theirs["rate"],
        "memory_ratio": theirs and mine["peak_bytes"] / theirs["peak_bytes"],
        "loss_peer": theirs and theirs["loss"], "loss_ours": mine["loss"],
        "loss_equal": theirs and abs(mine["loss"] - theirs["loss"]) <= EQUAL_LOSS * theirs["loss"],
        "loss_start": mine.get("loss_start"),
        "peer_peak_bytes": theirs and theirs["peak_bytes"], "our_peak_bytes": mine["peak_bytes"],
        "peer_steps": theirs and theirs.get("steps"), "our_steps": mine.get("steps"),
        "ours_tcmalloc": preloaded and preloaded["rate"],
        "speed_ratio_tcmalloc": preloaded and theirs and preloaded["rate"] / theirs["rate"],
        "memory_ratio_tcmalloc": preloaded and theirs and preloaded["peak_bytes"] / theirs["peak_bytes"],
    }  # fmt: skip


def table(results: list[dict[str, Any]]) -> str:
    """The comparisons in at most 80 columns; a row with unequal loss is marked."""
    lines = [f"{'peer':34}{'tok/s':>6}{'ours':>6}{'speed':>7}{'memory':>7}{'loss':>8}{'ours':>8}"]
    for one in results:
        if one["peer"] is None:
            lines.append(f"{'(none)':40}{one['ours']:6.0f}{'':22}{one['loss_ours']:8.3f}")
            continue
        lines.append(
            f"{one['peer']:34}{one['peer_value']:6.0f}{one['ours']:6.0f}{one['speed_ratio']:6.2f}x{one['memory_ratio']:7.2f}"
            f"{one['loss_peer']:8.3f}{one['loss_ours']:8.3f}{'' if one['loss_equal'] else ' !'}"
        )
    lines.append("speed, memory: Luthier's over the peer's; loss: validation, nats per token")
    if results[0]["loss_start"] is not None:
        lines.append(f"Validation loss before training: {results[0]['loss_start']:.3f}")
    for one in results:
        if one["peer_steps"] != one["our_steps"] and one["peer"] is not None:
            lines.append(
                f"{one['peer']}: {one['peer_steps']:.0f} steps, not {one['our_steps']:.0f}; other rows in each"
            )
    if any(one["speed_ratio_tcmalloc"] for one in results):
        ratios = ", ".join(f"{one['speed_ratio_tcmalloc']:.2f}x" for one in results if one["speed_ratio_tcmalloc"])
        lines.append(f"Luthier with tcmalloc too, in the same order: {ratios}")
    if any(one["loss_equal"] is False for one in results):
        lines.append(f"! losses more than {EQUAL_LOSS:.0%} apart: not the same training, no fair speed")
    return "\n".join(lines)
