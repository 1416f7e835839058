"""`python -m erpe`."""

from erpe.cli import main

if __name__ == "__main__":
    main()
