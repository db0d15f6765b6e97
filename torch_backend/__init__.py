"""The PyTorch backend, mirror of `mlxlora/`: same file names, same order of definitions."""
