"""The results of a sweep: points and fronts, their measures, the conclusions, and the report."""
