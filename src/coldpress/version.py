"""Which coldpress this is."""

import functools
import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["VERSION", "source_digest"]

try:
    VERSION = version("coldpress")
except PackageNotFoundError:  # imported from a source tree that was not installed
    VERSION = "0+unknown"


@functools.cache
def source_digest() -> str:
    """SHA-256 over the names and contents of coldpress's own code."""
    root, digest = Path(__file__).resolve().parent, hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.suffix in (".py", ".cpp")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()
