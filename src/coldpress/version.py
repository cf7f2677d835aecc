"""Which coldpress this is."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["VERSION"]

try:
    VERSION = version("coldpress")
except PackageNotFoundError:  # imported from a source tree that was not installed
    VERSION = "0+unknown"
