"""Training's record after a kill: TensorBoard shows each step once, as it was told last."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from luthier.training.log import log_hooks


def test_a_training_that_goes_on_purges_the_steps_it_repeats(tmp_path: Path) -> None:
    for steps, loss in ((range(1, 8), 1.0), (range(5, 11), 2.0)):  # killed after step 7, its checkpoint after step 4
        with log_hooks(tmp_path / "log.jsonl", tmp_path / "board") as hooks:
            for step in steps:
                for hook in hooks:
                    hook({"step": step, "loss": loss})
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert [(one.step, one.value) for one in board.Scalars("training/loss")] == [
        (step, 1.0 if step < 5 else 2.0) for step in range(1, 11)
    ]
