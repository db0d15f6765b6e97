"""A run in progress, its folder and its checkpoints."""
