"""Pictures: their sources, decoding, cache, classes and captions, and the rows that batches are made of."""
