"""What is read off a transformers model: rotary embedding, projections, places of layers, its identity."""
