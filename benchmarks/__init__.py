"""Benchmarks: each writes a record (record.py) to benchmarks/results/ and prints a table."""
