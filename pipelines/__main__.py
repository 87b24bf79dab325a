"""`python -m longreach.pipelines` and the `longreach` command."""

from longreach.pipelines.cli import main

if __name__ == "__main__":
    main()
