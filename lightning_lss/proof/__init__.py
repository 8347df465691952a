"""The proof that a run is the training of one device, before its first step: the first batch whole and split, compared."""
