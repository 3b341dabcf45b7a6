"""The results of `minillm profile` as an HTML page."""
