"""A report's four files: report.json, and the same numbers as a page, as Markdown and as CSV."""

from pathlib import Path

from luthier.files import write_json, write_whole
from luthier.report.markdown import markdown
from luthier.report.page import page
from luthier.report.schema import Report
from luthier.report.spreadsheet import spreadsheet

FILES = ("report.html", "report.md", "report.csv", "report.json")


def write_report(folder: Path, report: Report) -> None:
    """Write the files of a report into a folder, each whole."""
    write_whole(folder / "report.html", page(report).encode())
    write_whole(folder / "report.md", markdown(report).encode())
    write_whole(folder / "report.csv", spreadsheet(report).encode())
    write_json(folder / "report.json", report.model_dump(mode="json"))  # last: with it the report is there
