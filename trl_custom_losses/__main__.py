"""`python -m trl_custom_losses` is the command `trl-custom-losses`."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    main()
