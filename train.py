"""`python train.py` in a clone: the same as the command `lightning-lss` of an installed package."""

from lightning_lss.cli.main import main

if __name__ == "__main__":
    main()
