"""How good a swap is, measured on faces that were held out."""
