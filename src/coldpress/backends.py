"""Names that the command line knows before torch is imported: of attention backends, of sizes, of no press at all."""

__all__ = ["BACKENDS", "BUDGETS", "NO_PRESS"]

BACKENDS = {"coldpress": "sdpa", "coldpress_eager": "eager", "coldpress_fa2": "flash_attention_2"}  # whose arithmetic
BUDGETS = ("budget_tokens", "budget_bytes")  # what may say how much is kept, instead of a ratio
NO_PRESS = "no_press"  # the uncompressed baseline: a name for the command line, no class
