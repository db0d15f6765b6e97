"""`python -m mlxlora` is `mlxlora`."""

from mlxlora.cli.main import main

if __name__ == "__main__":
    main()
