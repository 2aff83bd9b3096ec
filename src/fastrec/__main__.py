"""``python -m fastrec``: the ``fastrec`` command."""

from fastrec.cli import main

if __name__ == "__main__":
    main()
