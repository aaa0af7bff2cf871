"""Run the command line: ``python -m layerwise`` is the command ``layerwise``."""

from layerwise.flows.cli.main import main

if __name__ == "__main__":
    main()
