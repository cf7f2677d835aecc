"""llama.cpp behind the same context, on the same weights in 16 bits, as more decoders among the others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["LlamaCpp", "write_in_16_bits"]


def write_in_16_bits(source: Path, target: Path) -> None:
    """Copy a GGUF file with all its matrices as float16, and its vectors as float32, as llama.cpp's own F16 files."""
    import numpy as np
    from gguf import GGUFReader, GGUFValueType, GGUFWriter, dequantize

    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    own = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")
    for name, field in reader.fields.items():
        if not name.startswith(own):
            kind, *inner = field.types
            sub_type = inner[-1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub_type=sub_type)
    writer.add_file_type(1)  # mostly F16
    for tensor in reader.tensors:
        numbers = dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, numbers.astype(np.float32 if numbers.ndim == 1 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """A context in llama.cpp from which :meth:`tokens` decodes.

    It is a process of its own, which is stopped between samples: its threads would go on looking for work.

    Args:
        path: a GGUF file.
        ids: int64 ``[1, n]``, the context.
        threads: of the CPU.
        pairs: llama.cpp's name of how keys and values are stored: "F16", or "Q8_0", 8 bits and a scale for 32 of them.
    """

    def __init__(self, path: Path, ids: Tensor, threads: int, pairs: str = "F16"):
        command = [sys.executable, "-m", "benchmarks.decode_speed.llamacpp", str(path), str(threads), pairs]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._ask(ids[0].tolist())

    def tokens(self, n: int) -> tuple[list[float], float]:
        """As :meth:`benchmarks.decoding.Decoder.tokens`; llama.cpp says the mean time of a token only."""
        self.process.send_signal(signal.SIGCONT)
        ms, share = self._ask(n)
        return [round(ms, 3)] * n, round(share, 3)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _ask(self, what: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("llama.cpp has ended without an answer")
        self.process.send_signal(signal.SIGSTOP)
        return json.loads(line)


def main() -> None:
    """Answer lines from standard input: the context first, then numbers of tokens to decode after it."""
    import xllamacpp

    answers = os.dup(1)  # what llama.cpp prints there goes elsewhere
    os.dup2(2, 1)
    ids = json.loads(sys.stdin.readline())
    params = xllamacpp.CommonParams()
    params.model.path, params.n_parallel, params.n_ctx = sys.argv[1], 1, len(ids) + 512
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[2])
    params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{sys.argv[3]}")
    server = xllamacpp.Server(params)
    asked = {"prompt": ids, "n_predict": 1, "cache_prompt": True, "temperature": 0.0, "ignore_eos": True}
    server.handle_completions(asked)
    os.write(answers, b"[]\n")
    for line in sys.stdin:
        n = json.loads(line)
        start, cpu_start = time.perf_counter(), time.process_time()
        answer: Any = server.handle_completions(asked | {"n_predict": n})
        share = (time.process_time() - cpu_start) / (time.perf_counter() - start)
        timings = answer["timings"]
        if timings["predicted_n"] != n:
            raise SystemExit(f"llama.cpp made {timings['predicted_n']} tokens of {n}")
        os.write(answers, f"{json.dumps([timings['predicted_per_token_ms'], share])}\n".encode())


if __name__ == "__main__":
    main()
