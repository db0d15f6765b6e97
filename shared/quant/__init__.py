"""Storage formats for weights. The NumPy codecs are the specification; backends bring kernels."""
