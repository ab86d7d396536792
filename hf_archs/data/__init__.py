"""Text and DNA for training and evaluation."""
