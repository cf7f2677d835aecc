"""The texts of unseen.yaml from files of Project Gutenberg: ``python benchmarks/past_eviction/texts.py FOLDER``.

FOLDER holds 18304.txt, 6527.txt, 16595-8.txt and 16215-8.txt of Project Gutenberg, and input.txt, the plays of
Shakespeare that char-rnn is shown with. Of a book, what stands between the lines about the Project is kept; bytes that
are not UTF-8 are left out. A text that is not the one the committed records are of is named.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from pathlib import Path

OUTPUT = Path("results/inputs/unseen")
TEXTS = {  # file, name, beginning of the SHA-256 of the text
    "18304.txt": ("american-adventures", "f7ba212e3fae"),
    "6527.txt": ("debian-guide", "661f1dc10e31"),
    "16595-8.txt": ("dickens-and-music", "0fee5e407e11"),
    "16215-8.txt": ("jack-sheppard", "b9cc9c619f6b"),
    "input.txt": ("shakespeare", "86c4e6aa9db7"),
}


def body(text: str) -> str:
    """What stands between the lines about the Project; the whole of a text without them."""
    start = re.search(r"\*\*\* ?START[^\n]*\n", text)
    if start is None:
        return text
    text = text[start.end() :]
    end = re.search(r"End of (the )?Project|\*\*\* ?END", text)
    return text[: None if end is None else end.start()].strip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args().folder
    OUTPUT.mkdir(parents=True, exist_ok=True)
    others = 0
    for file, (name, known) in TEXTS.items():
        raw = (folder / file).read_bytes().decode("utf-8", "ignore")
        text = body(raw.replace("\r\n", "\n")).encode()
        (OUTPUT / f"{name}.txt").write_bytes(text)
        is_known = hashlib.sha256(text).hexdigest().startswith(known)
        others += not is_known
        print(f"{OUTPUT / name}.txt: {len(text):,} bytes, {'as measured' if is_known else 'not the text measured'}")
    return min(others, 1)


if __name__ == "__main__":
    sys.exit(main())
