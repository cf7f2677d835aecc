"""The names of coldpress's attention backends, and the backends of transformers whose arithmetic they use."""

__all__ = ["BACKENDS"]

BACKENDS = {"coldpress": "sdpa", "coldpress_eager": "eager", "coldpress_fa2": "flash_attention_2"}
