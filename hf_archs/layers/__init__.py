"""The layers that several architectures use: attention, convolution, feed-forwards and norms."""
