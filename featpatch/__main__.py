"""The program `featpatch`, also as `python -m featpatch`."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C while the libraries are imported ends it as quietly as later."""
    try:
        from featpatch.cli.app import app

        app()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
