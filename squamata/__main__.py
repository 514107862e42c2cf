"""``python -m squamata``: the command line."""

from squamata.cli.main import run

if __name__ == "__main__":
    run()
