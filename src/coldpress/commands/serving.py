"""``coldpress serve``: answer questions over HTTP, about texts that were compressed once."""

from __future__ import annotations

import argparse
import os
import shlex
import warnings
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from coldpress.bases.press_files import load_press_files
from coldpress.bases.registry import file_parameters, make_press, press_names, takes_ratio
from coldpress.bases.scorer import BUDGETS
from coldpress.cache.pressed import PressedCache
from coldpress.commands.early import check_server
from coldpress.commands.replicas import replicas
from coldpress.core.definition import in_short
from coldpress.core.press import Press
from coldpress.errors import InputError
from coldpress.io.files import path_of
from coldpress.io.progress import note
from coldpress.io.terminal import printable
from coldpress.loading.models import load_model
from coldpress.loading.presses import check_of_a_context, check_types, default_press, read_press_args
from coldpress.serving.service import Limits, Service
from coldpress.serving.snapshots import Snapshots
from coldpress.stores.bits import MIXED

__all__ = ["press_of", "refuse_mixed", "serve", "serve_given"]

KEY_VARIABLE = "COLDPRESS_API_KEY"
_LOCAL = ("127.0.0.1", "localhost", "::1")


def serve_given(args: argparse.Namespace, model_options: dict[str, Any]) -> int:
    """Serve as the command line says; see :func:`serve`."""
    press = {name: getattr(args, name) for name in ("press", "compression_ratio", "budget_tokens", "press_args")}
    press["press"] = args.press or default_press(args.chunk_tokens)
    snapshots = ("budget_bytes", "folder", "disk_budget_bytes", "chunk_tokens", "kv_bits")
    limits = Limits(
        running=args.max_running,
        waiting=args.max_waiting,
        new_tokens=args.max_new_tokens,
        body_bytes=args.max_body_bytes,
        time_s=float(args.max_seconds),
    )
    if args.engine == "local" and (args.replicas or args.ray_address):
        raise InputError("--replicas and --ray_address are of --engine ray; give that too.")
    if args.folder is None and args.disk_budget_bytes is not None:
        raise InputError("--disk_budget_bytes is of a folder; give --folder too.")
    return serve(
        model_options,
        {name: value for name, value in press.items() if value is not None},
        {name: getattr(args, name) for name in snapshots},
        limits,
        args.host,
        args.port,
        args.api_key,
        args.allow_files,
        args.served_name,
        None if args.engine == "local" else (args.replicas or 2, args.ray_address),
    )


def serve(
    model_options: dict[str, Any],
    press: dict[str, Any],
    snapshots: dict[str, Any],
    limits: Limits,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    allow_files: str | None = None,
    served_name: str | None = None,
    cluster: tuple[int, str | None] | None = None,
) -> int:
    """Answer requests until a signal comes; the exit code.

    Args:
        model_options: of :func:`load_model`.
        press: options of :func:`press_of`, for snapshots that say nothing else.
        snapshots: options of :class:`Snapshots`.
        limits: of requests.
        host, port: where to listen.
        api_key: that requests have to bring; None takes that of the environment.
        allow_files: the folder whose files a client may name; None: no file is opened for one.
        served_name: under which requests ask for the model; None: its own, of a folder or file the last part.
        cluster: how many replicas on a Ray cluster, and its address or None; None: this process alone.

    Raises:
        InputError: something that was asked for cannot work; before the model is loaded where that can be known.
    """
    check_server()
    from coldpress.serving.app import make_app
    from coldpress.serving.guard import Guard
    from coldpress.serving.listening import Listener, bound

    api_key = os.environ.get(KEY_VARIABLE) if api_key is None else api_key
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        raise InputError("The key must be ASCII letters without blanks around them; give another --api_key.")
    is_local = host in _LOCAL
    if not is_local and api_key is None:
        raise InputError(f"--host {host} is open to other machines; give --api_key, or set {KEY_VARIABLE}.")
    files = None if allow_files is None else path_of(allow_files)
    if files is not None and not files.is_dir():
        raise InputError(f"--allow_files {allow_files} is no folder; name the one whose files clients may ask about.")
    load_press_files([str(press.get("press", ""))])  # requests name what is loaded, and load nothing
    chosen = press_of(press, {})
    how = {name: snapshots[name] for name in ("chunk_tokens", "kv_bits")}
    refuse_mixed(how["kv_bits"])
    PressedCache(chosen, **how)  # refuses what does not go together
    hosts = (*_LOCAL, "[::1]") if is_local and api_key is None else None

    def service() -> Service:
        loaded = load_model(**model_options)
        held = Snapshots(loaded.model, loaded.tokenizer, chosen, **snapshots)
        name = served_name or Path(loaded.name).name
        return Service(loaded.model, loaded.tokenizer, name, held, limits, partial(press_of, press), files)

    with bound(host, port) as at, ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: note(str(message))
        address = f"http://{f'[{host}]' if ':' in host else host}:{at.getsockname()[1]}"
        if cluster is None:
            served = service()
            app = make_app(served, api_key, hosts)
            lines = greeting(served, address, api_key is not None)
        else:
            if snapshots["folder"] is None:
                raise InputError("--engine ray needs a --folder that all replicas share, for their snapshots.")
            served = stack.enter_context(replicas(service, *cluster, limits))
            app = Guard(served, limits, api_key, hosts)
            lines = f"coldpress serve: {address}/v1, {cluster[0]} replicas on Ray\nend: Ctrl-C or SIGTERM"
        listener = Listener(app, served, lambda: print(lines, flush=True))
        listener.listen(at)
    note("ended; what was asked is answered")
    return 130 if listener.is_interrupted else 0


