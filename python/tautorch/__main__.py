"""``python -m tautorch``."""

from tautorch.cli import main

if __name__ == "__main__":
    main()
