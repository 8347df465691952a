"""`python -m lightning_lss.cli`: the same as the command `lightning-lss`."""

from lightning_lss.cli.main import main

if __name__ == "__main__":  # Lightning starts the other ranks by this module's name
    main()
