"""llama.cpp behind the same context, on the same weights in 16 bits, as one more decoder among the others."""

from __future__ import annotations

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
    """A context in llama.cpp, keys and values in float16, from which :meth:`tokens` decodes.

    Args:
        path: a GGUF file.
        ids: int64 ``[1, n]``, the context.
        threads: of the CPU.
    """

    def __init__(self, path: Path, ids: Tensor, threads: int):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.n_parallel, params.n_ctx = str(path), 1, ids.shape[1] + 512
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        self.server, self.ids = xllamacpp.Server(params), ids[0].tolist()

    def tokens(self, n: int) -> tuple[list[float], float]:
        """As :meth:`benchmarks.decoding.Decoder.tokens`; llama.cpp says the mean time of a token only."""
        asked = {"prompt": self.ids, "n_predict": n, "cache_prompt": True, "temperature": 0.0, "ignore_eos": True}
        start, cpu_start = time.perf_counter(), time.process_time()
        answer: Any = self.server.handle_completions(asked)
        share = (time.process_time() - cpu_start) / (time.perf_counter() - start)
        timings = answer["timings"]
        if timings["predicted_n"] != n:
            raise SystemExit(f"llama.cpp made {timings['predicted_n']} tokens of {n}")
        return [round(timings["predicted_per_token_ms"], 3)] * n, round(share, 3)
