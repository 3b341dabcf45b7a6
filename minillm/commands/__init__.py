"""One thin command a file; minillm/__main__.py picks."""
