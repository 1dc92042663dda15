"""Operations: `adder.py` is the adder convolution, with one file a backend beside it."""
