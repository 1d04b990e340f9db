"""Writes the reports from the data files."""
