"""The options of ``coldpress serve`` and ``coldpress chat``."""

from __future__ import annotations

import argparse
import re
from functools import partial

from coldpress.commands.options import add_machinery, add_model, add_press
from coldpress.commands.values import integer, positive

__all__ = ["byte_count", "chat_options", "serve_options"]

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


def byte_count(text: str) -> int:
    """``2GiB``, ``500MB`` or a number of bytes."""
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([a-z]*)", text.strip().lower())
    if found is None or found[2] not in _UNITS:
        raise argparse.ArgumentTypeError(f"must be a number of bytes such as 2GiB or 500MB, got {text[:40]!r}")
    return int(float(found[1]) * _UNITS[found[2]])


def chat_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("who is talked to")
    add_model(what)
    what.add_argument("--system", metavar="TEXT", help="a system prompt, which nothing may evict")
    add_press(what, "earlier turns")
    add = what.add_argument
    add("--recent_tokens", type=positive, default=512, help="that stay whole before they are compressed (default: 512)")
    add("--max_new_tokens", type=positive, default=512, help="of an answer (default: 512)")
    add("--temperature", type=float, default=0.0, help="0 takes the most likely token (default: 0)")
    add("--top_p", type=float, default=1.0, help="draw from tokens with this probability together (default: 1)")
    add("--seed", type=partial(integer, minimum=0), default=0, help="of what is drawn (default: 0)")
    add_machinery(parser.add_argument_group("how"))


def serve_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is served")
    add_model(what)
    what.add_argument("--served_name", help="under which requests ask for the model (default: its own)")
    add_press(what, "snapshots")
    room = parser.add_argument_group("where snapshots are")
    add = room.add_argument
    add("--budget_bytes", type=byte_count, default=2 << 30, help="of snapshots in memory (default: 2GiB)")
    add("--folder", help="where snapshots go that memory has no room for (default: none, they are made again)")
    add("--disk_budget_bytes", type=byte_count, help="of the folder (default: no limit)")
    where = parser.add_argument_group("where it listens")
    add = where.add_argument
    add("--host", default="127.0.0.1", help="address; another one than this machine's own needs a key")
    add("--port", type=partial(integer, minimum=0, maximum=65535), default=8000, help="0: any (default: 8000)")
    add("--api_key", help="that requests have to bring (default: COLDPRESS_API_KEY of the environment, or none)")
    add("--allow_files", metavar="FOLDER", help="snapshots may be of files in it (default: no file is opened)")
    machines = parser.add_argument_group("more than one process")
    add = machines.add_argument
    add("--engine", choices=("local", "ray"), default="local", help="ray: replicas on a Ray cluster (default: local)")
    add("--replicas", type=positive, help="processes that hold the model, with --engine ray (default: 2)")
    add("--ray_address", help="host:port or auto of a cluster (default: one started for the server)")
    limits = parser.add_argument_group("limits")
    add = limits.add_argument
    add("--max_running", type=positive, default=8, help="requests that are answered at once, in one batch (default: 8)")
    add("--max_waiting", type=positive, default=64, help="requests that wait, before others get 429 (default: 64)")
    add("--max_new_tokens", type=positive, default=1024, help="of an answer (default: 1024)")
    add("--max_body_bytes", type=byte_count, default=16 << 20, help="of a request (default: 16MiB)")
    add("--max_seconds", type=positive, default=600, help="of a request, waiting included (default: 600)")
    add_machinery(parser.add_argument_group("how"))