def press_of(own: dict[str, Any], given: dict[str, Any]) -> Press | None:
    """The press of options that a client gives, of a server with a press of its own.

    Another press has none of the server's options, another size takes the place of the server's.

    Args:
        own: ``press``, a registered name, unless ``given`` has one; and as far as they are given
            ``compression_ratio``, ``budget_tokens``, ``budget_bytes`` and ``press_args``.
        given: likewise, without what is as ``own`` says.

    Raises:
        InputError: there is no such press, or it does not take these.
    """
    sizes, of_client = ("compression_ratio", *BUDGETS), read_press_args(given.get("press_args"))
    if "press" not in given:
        has_size = any(size in given for size in sizes)
        given = {name: value for name, value in own.items() if not (has_size and name in sizes)} | given
    name, ratio = given["press"], given.get("compression_ratio")
    budget = {size: given[size] for size in BUDGETS if given.get(size) is not None}
    if not isinstance(name, str):
        raise InputError(f"press must be the name of a press, got {repr(name)[:80]}.")
    if ratio is not None and (isinstance(ratio, bool) or not isinstance(ratio, (int, float))):
        raise InputError(f"compression_ratio must be a number in [0, 1), got {repr(ratio)[:80]}.")
    for size, value in budget.items():
        if type(value) is not int or value < 1:
            raise InputError(f"{size} must be an integer of at least 1, got {repr(value)[:80]}.")
    if ratio is not None and budget:
        raise InputError(f"compression_ratio and {next(iter(budget))} both say how much is kept; give one of them.")
    arguments = read_press_args(given.get("press_args"))
    for size in sizes:
        if size in arguments:
            raise InputError(f"press_args cannot hold {size}; give it by itself.")
    if ratio is None:
        ratio = 0.5 if takes_ratio(name) and not budget else 0.0
    if name in press_names():
        check_types(name, arguments)
        for option in file_parameters(name) & of_client.keys():  # some presses look into theirs as they are made
            if isinstance(of_client[option], str):
                raise InputError(f"press_args: {option} names a file, and a server opens none that its client names.")
    press = make_press(name, ratio, **budget, **arguments)
    check_of_a_context(name, press, {"compression_ratio": ratio, **budget})
    return press


def greeting(service: Service, address: str, has_key: bool) -> str:
    """Five lines: where the server listens, what it holds, what it allows, how to ask it, and how to end it."""
    snapshots, limits = service.snapshots, service.limits
    model = service.model
    dtype = str(model.dtype).removeprefix("torch.")
    room = "no limit" if snapshots.budget_bytes is None else f"{snapshots.budget_bytes:,} bytes"
    press = "no press" if snapshots.press is None else in_short(snapshots.press)
    key = ' -H "Authorization: Bearer $COLDPRESS_API_KEY"' if has_key else ""
    body = f'{{"model": "{service.name}", "messages": [{{"role": "user", "content": "Who?"}}]}}'
    return printable(
        f"coldpress serve: {address}/v1, {service.name} in {dtype} on {model.device}, "
        f"{'with a key' if has_key else 'for this machine alone, without a key'}\n"
        f"holds: snapshots in {room} of memory, {snapshots.disk_bytes:,} bytes on disk; {press}\n"
        f"allows: {limits.running} answers at once, {limits.waiting} waiting, {service.max_positions:,} positions, "
        f"{limits.new_tokens:,} new tokens\n"
        f"ask: curl {address}/v1/chat/completions{key} -H 'Content-Type: application/json' -d {shlex.quote(body)}\n"
        "end: Ctrl-C or SIGTERM; answers that have begun are finished",
        keep="\n",
    )


def refuse_mixed(kv_bits: int | str | None) -> None:
    """Raise :class:`InputError` for bits that spend a press's budget of bytes, where no command line gives one."""
    if kv_bits == MIXED:
        raise InputError(
            f"--kv_bits {MIXED} spends a press's budget of bytes, which is not given here: say k8v4 or k4v4."
        )
