"""Shared by all programs: methods, prompts, provenance and data files."""
