"""`python -m pipelines` and the `longreach` command."""

from pipelines.cli import main

if __name__ == "__main__":
    main()
