"""The rules of the product: no I/O, no clock, no randomness but new ids."""
