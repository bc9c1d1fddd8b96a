"""``python -m trionic`` is the command ``trionic``."""

from trionic.cli import main

if __name__ == "__main__":
    main(prog_name="trionic")
