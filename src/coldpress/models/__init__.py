"""How a model is run with a cache: the attention backend, blocks, prompts in pieces, compiled steps, the pipeline."""
