"""Text and DNA to train on and to measure with."""
