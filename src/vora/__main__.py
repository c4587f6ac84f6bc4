"""`python -m vora`, and the command `vora`."""

import sys


def main() -> None:
    """Run the command line; also while it is still being read, Ctrl-C ends it in one line."""
    try:
        from vora.cli import main as run
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
