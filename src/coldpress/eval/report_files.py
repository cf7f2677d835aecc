"""The files of a report: the page, its Markdown summary and the plots, in one folder."""

from __future__ import annotations

from pathlib import Path

from coldpress.errors import OutputError
from coldpress.eval.document import make_report
from coldpress.eval.page import page
from coldpress.eval.results import Collection, check_writable
from coldpress.eval.summary import summary
from coldpress.io.files import replace_file

__all__ = ["write_report"]


def write_report(collection: Collection, folder: Path) -> list[Path]:
    """Write ``report.html``, ``report.md`` and the plots into ``folder``; each whole or as it was before.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        OutputError: the folder cannot be written to.
    """
    check_writable(folder)
    report = make_report(collection)
    files = {f.file: f.drawing.png for part in report.parts for f in part.figures}
    files |= {"report.md": summary(report).encode(), "report.html": page(report).encode()}
    return [_write(folder / name, content) for name, content in files.items()]


def _write(path: Path, content: bytes) -> Path:
    try:
        replace_file(path, lambda part: part.write_bytes(content))
    except OSError as error:
        raise OutputError(f"cannot write {str(path)!r} ({error.strerror}): choose another --output") from error
    return path
