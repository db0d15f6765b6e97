"""`python -m mlxlora` is `mlxlora`."""

from mlxlora.cli.start import main

if __name__ == "__main__":
    main()
