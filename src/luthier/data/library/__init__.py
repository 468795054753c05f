"""Tasks that ship with the package: one YAML a task, its rows beside it."""

from pathlib import Path

FOLDER = Path(__file__).parent


def task_files() -> dict[str, Path]:
    """Name -> YAML file of every task that ships with the package."""
    found = {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in sorted(FOLDER.rglob("*.yaml"))}
    return {name: path for name, path in found.items() if not name.startswith("templates/")}


def template_files() -> dict[str, Path]:
    """Name -> file of every template collection that ships with the package, in promptsource's format."""
    return {path.stem: path for path in sorted((FOLDER / "templates").glob("*.yaml"))}
