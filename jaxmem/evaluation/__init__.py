"""How well a model does, measured on held-out data."""
