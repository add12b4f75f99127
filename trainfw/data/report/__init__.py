"""Reports on data before it is trained on: counts, lengths, duplicates, overlaps with an evaluation set."""
