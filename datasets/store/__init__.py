"""The volume store: one chunked, compressed array a case."""
