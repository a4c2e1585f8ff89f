"""`python -m meditron_train ...` is the same as `meditron-train ...`."""

from meditron_train.cli.main import main

# The guard matters: saving a checkpoint starts helper processes that import this module again.
if __name__ == "__main__":
    main()
