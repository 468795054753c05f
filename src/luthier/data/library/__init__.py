"""Tasks that ship with the package: one YAML a task, its rows beside it."""

from pathlib import Path

FOLDER = Path(__file__).parent


def task_files() -> dict[str, Path]:
    """Name -> YAML file of every task that ships with the package."""
    return {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in sorted(FOLDER.rglob("*.yaml"))}
