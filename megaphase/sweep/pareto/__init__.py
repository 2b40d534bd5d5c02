"""What a sweep has found: points and fronts, their measures, the verdict, and the report of it."""
